"""eval.py: which answers are right, damaged videos, killed runs, and the table with baselines."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eval
from llama import LLAMAS, Llama
from merv import MERV, MERVS
from miniature.world import write_world
from support import benchmarks
from support.errors import DataError, UserError
from support.files import Journal
from support.report import read_result

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three test clips with questions; the second is damaged, the third is gone."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, {"train": 12, "test": 3})
    (folder / "test/videos/clip_000001.mp4").write_bytes(b"no video")
    (folder / "test/videos/clip_000002.mp4").unlink()
    return folder


QUICK = eval.EvalConfig(max_new_tokens=4, workers=0)


@pytest.fixture(scope="module")
def model(world):
    """An untrained miniature: its answers are nonsense, but the same nonsense every time."""
    config = replace(MERVS["miniature"], llm=replace(LLAMAS["miniature"], num_layers=1))
    return MERV.create(config, world / "tokenizer.model").eval()


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", ""),
        ("B.", "B"),
        ("(B)", "B"),
        ("(B) blue", "B"),
        ("B: blue", "B"),
        ("The answer is B.", "B"),
        ("The correct option is (C)", "C"),
        ("I think (D).", "D"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("Both", ""),
        ("Black", ""),
        ("E", ""),
        ("A cat", ""),
        ("", ""),
        ("b)", "B"),
        ("b.", "B"),
        ("(b) blue", "B"),
        ("option b", "B"),
        ("Answer:B", "B"),
        ("Answer - B", "B"),
        ("**Answer:** B", "B"),
        ("__B__", "B"),
        ("`B`", "B"),
        ("'B'", "B"),
        ("\\boxed{B}", "B"),
        ("\uff08\uff22\uff09", "B"),  # full-width brackets and letter
        ("B\u3002", "B"),
        ("The answer is option B", "B"),
        ("The answer would be b.", "B"),
        ("The answer is A because of the red", "A"),
        ("A is correct", "A"),
        ("The answer is A red.", "A"),
        ("Option A red", "A"),
        ("Option A cat that jumps", "A"),
        ("Answer: a", "A"),
        ("Option A is wrong, so the answer is B", "B"),
        ("Option A is wrong, option B is right", "B"),
        ("It is not option A but option B", "B"),
        ("(A) is wrong, I think (B)", "B"),
        ("B. Because (A) is absent", "B"),
        ("B\nA man opens a door", "B"),
        ("Between B and C, the answer is C", "C"),
        ("The answer is A man", ""),
        ("the answer is a man", ""),
        ("the option a man has", ""),
        ("The man (a doctor) leaves", ""),
        ("I think A", ""),
        ("It is not (A)", ""),
        ("B or C", ""),
        ("B and C", ""),
        ("B, C", ""),
        ("The answer is B or C", ""),
        ("The answer is A. The answer is B.", ""),
        ("(a) red\n(b) blue\n(c) green", ""),
        ("(A) red (B) blue", ""),
        ("A. red or B. blue", ""),
        ("Answer: (A) red or (B) blue", ""),
        ("A: red, B: blue", ""),
        ("B - C", ""),
        ("A B C D", ""),
        ("B, or perhaps C", ""),
        ("B as well as C", ""),
        ("_B_", "B"),
        ("B is clearly the best", "B"),
        ("C is for cat", ""),
        ("B movies are old", ""),
        ("The answer is E", ""),
    ],
)
def test_the_letter_of_a_reply_is_found(reply, letter):
    """Ledger F9: the first character alone would call "Both" B and "The answer is B." wrong."""
    assert eval.parse_letter(reply, ("red", "blue", "green", "white")) == letter


def test_the_table_of_replies_in_the_docstring_holds():
    """The docstring of parse_letter is the rule: each of its examples is read as it says."""
    options = ("red", "blue", "two (A)", "a cat")
    shown = ", ".join(f'"{option}"' for option in options)
    assert f"Of the options {shown}:" in eval.parse_letter.__doc__
    read = []
    for line in eval.parse_letter.__doc__.splitlines():
        if match := re.match(r'\s+(".*")\s+(none|[A-D])\s', line):
            for reply in re.findall(r'"(.*?)"', match[1]):
                letter = match[2].replace("none", "")
                assert eval.parse_letter(reply, options) == letter, reply
                read.append(letter)
    assert len(read) > 25 and {"", "B", "D"} <= set(read)


def test_what_the_words_of_an_option_say_does_not_name_a_letter():
    """Ten options: "I" and "A" are words as well; a letter beyond the options is none."""
    options = tuple(f"thing {number}" for number in range(10))
    assert eval.parse_letter("I think it is thing 3", options) == ""
    assert eval.parse_letter("I", options) == "I"
    assert eval.parse_letter("Answer: j", options) == "J"
    assert eval.parse_letter("thing 3", options) == "D"
    assert eval.parse_letter("Answer: J", options[:9]) == ""


def test_a_reply_that_repeats_itself_without_end_is_read():
    """It took minutes, because each letter was looked for after each letter."""
    reply = "Answer: A or option " * 10_000
    assert eval.parse_letter(reply, ("red", "blue")) == "A"


def test_an_option_that_begins_with_an_article_is_recognised():
    """ "A cat" is option B if that is what B says, although it begins with the letter A."""
    assert eval.parse_letter("A cat", ("a dog", "a cat")) == "B"


def test_words_are_compared_without_case_punctuation_and_articles():
    """Exact match is on the words."""
    assert eval.normalise("A red  Square.") == eval.normalise("the RED square") == "red square"
    assert eval.normalise("no") != eval.normalise("know")
    assert len({eval.normalise(text) for text in ("A", "the", "+", "")}) == 4
    assert eval.normalise("A.") == eval.normalise("a") == "a"


def test_an_empty_reply_is_never_right():
    """Not where the right option is an article, and not where the video has failed."""
    options = ("A", "B", "C")
    assert eval.parse_letter("", options) == eval.parse_letter("...", options) == ""
    failed = benchmarks.Question("1", "v", "Which?", "A", options=options, failure="no video")
    for rule in ("parse", "released"):
        eval.score(failed, rule)
        assert not failed.correct
    dot = benchmarks.Question("1", "v", "Which letter?", "A", answer=".")
    eval.score(dot, "parse")
    assert not dot.correct


def test_a_question_that_has_changed_is_asked_again(world, model, tmp_path):
    """And with it the others about its clip. All other clips keep their answers."""
    folder = tmp_path / "data"
    shutil.copytree(world / "test", folder)
    out = tmp_path / "out"
    eval.evaluate(model, "miniature-open", folder, out, QUICK)
    file = folder / "open_q.json"
    rows = json.loads(file.read_text())
    changed = next(row for row in rows if row["video_name"] == "clip_000000")
    changed["question"] += " Now?"
    file.write_text(json.dumps(rows))
    journal = out / "miniature-open.answers" / "0.jsonl"
    before = journal.read_text().splitlines()
    for _ in range(2):  # the second time, nothing is asked
        eval.evaluate(model, "miniature-open", folder, out, QUICK)
        (again,) = journal.read_text().splitlines()[len(before) :]
        assert str(changed["question_id"]) in json.loads(again)["answers"]


def test_a_question_that_is_too_long_is_named_before_anything_is_asked(world, model, tmp_path):
    """It ended the evaluation in the middle, without its name, and again at every rerun."""
    folder = shutil.copytree(world / "test", tmp_path / "data")
    file = folder / "open_q.json"
    rows = json.loads(file.read_text())
    rows[-1]["question"] = "why " * 1500
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=f"Question '{rows[-1]['question_id']}' has .* tokens"):
        eval.evaluate(model, "miniature-open", folder, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_keeps_the_judges_verdicts(world, model, tmp_path, capsys):
    """They were thrown away, and the report silently showed exact match. If an answer has changed,
    its verdict says nothing."""
    file = tmp_path / "miniature-open.json"
    evaluate(model, "miniature-open", world, tmp_path)
    result = json.loads(file.read_text())
    result["settings"]["judge"] = {"model": "grader"}
    for question in result["questions"]:
        question |= {"verdict": "yes", "mark": 4}
    file.write_text(json.dumps(result))
    for question in evaluate(model, "miniature-open", world, tmp_path):
        assert (question.verdict, question.mark) == ("yes", 4)
        assert question.correct == (not question.failure)
    assert json.loads(file.read_text())["settings"]["judge"] == {"model": "grader"}
    result["questions"][0]["answer"] = "of another day"
    file.write_text(json.dumps(result))
    assert not any(q.verdict for q in evaluate(model, "miniature-open", world, tmp_path))
    assert "run --judge again" in capsys.readouterr().out


def test_videos_that_cannot_be_read_are_failed_answers(world, model, tmp_path):
    """One damaged and one missing clip: the rest is answered, the failures are counted as wrong."""
    questions = evaluate(model, "miniature-open", world, tmp_path)
    by_video = {v: [q for q in questions if q.video == v] for v in {q.video for q in questions}}
    assert all(not q.failure and len(q.mixing_weights) == 4 for q in by_video["clip_000000"])
    assert all("cannot be decoded" in q.failure for q in by_video["clip_000001"])
    assert all("has no video" in q.failure for q in by_video["clip_000002"])
    row = eval.summarise(questions)["all"]
    assert row.answered == len(by_video["clip_000000"]) and row.expected == len(questions)
    assert row.accuracy == sum(q.correct for q in questions) / len(questions)


def evaluate(model, name, world, output, **changes):
    """Answers of the test split, in this process."""
    return eval.evaluate(model, name, world / "test", output, replace(QUICK, **changes))


def test_accuracy_counts_by_kind():
    """Two kinds, one of them with a failure: a failure is a wrong answer."""
    base = benchmarks.Question("1", "v", "What colour?", "red", "colour", answer="Red.")
    questions = [
        base,
        replace(base, answer="blue"),
        replace(base, kind="shape", answer="red"),
        replace(base, kind="shape", answer="", failure="no such video"),
    ]
    for question in questions:
        eval.score(question, "parse")
    assert eval.summarise(questions) == {
        "colour": (0.5, 2, 2, 1),  # accuracy, answered, expected, baseline
        "shape": (0.5, 1, 2, 1),
        "all": (0.5, 3, 4, 1),
    }


def test_the_baseline_is_the_most_common_right_answer_of_each_kind():
    """For "all" it is the most common answer of each question's own kind."""
    colours = ["red", "Red.", "the red", "blue"]
    rows = rows_of({"colour": colours, "shape": ["ring", "cross"]})
    baselines = {kind: row.baseline for kind, row in rows.items()}
    assert baselines == {"colour": 3 / 4, "shape": 1 / 2, "all": 4 / 6}


