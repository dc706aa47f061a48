"""Answers and likelihoods of MERV, and the command line of merv.py."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from helpers import decode_everything, talk
from PIL import Image
from tiny_merv import NUM_FRAMES, QUESTIONS, TINY, random_pixels

import merv
from data import TEMPLATES, preprocess, render_prompt, tokenize
from llama import LLAMAS
from merv import FOUR, MERV
from support import cli
from support.conversation import Conversation
from support.errors import UserError
from support.video import load_video, sample_indices

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")

# ------------------------------------------------------------------------------------------ answers


@pytest.fixture
def replies(model, monkeypatch) -> list[list[int]]:
    """The token ids of every answer, in the order in which they were generated."""
    seen, generate = [], model.llm.generate

    def spy(*args, **options):
        found = generate(*args, **options)
        seen.extend(found)
        return found

    monkeypatch.setattr(model.llm, "generate", spy)
    return seen


def test_questions_together_are_answered_as_one_by_one(model, short_clip, replies):
    """FIX F3: token for token, though the questions differ in length and share one cache."""
    together = model.answer(short_clip, QUESTIONS, max_new_tokens=12)
    ids, replies[:] = list(replies), []
    alone = [model.answer(short_clip, question, max_new_tokens=12)[0] for question in QUESTIONS]
    assert replies == ids
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({tuple(i) for i in ids}) > 1  # the question matters


def test_an_answer_is_the_most_likely_token_after_token(model, short_clip, replies):
    """Greedy decoding equals running the whole sequence again for every new token."""
    (answer,) = model.answer(short_clip, "what moves", max_new_tokens=6)
    pixels = {name: frames[None] for name, frames in model.pixels(short_clip).items()}
    turns = render_prompt(talk("what moves"), TEMPLATES["base"])
    ids, _ = tokenize(turns, model.tokenizer)
    new = []
    with torch.no_grad():
        visual, weights = model.encode(pixels)
        for _ in range(6):
            text = model.llm.embed_tokens(torch.tensor([ids + new]))
            embeds = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
            token = int(model.llm(inputs_embeds=embeds)[0, -1].argmax())
            if token == model.tokenizer.eos_id:
                break
            new.append(token)
    assert replies == [new]
    assert answer.text == model.tokenizer.decode(new).strip()
    torch.testing.assert_close(answer.weights, weights[0])


def test_the_same_video_twice_gives_bit_identical_answers(model, short_clip):
    first, second = (model.answer(short_clip, QUESTIONS[:2], max_new_tokens=6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.text == b.text
        assert torch.equal(a.weights, b.weights)


def test_answering_uses_no_global_randomness(model, short_clip):
    """Sampling draws from the generator that is passed in, and from nothing else."""
    state = torch.get_rng_state()

    def sampled(seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        found = model.answer(short_clip, QUESTIONS, 8, temperature=1.0, generator=generator)
        return [a.text for a in found]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_video_is_encoded_once_for_all_its_questions(model, short_clip, encoder_calls):
    """FIX F2: 4 questions, one pass of each encoder."""
    model.answer(short_clip, QUESTIONS, max_new_tokens=2)
    assert encoder_calls == {name: 1 for name in model.encoders}


def test_several_videos_together_are_answered_as_one_by_one(model, replies):
    """Clips, a still and text alone, with 1 to 4 questions each, and one without any question.

    Token for token in float32: each question attends to its own video. A clip with fewer questions
    than another repeats one, and these copies are not returned.
    """
    videos = [random_pixels(1), None, random_pixels(2, still=True), random_pixels(3), None]
    videos.append(random_pixels(4))
    questions = [QUESTIONS, QUESTIONS[:2], QUESTIONS[1:3], QUESTIONS[2], QUESTIONS[3:], []]
    together = model.answer(videos, questions, max_new_tokens=12)
    replies.clear()
    for video, asked, answers in zip(videos, questions, together, strict=True):
        alone = model.answer(video, asked, max_new_tokens=12) if asked else []
        assert [a.text for a in answers] == [a.text for a in alone]
        for a, b in zip(answers, alone, strict=True):
            torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-6)
    assert len({tuple(ids) for ids in replies}) > 4  # the videos and the questions matter


def test_each_encoder_runs_once_for_several_videos(model, encoder_calls):
    model.answer([random_pixels(n) for n in range(5)], [["what", "x"]] * 5, max_new_tokens=2)
    assert encoder_calls == {name: 1 for name in model.encoders}


def test_videos_without_a_list_of_questions_each_are_an_error(model):
    with pytest.raises(UserError, match="There are 2 videos, but questions for 1") as error:
        model.answer([None, None], [["what"]])
    assert "\nFix: " in str(error.value)


def test_one_question_may_be_asked_about_all_videos(model):
    """A string used to count as a list of its letters, each a question about one video."""
    videos = [random_pixels(1), random_pixels(2)]
    together, one_by_one = model.answer(videos, "ab", 4), model.answer(videos, [["ab"], "ab"], 4)
    for (answer,), (expected,) in zip(together, one_by_one, strict=True):
        assert answer.text == expected.text


def test_the_pieces_of_a_streamed_answer_are_its_text(model, short_clip):
    """They arrive while the answer is being generated, and joined they are what is returned."""
    pieces = []
    (answer,) = model.answer(short_clip, "what moves", 40, stream=pieces.append)
    assert answer.text == model.answer(short_clip, "what moves", 40)[0].text
    assert "".join(pieces) == answer.text
    assert len(pieces) > 2
    ((again,),) = model.answer([short_clip], ["what moves"], 40, stream=lambda piece: None)
    assert again.text == answer.text


@pytest.mark.parametrize(
    ("video", "questions"), [(None, ["what", "x"]), ([None, None], [["x"], ["x"]]), (None, [])]
)
def test_only_a_single_question_can_be_streamed(model, video, questions):
    with pytest.raises(UserError, match="a single question"):
        model.answer(video, questions, 4, stream=print)


def test_text_alone_is_answered_without_any_encoder(model, encoder_calls):
    answers = model.answer(None, QUESTIONS[:2], max_new_tokens=4)
    assert encoder_calls.total() == 0
    assert [a.weights.shape for a in answers] == [(0,), (0,)]
    ids, _ = tokenize(render_prompt(talk(QUESTIONS[0]), TEMPLATES["base"]), model.tokenizer)
    (expected,) = model.llm.generate(torch.tensor([ids]), max_new_tokens=4)
    assert answers[0].text == model.tokenizer.decode(expected).strip()


def test_a_placeholder_in_a_question_about_text_is_a_word(model, short_clip):
    """It was removed, as if visual tokens stood for it. With a video it has no place (K4)."""
    question = "what does <video> mean"
    conversation = Conversation(model, {})
    expected = model.prompts(question, visual=False)[0][0].tolist()
    assert "<video>" in model.tokenizer.decode(expected)
    assert conversation.prompt_ids(question) == expected
    (answer,) = model.answer(None, question, max_new_tokens=4)
    assert answer.text == conversation.ask(question, len, max_new_tokens=4)
    assert "<video>" not in model.tokenizer.decode(model.prompts(question)[0][0].tolist())


def test_a_video_can_be_given_as_path_frames_or_pixels(model, short_clip):
    """All three forms of a clip give the same answer."""
    frames = decode_everything(short_clip)[sample_indices(24, NUM_FRAMES)]
    pixels = {e.name: preprocess(frames, e) for e in TINY.encoders}
    found = [
        model.answer(video, QUESTIONS[0], max_new_tokens=6)[0]
        for video in (short_clip, str(short_clip), frames, pixels)
    ]
    assert len({a.text for a in found}) == 1
    for answer in found:
        assert torch.equal(answer.weights, found[0].weights)


def test_a_still_image_can_be_asked_about(model, tmp_path):
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "still.png")
    (answer,) = model.answer(tmp_path / "still.png", "what", max_new_tokens=4)
    frames = load_video(tmp_path / "still.png", 1)
    pixels = {e.name: preprocess(frames, e) for e in TINY.encoders}
    (once,) = model.answer(pixels, "what", max_new_tokens=4)
    torch.testing.assert_close(answer.weights, once.weights, rtol=1e-4, atol=1e-5)
    assert answer.text == once.text


def test_a_conversation_can_be_continued(model, short_clip, replies):
    """Earlier turns come before the question, rendered as in training."""
    conversation = talk("what moves", "the red square", "left or right")
    model.answer(short_clip, [conversation, "left or right"], max_new_tokens=6)
    with_history, without = replies
    prompt = model.prompts([conversation])[0][0].tolist()
    trained, _ = tokenize(render_prompt([*conversation, *talk("", "left")[1:]], TEMPLATES["base"]),
                          model.tokenizer)  # fmt: skip
    assert trained[: 1 + len(prompt)] == [model.tokenizer.bos_id, *prompt]
    assert with_history != without


def test_the_prompt_can_be_the_one_of_other_weights(model, monkeypatch):
    """The authors' models were trained with <video> in the text (K4): the template is a setting."""
    assert model.template == model.config.llm.template == "base"
    monkeypatch.setattr(model, "template", "base_video_tag")
    ids, _ = tokenize(render_prompt(talk("what"), TEMPLATES["base_video_tag"]), model.tokenizer)
    assert "<video>" in model.tokenizer.decode(ids)
    assert [model.tokenizer.bos_id, *model.prompts("what")[0][0].tolist()] == ids


