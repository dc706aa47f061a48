"""eval.py: what counts as a right answer, and what happens to videos that cannot be read."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import eval
from data import VideoError
from encoders import UserError
from llama import LLAMAS
from merv import MERV, MERVS
from miniature.world import World, write_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three test clips with questions; the second is damaged, the third is gone."""
    folder = tmp_path_factory.mktemp("world")
    write_world(
        World(train_clips=4, train_images=1, train_texts=1, val_clips=1, test_clips=3), folder
    )
    (folder / "test/videos/clip_000001.mp4").write_bytes(b"no video")
    (folder / "test/videos/clip_000002.mp4").unlink()
    return folder


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
    ],
)
def test_the_letter_of_a_reply_is_found(reply, letter):
    """Ledger F9: the first character alone would call "Both" B and "The answer is B." wrong."""
    assert eval.parse_letter(reply, ("red", "blue", "green", "white")) == letter


def test_an_option_that_begins_with_an_article_is_recognised():
    """ "A cat" is option B if that is what B says, although it begins with the letter A."""
    assert eval.parse_letter("A cat", ("a dog", "a cat")) == "B"


def test_words_are_compared_without_case_punctuation_and_articles():
    """Exact match is on the words."""
    assert eval.normalise("A red  Square.") == eval.normalise("the RED square") == "red square"
    assert eval.normalise("no") != eval.normalise("know")


def test_videos_that_cannot_be_read_are_failed_answers(world, model):
    """One damaged and one missing clip: the rest is answered, the failures are counted as wrong."""
    benchmark = eval.BENCHMARKS["miniature-open"]
    questions = eval.evaluate(model, benchmark, world / "test", max_new_tokens=4, workers=0)
    by_video = {v: [q for q in questions if q.video == v] for v in {q.video for q in questions}}
    assert all(not q.failure and len(q.weights) == 4 for q in by_video["clip_000000"])
    assert all("cannot be decoded" in q.failure for q in by_video["clip_000001"])
    assert all("no such video" in q.failure for q in by_video["clip_000002"])
    accuracy, answered, expected = eval.summarise(questions)["all"]
    assert answered == len(by_video["clip_000000"]) and expected == len(questions)
    assert accuracy == sum(q.correct for q in questions) / len(questions)


def test_accuracy_counts_by_kind():
    """Two kinds, one of them with a failure: a failure is a wrong answer."""
    base = eval.Question("1", "v", "What colour?", "red", "colour", answer="Red.")
    questions = [
        base,
        replace(base, answer="blue"),
        replace(base, kind="shape", answer="red"),
        replace(base, kind="shape", answer="", failure="no such video"),
    ]
    for question in questions:
        question.correct = not question.failure and eval.is_correct(question)
    assert eval.summarise(questions) == {
        "colour": (0.5, 2, 2),
        "shape": (0.5, 1, 2),
        "all": (0.5, 3, 4),
    }


def test_multiple_choice_is_asked_with_its_options_and_judged_by_the_letter(world):
    """The expected answer is the letter of answer_id, and the prompt shows every option."""
    for question in eval.load_questions(eval.BENCHMARKS["miniature-mcq"], world / "test"):
        assert question.options[ord(question.expected) - ord("A")] in question.text
        assert all(option in question.text for option in question.options)
        assert "nothing else." in question.text


def test_all_kinds_are_asked(world):
    """Each clip is asked every kind of question that it allows."""
    kinds = {q.kind for q in eval.load_questions(eval.BENCHMARKS["miniature-open"], world / "test")}
    assert kinds >= {"colour", "shape", "what happens", "how many"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
def test_a_video_name_cannot_leave_the_folder(world, name):
    """Question files are data: a path in one must not open files elsewhere."""
    with pytest.raises(VideoError, match="is no name of a video"):
        eval.find_video(world / "test", name)


def test_videos_are_found_by_stem_whatever_the_extension(tmp_path):
    """A stem with special characters means itself; a longer stem is another video."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.webm", "ab.mp4", "v[1].gif", "v1.gif"):
        (videos / name).touch()
    (videos / "frames").mkdir()
    assert eval.find_video(tmp_path, "a").name == "a.webm"
    assert eval.find_video(tmp_path, "v[1]").name == "v[1].gif"
    assert eval.find_video(tmp_path, "frames").name == "frames"
    with pytest.raises(VideoError):
        eval.find_video(tmp_path, "b")


def test_a_broken_question_file_is_explained(tmp_path):
    """Missing files, broken JSON and answers that lack a question are one kind of clear error."""
    benchmark = eval.BENCHMARKS["miniature-open"]
    with pytest.raises(UserError, match="Cannot read the benchmark"):
        eval.load_questions(benchmark, tmp_path)
    (tmp_path / "open_q.json").write_text(
        '[{"question_id": 1, "video_name": "v", "question": "Who?"}]'
    )
    (tmp_path / "open_a.json").write_text("[]")
    with pytest.raises(UserError, match="KeyError"):
        eval.load_questions(benchmark, tmp_path)


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


def test_an_unknown_benchmark_is_explained():
    """The error lists those there are."""
    command = [sys.executable, ROOT / "eval.py", "--benchmark", "imagenet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "choose of msvd" in done.stderr