def rows_of(expected: dict[str, list[str]], **more) -> dict[str, eval.Row]:
    """The table of unanswered questions with these right answers of each kind."""
    questions = []
    for kind, answers in expected.items():
        for answer in answers:
            number = str(len(questions))
            questions.append(benchmarks.Question(number, "v", "Which?", answer, kind, **more))
    return eval.summarise(questions)


def test_the_baseline_of_multiple_choice_is_the_most_common_letter():
    """Also if that is A, which as a word would be an article."""
    rows = rows_of({"colour": ["A", "A", "B", "C"]}, options=("red", "blue", "pink"))
    assert rows["all"].baseline == 1 / 2


def test_the_baseline_does_not_know_the_kind_if_that_is_the_answer():
    """ssv2-open has a row for each class: the most common class is right in its own row only."""
    rows = rows_of({"Holding it": ["Holding it"] * 3, "Moving it": ["Moving it"]})
    baselines = {kind: row.baseline for kind, row in rows.items()}
    assert baselines == {"Holding it": 1, "Moving it": 0, "all": 3 / 4}


def test_multiple_choice_is_asked_with_its_options_and_judged_by_the_letter(world):
    """The expected answer is the letter of answer_id, and the prompt shows every option."""
    for question in benchmarks.load_questions("miniature-mcq", world / "test"):
        assert question.options[ord(question.expected) - ord("A")] in question.prompt
        assert all(option in question.prompt for option in question.options)
        assert "nothing else." in question.prompt