# -------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def test_likelihoods_are_those_of_the_whole_sequence_without_a_cache(model, short_clip):
    """log p(first token of each option | [BOS] + visual + question), each question alone."""
    options = [["red", "left"], ["x", "right", "blue"], ["what", "red"], ["circle"]]
    found = model.likelihoods(short_clip, QUESTIONS, options)
    visual, _ = model.encode(
        {name: frames[None] for name, frames in model.pixels(short_clip).items()}
    )
    for question, choices, log_p in zip(QUESTIONS, options, found, strict=True):
        ids, _ = tokenize(render_prompt(talk(question), TEMPLATES["base"]), model.tokenizer)
        text = model.llm.embed_tokens(torch.tensor([ids]))
        embeds = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
        expected = model.llm(inputs_embeds=embeds)[0, -1].double().log_softmax(-1)
        assert log_p.shape == (len(choices),)
        for choice, value in zip(choices, log_p.tolist(), strict=True):
            first = model.tokenizer.encode(choice)[0]
            assert value == pytest.approx(float(expected[first]), abs=1e-4)


@torch.no_grad()
def test_letters_that_a_tokenizer_spells_are_told_apart(model):
    """Without a token for a letter, all options begin with the token of a space. Their scores were
    equal, so the answer was always A."""
    letters = ["Q", "W", "X"]
    ids = [model.tokenizer.encode(letter) for letter in letters]
    assert len({first for first, _ in ids}) == 1
    (log_p,) = model.likelihoods(None, ["x"], [letters])
    before, _ = tokenize(render_prompt(talk("x"), TEMPLATES["base"], False), model.tokenizer)
    logits = model.llm(torch.tensor([[*before, ids[0][0]]]))[0, -1]
    expected = logits.log_softmax(-1)[[second for _, second in ids]]
    torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-4)
    assert len(set(log_p.tolist())) == 3