def test_all_kinds_are_asked(world):
    """Each clip is asked every kind of question that it allows."""
    kinds = {q.kind for q in benchmarks.load_questions("miniature-open", world / "test")}
    assert kinds >= {"colour", "shape", "texture", "how many"}
    assert kinds & {"temporal", "what happens"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".."])
def test_a_video_name_cannot_leave_the_folder(world, name):
    """Annotations are data: a path in one must not open files elsewhere."""
    (world / "test" / "secret.mp4").write_bytes(b"")
    question = benchmarks.Question("1", name, "Who?", "me")
    clips = eval.Clips([question], world / "test", [])
    assert "has no video" in clips[0][2]


def test_videos_are_found_by_stem_whatever_the_extension(tmp_path):
    """In subfolders too; a folder of images is one video; a longer stem is another video."""
    for name in ("a.webm", "ab.mp4", "v[1].gif", "1150/6233408665.mp4", "frames/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = benchmarks.list_videos(tmp_path)
    names = {stem: path.name for stem, path in found.items()}
    assert names == {
        "a": "a.webm", "ab": "ab.mp4", "v[1]": "v[1].gif", "6233408665": "6233408665.mp4",
        "frames": "frames",
    }  # fmt: skip


def test_a_broken_question_file_is_explained(tmp_path):
    """Missing files, answers that lack a question, an id twice: the error says which."""
    with pytest.raises(UserError, match="No such file"):
        benchmarks.load_questions("msvd", tmp_path)
    (tmp_path / "test_q.json").write_text(
        json.dumps([{"question_id": 1, "video_name": "v", "question": "Who?"}] * 2)
    )
    (tmp_path / "test_a.json").write_text("[]")
    with pytest.raises(UserError, match="KeyError"):
        benchmarks.load_questions("msvd", tmp_path)
    (tmp_path / "test_a.json").write_text('[{"question_id": 1, "answer": "me"}]')
    with pytest.raises(UserError, match="more than one question has the id 1"):
        benchmarks.load_questions("msvd", tmp_path)


def test_the_command_writes_every_answer(world, model, tmp_path):
    """`python eval.py` prints the table and leaves a JSON file that agrees with it."""
    model.save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, ROOT / "eval.py", "--checkpoint", tmp_path, "--workers", "0"]
    command += ["--benchmark", "miniature-mcq", "--data", world / "test", "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval" / "miniature-mcq.json").read_text())
    answered = sum(not q["failure"] for q in result["questions"])
    assert f"{answered}/{len(result['questions'])}" in done.stdout
    assert f"{100 * result['accuracy']['all']:.1f}%" in done.stdout
    assert not list(tmp_path.rglob("*.partial"))


def test_a_killed_run_continues_where_it_was(world, model, tmp_path, monkeypatch):
    """Whatever was on disk at the kill, a half-written line included, the result is the same file;
    no question is asked twice."""
    evaluate(model, "miniature-open", world, tmp_path / "straight")
    journal = tmp_path / "straight" / "miniature-open.answers" / "0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    asked = []
    answer = MERV.answer

    def spy(self, videos, questions, *rest):
        asked.extend(map(len, questions))
        return answer(self, videos, questions, *rest)

    monkeypatch.setattr(MERV, "answer", spy)
    for number, (whole, cut) in enumerate([(0, 0), (0, 5), (1, 0), (1, 20), (2, 1), (3, 0)]):
        output = tmp_path / f"killed-{number}"
        left = output / "miniature-open.answers" / "0.jsonl"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"".join(lines[:whole]) + lines[min(whole, 2)][:cut])
        asked.clear()
        evaluate(model, "miniature-open", world, output)
        assert sum(asked) == (0 if whole else len(json.loads(lines[0])["answers"]))
        results = [folder / "miniature-open.json" for folder in (tmp_path / "straight", output)]
        assert results[0].read_bytes() == results[1].read_bytes()
        assert left.read_bytes() == journal.read_bytes()


@pytest.mark.parametrize("name", ["miniature-open", "miniature-mcq"])
def test_clips_in_a_batch_are_answered_as_one_by_one(world, model, tmp_path, name):
    """Five clips with different numbers of questions, and a damaged one among them: the same words,
    and a record for each clip."""
    folder = tmp_path / "world"
    write_world(folder, {"train": 12, "test": 6})
    (folder / "test/videos/clip_000002.mp4").write_bytes(b"no video")
    results = []
    for size in (1, 4, None):
        output = tmp_path / f"by {size}"
        questions = evaluate(model, name, folder, output, batch_videos=size)
        results.append([replace(question, mixing_weights=()) for question in questions])
        records = (output / f"{name}.answers/0.jsonl").read_text().splitlines()
        assert len(records) == 6
    assert results[0] == results[1] == results[2]
    assert len({question.answer for question in results[0]}) > 1