def test_a_video_is_encoded_once_for_all_its_likelihoods(model, short_clip, encoder_calls):
    """Scores of several questions together equal those of each alone."""
    options = [["red", "left"]] * 3
    found = model.likelihoods(short_clip, QUESTIONS[:3], options)
    assert encoder_calls == {name: 1 for name in model.encoders}
    for question, log_p in zip(QUESTIONS, found, strict=False):
        (alone,) = model.likelihoods(short_clip, [question], options[:1])
        torch.testing.assert_close(log_p, alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- command line


def test_trace_prints_the_shape_of_every_stage(tmp_path):
    """Shapes in full size beside the miniature's; nothing is downloaded, trained or written."""
    found = run("--trace", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    vocabulary = LLAMAS["miniature"].vocab_size
    for stage in (
        "frames sampled", "languagebind", "dinov2", "vivit", "siglip", "preprocessed", "eq. 1",
        "mixing weights (b, e), eq. 2", "visual tokens", "[BOS] + visual", "logits",
    ):  # fmt: skip
        assert stage in found.stdout, stage
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    for stage, full_size, miniature in (
        ("vivit features", "(1, 16, 14, 14, 768)", "(1, 4, 4, 4, 96)"),
        ("vivit pooled", "(1, 16, 8, 8, 768)", "(1, 4, 3, 3, 96)"),
        ("visual tokens (b, n, d), eq. 2", "(1, 1024, 4096)", "(1, 36, 256)"),
        ("LLaMA -> logits", "(1, 1025, 32000)", f"(1, 37, {vocabulary})"),
    ):
        (line,) = [line for line in lines if line.startswith(stage)]
        assert line.endswith(f"{full_size} {miniature}")
    assert found.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    """Eight processes that each hold a 7B model do not fit on the first GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.pick_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli.pick_device("auto") == cli.pick_device("cuda") == torch.device("cuda:3")
    assert cli.pick_device("cpu") == torch.device("cpu")


def test_a_question_on_the_command_line_is_answered(model, saved, short_clip, capsys):
    merv.main([str(short_clip), *QUESTIONS[:2], "--checkpoint", str(saved), "--max-new-tokens", "5",
               "--device", "cpu"])  # fmt: skip
    output = capsys.readouterr().out
    for question, answer in zip(
        QUESTIONS, model.answer(short_clip, QUESTIONS[:2], max_new_tokens=5), strict=False
    ):
        assert f"Q: {question}\nA: {answer.text}\n" in output
    mix = output.splitlines()[-1]
    assert [part for part in FOUR if part in mix] == list(FOUR)


def test_a_sampled_answer_is_reproduced_by_its_seed(saved, short_clip):
    """Sampling depends on temperature and generator only; temperature 0 is greedy."""
    model = MERV.from_pretrained(saved)

    def drawn(seed: int, temperature: float = 1.0) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        answers = model.answer(short_clip, QUESTIONS, 8, temperature, generator=generator)
        return [answer.text for answer in answers]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, 0.0) == drawn(2, 0.0)


@pytest.mark.parametrize("wrong", ["video", "checkpoint"])
def test_a_wrong_name_on_the_command_line_is_explained(saved, short_clip, tmp_path, wrong):
    """The message says what is wrong, why, and how to fix it, without a traceback."""
    video = "missing.mp4" if wrong == "video" else str(short_clip)
    checkpoint = str(tmp_path / "no" / "run") if wrong == "checkpoint" else str(saved)
    found = run(video, "what", "--checkpoint", checkpoint, cwd=tmp_path)
    assert found.returncode != 0
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    what, why, fix = found.stderr.strip().split("\n")[-3:]
    assert what.startswith("error: ")
    assert {"video": "missing.mp4", "checkpoint": "no/run"}[wrong] in what
    assert why.startswith("Why: ")
    assert fix.startswith("Fix: ")


def test_a_hub_id_out_of_reach_is_explained(short_clip):
    with pytest.raises(SystemExit) as caught:
        merv.main([str(short_clip), "what", "--checkpoint", "nobody/nothing"])
    assert "nobody/nothing" in str(caught.value.code)
    assert "Fix: " in str(caught.value.code)


def test_without_any_run_the_command_line_says_how_to_train_one(short_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        merv.main([str(short_clip), "what"])
    assert "torchrun train.py" in str(caught.value.code)


@pytest.mark.parametrize(("side", "warns"), [(64, True), (32, False)])
def test_the_miniature_warns_of_videos_that_are_not_drawn(
    model, short_clip, tmp_path, capsys, side, warns
):
    """Drawn clips are 32x32 pixels. It answers with or without the warning."""
    small = MERV(
        replace(model.config, name="miniature"),
        list(model.encoders.values()),
        model.llm,
        model.tokenizer,
    )
    small.save_pretrained(tmp_path / "model")
    Image.effect_noise((side, side), 60).convert("RGB").save(tmp_path / "still.png")
    merv.main([str(tmp_path / "still.png"), "what", "--checkpoint", str(tmp_path / "model"),
               "--max-new-tokens", "2", "--device", "cpu"])  # fmt: skip
    output = capsys.readouterr()
    assert "Q: what\nA: " in output.out
    assert ("knows only the drawn world" in output.err) == warns
    assert ("--checkpoint merv-frozen" in output.err) == warns


def test_any_text_can_be_asked_and_shown(saved, short_clip, tmp_path):
    """Bytes that are no text, and letters that the terminal does not have, ended in tracebacks."""
    command = [
        sys.executable,
        str(REPOSITORY / "merv.py"),
        str(short_clip),
        b"\xff what",
        "Was? 你好",
    ]
    command += ["--checkpoint", str(saved), "--max-new-tokens", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"Q: ? what\n" in done.stdout and b"Q: Was? ??\n" in done.stdout


def test_a_reader_that_leaves_is_no_error(saved, short_clip):
    """As `| head -1` does."""
    command = [sys.executable, str(REPOSITORY / "merv.py"), str(short_clip), "what"]
    command += ["--checkpoint", str(saved), "--max-new-tokens", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(120), process.stderr.read()) == (1, b"")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python merv.py ...` in a process of its own, without downloads."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "merv.py"), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