def test_workers_have_cores_of_their_own(world, model, tmp_path, monkeypatch):
    """The threads of an operation wait for each other. Two of them beside two workers, on two cores
    that others used too, took twice as long as one thread."""
    threads = []
    answer = MERV.answer

    def spy(*arguments):
        threads.append(torch.get_num_threads())
        return answer(*arguments)

    monkeypatch.setattr(MERV, "answer", spy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for workers in (0, 2):
            evaluate(model, "miniature-open", world, tmp_path / str(workers), workers=workers)
        assert threads == [3, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_records_of_a_batch_are_on_disk_before_the_next_one(
    world, model, tmp_path, monkeypatch
):
    """A kill loses no more than the batch that is being answered."""
    folder = tmp_path / "world"
    write_world(folder, {"train": 12, "test": 5})
    stored = []
    answer = MERV.answer

    def spy(*arguments):
        journal = tmp_path / "miniature-open.answers/0.jsonl"
        stored.append(len(journal.read_text().splitlines()))
        return answer(*arguments)

    monkeypatch.setattr(MERV, "answer", spy)
    evaluate(model, "miniature-open", folder, tmp_path, batch_videos=2)
    assert stored == [0, 2, 4]


def test_large_models_answer_fewer_clips_at_once(model):
    """16 of the miniature. At 7B in bfloat16, 4 GB of KV cache hold 4 clips of 5 questions, or one
    clip of 60."""
    config = eval.EvalConfig()
    assert eval.clips_at_once(model, 5, config) == 16
    with torch.device("meta"):
        parts = [torch.nn.Module() for _ in MERVS["merv"].encoders]
        large = MERV(MERVS["merv"], parts, Llama(MERVS["merv"].llm), None).bfloat16()
    assert eval.clips_at_once(large, 5, config) == 4
    assert eval.clips_at_once(large, 60, config) == 1


def test_a_journal_of_an_older_version_continues(tmp_path, monkeypatch):
    """Commit 07e06b2 called the mixing weights "weights": its answers are not asked for again."""
    shutil.unpack_archive(ROOT / "tests/legacy/07e06b2.tar.gz", tmp_path)
    (tmp_path / "07e06b2").rename(tmp_path / "legacy")
    monkeypatch.chdir(tmp_path)  # a journal knows the data folder by its relative path
    run = Path("legacy/runs/legacy-complete")
    stored = json.loads((run / "eval/msvd.json").read_text())["questions"]
    (run / "eval/msvd.json").unlink()
    monkeypatch.delattr(MERV, "answer")
    questions = eval.evaluate(
        MERV.from_pretrained(run), "msvd", "legacy/data", run / "eval", eval.EvalConfig(workers=0)
    )
    assert [q.answer for q in questions] == [q["answer"] for q in stored]
    assert [list(q.mixing_weights) for q in questions] == [q["weights"] for q in stored]
    assert "mixing_weights" in (run / "eval/msvd.json").read_text()


def test_the_option_that_moved_names_the_new_command(capsys):
    """The paper's efficiency tables are printed by cost.py."""
    with pytest.raises(SystemExit) as caught:
        eval.main(["--table", "efficiency"])
    assert caught.value.code != 0
    assert "python cost.py table" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_kill_loses_nothing(world, model, tmp_path):
    """SIGKILL as soon as the first answers are on disk, then the same command again."""
    model.save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, str(ROOT / "eval.py"), "--checkpoint", str(tmp_path)]
    command += ["--benchmark", "miniature-open", "--data", str(world / "test"), "--workers", "0"]
    journal = tmp_path / "eval" / "miniature-open.answers" / "0.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (journal.exists() and journal.read_bytes().count(b"\n")):
            assert process.poll() is None, "it ended before anything was on disk"
        process.kill()
    first = journal.read_bytes().splitlines()[0]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().splitlines()[0] == first
    straight = subprocess.run(
        [*command, "--output", str(tmp_path / "straight")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr
    files = [tmp_path / folder / "miniature-open.json" for folder in ("eval", "straight")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_answers_of_another_model_are_not_taken_for_ones_own(world, model, tmp_path):
    """A journal knows what made it: a changed model or option is refused, with the folder named."""
    evaluate(model, "miniature-open", world, tmp_path)
    with pytest.raises(UserError, match="holds the answers of another run"):
        evaluate(model, "miniature-open", world, tmp_path, max_new_tokens=5)
    other = MERV.create(model.config, world / "tokenizer.model", seed=1).eval()
    with pytest.raises(UserError, match="holds the answers of another run"):
        evaluate(other, "miniature-open", world, tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_clips_and_give_the_same_file(world, model, tmp_path):
    """Under torchrun; and again with one process, which has nothing left to do."""
    model.save_pretrained(tmp_path / "checkpoint")
    options = ["--benchmark", "miniature-open", "--data", str(world / "test"), "--workers", "0"]
    options += ["--checkpoint", str(tmp_path), "--max-new-tokens", "4"]
    results = []
    for processes, output in ((2, "two"), (1, "two"), (1, "one")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(ROOT / "eval.py"), *options]
        command += ["--output", str(tmp_path / output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("answered/expected") == 1
        results.append((tmp_path / output / "miniature-open.json").read_bytes())
    assert results[0] == results[1] == results[2]
    assert len(list((tmp_path / "two" / "miniature-open.answers").glob("*.jsonl"))) == 2


def test_all_questions_of_a_video_cost_little_more_than_one(world, model):
    """25 questions about a clip: the same answers as one by one, with at most 1/8 of the work.

    At full size visual tokens and encoders are nearly all of the work. Here 16 visual tokens are
    few beside a question's, so the prefix is made as long as the real one: every patch a token.
    """
    config = replace(
        model.config,
        name="many tokens",
        projector="all",
        encoders=tuple(replace(e, num_frames=8 * e.num_frames) for e in model.config.encoders),
    )
    big = MERV.create(config, world / "tokenizer.model").eval()
    pixels = big.pixels(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8))
    questions = [f"What is {n}?" for n in range(25)]

    def work(function) -> tuple[list[str], int]:
        with FlopCounterMode(display=False) as counter:
            answers = function()
        return [answer.text for answer in answers], counter.get_total_flops()

    together, once = work(lambda: big.answer(pixels, questions, max_new_tokens=3))
    apart, each = work(lambda: [big.answer(pixels, q, max_new_tokens=3)[0] for q in questions])
    assert together == apart
    assert once <= each / 8


def test_the_authors_rule_takes_the_first_character():
    """For comparison with published numbers: --mcq-rule released (ledger F9)."""
    both = benchmarks.Question("1", "v", "Which?", "B", options=("red", "blue"), answer="Both")
    told = replace(both, answer="The answer is B.")
    for question, parsed, released in ((both, False, True), (told, True, False)):
        eval.score(question, "parse")
        assert question.correct == parsed
        eval.score(question, "released")
        assert question.correct == released


def test_likelihood_chooses_among_the_letters_only(world, model, tmp_path):
    """An untrained model writes nonsense, but one of the letters is always the likeliest."""
    questions = evaluate(model, "miniature-mcq", world, tmp_path, mcq_rule="likelihood")
    for question in questions:
        if not question.failure:
            assert question.answer in "ABCD"[: len(question.options)]
    assert len({question.answer for question in questions if not question.failure}) > 1


def test_open_answers_share_words():
    """F1 of the words, beside exact match."""
    assert eval.token_f1("a red square", "red") == pytest.approx(2 / 3)
    assert eval.token_f1("The red", "red.") == 1
    assert eval.token_f1("blue", "red") == eval.token_f1("", "red") == 0


def test_an_unknown_benchmark_is_explained(capsys):
    """The error lists those there are."""
    with pytest.raises(SystemExit) as caught:
        eval.main(["--benchmark", "imagenet"])
    assert caught.value.code != 0
    assert "choose from 'msvd'" in capsys.readouterr().err


def test_a_run_that_would_be_ignored_is_an_error():
    """RUN is for --judge and --report: without them, another run would answer."""
    with pytest.raises(SystemExit, match="to answer questions, use --checkpoint runs/a"):
        eval.main(["runs/a"])


def test_a_run_without_results_is_not_judged(tmp_path):
    """Nothing to judge is an error, as it is for --report."""
    for options in (["--judge", "http://x", "--judge-model", "m"], ["--report", "page.html"]):
        with pytest.raises(SystemExit, match="has no results"):
            eval.main([*options, str(tmp_path)])


def result(folder: Path, **changes) -> Path:
    """A result file with one answered question; `changes` are made to its JSON."""
    question = benchmarks.Question("7", "v", "Who?", "me", answer="me", mixing_weights=(0.5, 0.5))
    path = folder / "eval" / "msvd.json"
    settings = {"benchmark": "msvd", "data": "nowhere", "encoders": ["vivit", "siglip"]}
    eval.write_results(path, settings, [question], "parse")
    stored = json.loads(path.read_text())
    for field, value in changes.items():
        if field in stored:
            stored[field] = value
        else:
            stored["questions"][0][field] = value
    path.write_text(json.dumps(stored))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "has no questions"),
        ({"questions": {}}, "questions is {}"),
        ({"questions": [7]}, "question 1: is not an object"),
        ({"settings": None}, "settings: is not an object"),
        ({"settings": {"benchmark": "msvd", "encoders": []}}, "has no data"),
        ({"rule": ["parse"]}, "rule is"),
        ({"answer": ["me"]}, "question 1: answer is"),
        ({"reply": "me"}, "unknown fields ['reply']"),  # of a version that called it so
        ({"mixing_weights": [0.5]}, "has 1 mixing weights"),
        ({"mixing_weights": [0.5, None]}, "is incomplete"),
        ({"options": ["a", "b"]}, "expects me"),
        ({"cut": [1]}, "is incomplete"),
        ({"correct": "yes"}, "true or false"),
        ({"text": None}, "has no text"),
    ],
)
def test_a_result_that_is_not_one_is_named_with_the_remedy(changes, message, tmp_path):
    """A foreign file in eval/ or one of another version: no traceback from inside the report."""
    path = result(tmp_path, **changes)
    for read in (read_result, lambda path: eval.judge_results(path, None)):
        with pytest.raises(
            DataError, match=r"(?s)msvd\.json.*Fix: delete it and run eval"
        ) as caught:
            read(path)
        assert message in str(caught.value)


def test_any_damaged_value_of_a_result_is_named_or_harmless(tmp_path):
    """Each value is replaced by others: table and report are written, or the error names the file.

    settings.data, a number, once ended in a TypeError in the middle of the report.
    """
    path = result(tmp_path)
    stored = json.loads(path.read_text())
    fields = [(stored, field) for field in stored]
    fields += [(stored["settings"], field) for field in stored["settings"]]
    fields += [(stored["questions"][0], field) for field in stored["questions"][0]]
    refused = 0
    for inside, field in fields:
        original = inside[field]
        for value in (None, True, 7, -1.5, float("nan"), "", "\ud83d\0", [], ["a"], [0.5], {}):
            inside[field] = value
            path.write_text(json.dumps(stored))
            try:
                eval.print_table("msvd", read_result(path)["questions"])
                eval.write_report([str(tmp_path)], tmp_path / "report.html", eval.summarise)
            except DataError as error:
                refused += 1
                assert str(path) in str(error)
        inside[field] = original
    assert refused > len(fields)


def test_two_videos_of_one_name_are_a_failure_that_names_both(world, tmp_path):
    """Like a damaged video it is counted and shown, and the other questions are answered."""
    for name in ("v1.mp4", "v1.mkv"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        shutil.copy(world / "test/videos/clip_000000.mp4", tmp_path / "videos" / name)
    questions = [benchmarks.Question(name, name, "Who?", "me") for name in ("v1", "v1.mp4")]
    clips = eval.Clips(questions, tmp_path, MERVS["miniature"].encoders)
    assert "v1.mp4" in clips[0][2] and "v1.mkv" in clips[0][2]
    assert clips[1][2] == "" and len(clips[1][1]) == 4


def test_a_result_cut_at_any_byte_is_named(tmp_path):
    """A full disk or an interrupted copy: never any other exception, never half the questions."""
    path = result(tmp_path)
    assert read_result(path)["questions"][0].answer == "me"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"msvd\.json"):
            read_result(path)
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", "--report", tmp_path / "report.html", tmp_path],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "msvd.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", "\0\0\0", '{"answers": []}', '{"failure": ""}', '{"answers": {"1": [2]}}',
     '{"answers": {"1": "me"}, "mixing_weights": "all"}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_of_a_journal_is_named(line, tmp_path):
    """The error says which line to delete; the questions of that line are asked again."""
    journal = Journal(tmp_path, {})
    journal.append({"answers": {"1": "me"}, "mixing_weights": [], "failure": ""})
    with journal.file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"(?s)0\.jsonl, line 2.*Fix: delete this line"):
        eval.stored_answers(Journal(tmp_path, {}))


@pytest.mark.parametrize("settings", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_journal_whose_settings_cannot_be_read_is_named(settings, tmp_path):
    """They say which model the answers are from."""
    (tmp_path / "settings.json").write_bytes(settings)
    with pytest.raises(DataError, match=r"settings\.json") as caught:
        Journal(tmp_path, {})
    assert f"delete {tmp_path}" in str(caught.value) or "UTF-8" in str(caught.value)


def test_questions_that_were_added_since_are_asked(world, model, tmp_path):
    """A clip counted as answered if its first question was, so no result was ever written."""
    evaluate(model, "miniature-open", world, tmp_path)
    file = tmp_path / "miniature-open.answers" / "0.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    last = list(records[0]["answers"])[-1]
    del records[0]["answers"][last]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "miniature-open.json").unlink()
    questions = evaluate(model, "miniature-open", world, tmp_path)
    assert questions and last in {question.id for question in questions}


def test_an_accuracy_that_nobody_judged_is_not_zero(capsys, tmp_path):
    """A judge that is down, or never speaks JSON, says nothing about the answers."""
    base = benchmarks.Question("1", "v", "Who?", "me", "who", answer="me")
    questions = [
        replace(base, verdict="unparsable"),
        replace(base, id="2", verdict="no reply"),
        replace(base, id="3", answer="", failure="no such video"),
        replace(base, id="4", kind="what", verdict="yes"),
    ]
    settings = {"benchmark": "msvd", "data": "nowhere", "encoders": []}
    eval.write_results(tmp_path / "eval/msvd.json", settings, questions, "parse")
    stored = json.loads((tmp_path / "eval/msvd.json").read_text())
    assert stored["accuracy"] == {"what": 1.0, "who": None, "all": 0.5}
    eval.print_table("msvd", questions)
    row = next(line for line in capsys.readouterr().out.splitlines() if "who" in line)
    assert row.split() == ["who", "-", "100.0%", "2/3"]
    unjudged = [replace(question, verdict="no reply") for question in questions]
    eval.write_results(tmp_path / "down/eval/msvd.json", settings, unjudged, "parse")
    runs = [str(tmp_path), str(tmp_path / "down")]
    eval.write_report(runs, tmp_path / "report.html", eval.summarise)
    page = (tmp_path / "report.html").read_text()
    assert '<td class="score">–</td>' in page and "<b>–</b>" in page


def test_a_report_survives_half_an_emoji(tmp_path):
    """A surrogate in a stored text cannot be written as UTF-8."""
    result(tmp_path, answer="\ud83d", failure="\ude00")
    eval.write_report([str(tmp_path)], tmp_path / "report.html", eval.summarise)
    assert "\ufffd" in (tmp_path / "report.html").read_text()
