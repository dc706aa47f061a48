"""Conversations: turns that share a KV cache, streamed text, `merv.py` in a terminal and a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny_merv import random_pixels

from llama import Llama
from support.conversation import Conversation, TextStream
from support.errors import UserError

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture(autouse=True)
def ctrl_c_works():
    """Shells let background commands, and so their children, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


TURNS = ["what moves", "the red square", "left or right"]


# ---------------------------------------------------------------------------------------- the turns


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """The number of tokens in each call of the LLM."""
    seen = []
    plain = Llama.hidden_states

    def spy(self, input_ids=None, inputs_embeds=None, *others, **more):
        x = input_ids if inputs_embeds is None else inputs_embeds
        seen.append(x.shape[1])
        return plain(self, input_ids, inputs_embeds, *others, **more)

    monkeypatch.setattr(Llama, "hidden_states", spy)
    return seen


@pytest.mark.parametrize("has_video", [True, False])
def test_each_turn_is_answered_as_if_the_whole_conversation_were_read_again(model, has_video):
    """The prompts are those of training: an answer ends with </s>, then the next question comes."""
    pixels = random_pixels(1) if has_video else {}
    conversation = Conversation(model, pixels)
    ids: list[int] = []
    for question in TURNS:
        text = conversation.ask(question, ignore, max_new_tokens=6)
        ids += model.prompts(question)[0][0].tolist()
        expected = greedy_ids(model, pixels, ids, 6)
        assert text == model.tokenizer.decode(expected).strip()
        ids += [*expected, model.tokenizer.eos_id]
    assert len({turn["value"] for turn in conversation.turns}) > len(TURNS) + 1


def ignore(piece: str) -> None:
    """A `write` that drops the text."""


@torch.no_grad()
def greedy_ids(model, pixels: dict, ids: list[int], count: int) -> list[int]:
    """Answer by definition: run [BOS] + visual tokens + all turns again for each new token."""
    bos, text = model.llm.embed_tokens(torch.tensor([[1]])), model.llm.embed_tokens
    parts = [bos]
    if pixels:
        parts.append(model.encode({name: clip[None] for name, clip in pixels.items()})[0])
    new: list[int] = []
    for _ in range(count):
        embeds = torch.cat([*parts, text(torch.tensor([ids + new]))], dim=1)
        token = int(model.llm(inputs_embeds=embeds)[0, -1].argmax())
        if token == model.tokenizer.eos_id:
            break
        new.append(token)
    return new


def test_a_further_turn_runs_only_its_own_tokens(model, tokens_read):
    """No encoder, no visual token and no earlier turn: </s>, the last id, and the new question."""
    conversation = Conversation(model, random_pixels(1))
    conversation.ask(TURNS[0], ignore, max_new_tokens=6)
    tokens_read.clear()
    conversation.ask(TURNS[1], ignore, max_new_tokens=6)
    own = model.prompts(TURNS[1])[0].shape[1]
    assert tokens_read[0] <= own + 2
    assert set(tokens_read[1:]) <= {1}


def test_after_ctrl_c_the_conversation_goes_on_with_the_part_that_was_answered(model):
    """The interrupt comes after three tokens; what follows is as if the answer had ended there."""
    pixels = random_pixels(1)
    conversation = Conversation(model, pixels)
    conversation.ask(TURNS[0], ignore, max_new_tokens=6)
    turns = conversation.cache.lengths.item()

    generated = []
    plain = TextStream.add

    def interrupt(stream: TextStream, next_ids: list[int]) -> None:
        plain(stream, next_ids)
        generated.extend(next_ids)
        if len(generated) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStream, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask(TURNS[1], ignore, max_new_tokens=9)
    assert model.tokenizer.eos_id not in generated, "the answer should be longer"
    assert conversation.cache.lengths.item() == turns

    first = model.prompts(TURNS[0])[0][0].tolist()
    eos = model.tokenizer.eos_id
    ids = [*first, *greedy_ids(model, pixels, first, 6), eos]
    ids += [*model.prompts(TURNS[1])[0][0].tolist(), *generated, eos]
    ids += model.prompts(TURNS[2])[0][0].tolist()
    text = conversation.ask(TURNS[2], ignore, max_new_tokens=6)
    assert text == model.tokenizer.decode(greedy_ids(model, pixels, ids, 6)).strip()


def test_a_conversation_that_is_too_long_is_an_error_that_leaves_it_as_it_was(model):
    """The last answer before that fills the context and no more."""
    conversation = Conversation(model, random_pixels(1))
    with pytest.raises(UserError, match=r"longer than 256 tokens(?s:.*)/video PATH"):
        for _ in range(60):
            turns, pending = len(conversation.turns), list(conversation.pending)
            conversation.ask("what moves left", ignore, max_new_tokens=20)
    assert turns > 4
    assert (len(conversation.turns), conversation.pending) == (turns, pending)
    assert int(conversation.cache.lengths) <= 256


# ------------------------------------------------------------------------------------ streamed text


@pytest.mark.parametrize(
    "text", ["a red square", "caf\u00e9 \u4e2d\u6587", "\U0001f600 ok", "two\nlines"]
)
def test_streamed_pieces_are_final(tokenizer, text):
    """No piece is taken back, no character is cut into bytes, no white space is at the ends."""
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for id in [*tokenizer.encode(text + "  "), tokenizer.eos_id]:
        stream.add([id])
    stream.close()
    assert "".join(pieces) == stream.text == tokenizer.decode(tokenizer.encode(text)).strip()
    assert "\ufffd" not in "".join(pieces)


def test_an_answer_that_ends_inside_a_character_is_still_complete(tokenizer):
    """max_new_tokens may cut an emoji in two: what is left of it is shown at the end."""
    ids = tokenizer.encode("a\U0001f600")[:-1]
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for id in ids:
        stream.add([id])
    assert "".join(pieces) == "a"
    stream.close()
    assert "".join(pieces) == tokenizer.decode(ids).strip() != "a"


# ---------------------------------------------------------------------------------------- in a pipe

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def test_a_pipe_gets_the_answer_and_nothing_else(model, saved, short_clip):
    """The last line need not end with a line break."""
    found = pipe(b"what moves", saved, str(short_clip))
    (answer,) = model.answer(short_clip, "what moves", max_new_tokens=5)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout.decode() == answer.text + "\n"


def pipe(text: bytes, saved: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `printf TEXT | python merv.py ...`."""
    command = [sys.executable, str(REPOSITORY / "merv.py"), *arguments, "--checkpoint", str(saved)]
    return subprocess.run(
        [*command, "--max-new-tokens", "5", "--device", "cpu"],
        input=text, env=ENVIRONMENT, capture_output=True, timeout=120,
    )  # fmt: skip


def test_each_line_of_a_pipe_is_a_turn_or_a_command(model, saved, short_clip):
    """Empty lines are skipped; /text leaves the video and the earlier turns behind."""
    found = pipe(b"what moves\n\n  \nx\n/text\nwhat moves\n", saved, str(short_clip))
    conversation = Conversation(model, model.pixels(short_clip))
    answers = [conversation.ask(question, ignore, 5) for question in ("what moves", "x")]
    answers.append(model.answer(None, "what moves", max_new_tokens=5)[0].text)
    assert found.returncode == 0
    assert found.stdout.decode() == "".join(f"{answer}\n" for answer in answers)


def test_without_a_video_the_conversation_is_about_text(model, saved, short_clip):
    """/video PATH brings one in, quotes or not."""
    found = pipe(f'what\n/video "{short_clip}"\nwhat\n'.encode(), saved)
    answers = [model.answer(video, "what", 5)[0].text for video in (None, short_clip)]
    assert found.returncode == 0
    assert found.stdout.decode() == "".join(f"{answer}\n" for answer in answers)


def test_an_error_in_a_pipe_is_told_and_the_next_line_is_answered(model, saved):
    """At the end, the exit status says that there were errors."""
    long = b"/video " + 300 * b"a" + b".mp4\n/video ~nobody-here/a.mp4\n"
    found = pipe(long + b"/video missing.mp4\n/video\n/nope\nwhat\n", saved)
    assert found.returncode == 1
    assert found.stderr.count(b"error: ") == found.stderr.count(b"Fix: ") == 5
    assert b"missing.mp4" in found.stderr
    assert found.stderr.count(b"There is no command") == 1  # /video is one
    assert b"Traceback" not in found.stderr
    assert found.stdout.decode() == model.answer(None, "what", 5)[0].text + "\n"


def test_bytes_that_are_no_text_are_a_question_like_any_other(saved):
    found = pipe(b"\xff\xfe/\n", saved)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout


def test_an_empty_pipe_is_a_conversation_without_questions(saved):
    found = pipe(b"", saved)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


# ------------------------------------------------------------------------------------ in a terminal


class Terminal:
    """`merv.py` in a pseudo-terminal, as a person sees it."""

    def __init__(self, *arguments: str):
        self.process, self.screen = pty.fork()
        if self.process == 0:
            program = [sys.executable, str(REPOSITORY / "merv.py"), *arguments]
            os.execve(sys.executable, program, ENVIRONMENT)
        self.shown = ""

    def read_until(self, wanted: str) -> str:
        """Everything that is shown until `wanted`, a regular expression, appears."""
        end = time.monotonic() + 60
        while not (match := re.search(wanted, self.shown)):
            assert time.monotonic() < end, f"no {wanted!r} in {self.shown!r}"
            if select.select([self.screen], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.screen, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(wanted, self.shown), self.shown
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def wait(self) -> int:
        """The exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal(saved, short_clip):
    """A conversation about a clip, with answers of at most 5 tokens, at its first prompt."""
    program = Terminal(
        str(short_clip), "--checkpoint", str(saved), "--device", "cpu", "--max-new-tokens", "5"
    )
    program.read_until(r"Ctrl-D leaves\.\r\n> ")
    yield program
    os.close(program.screen)


def test_a_person_asks_changes_the_video_and_leaves(terminal, model, short_clip):
    """Two turns, an error that does not end the conversation, /text, and Ctrl-D."""
    conversation = Conversation(model, model.pixels(short_clip))
    for question in ("what moves", "x"):
        terminal.type(question + "\n")
        shown = terminal.read_until(r"\r\n[^\r\n]*\r\n> ")
        assert shown.split("\r\n")[1] == conversation.ask(question, ignore, 5)
    terminal.type("/video missing.mp4\n")
    assert "Fix: " in terminal.read_until(r"error: (?s:.*)\r\n> ")
    terminal.type("/text\n")
    terminal.read_until("> ")
    terminal.type("what\n")
    shown = terminal.read_until(r"\r\n[^\r\n]*\r\n> ")
    assert shown.split("\r\n")[1] == model.answer(None, "what", 5)[0].text
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_at_the_prompt_only_clears_the_line(terminal):
    """Its terminal sends SIGINT, as any terminal does."""
    terminal.type("half a quest")
    terminal.read_until("quest")
    time.sleep(0.3)  # Python misses a signal that arrives before it waits for the next key
    terminal.type("\x03")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_an_answer_and_the_next_question_is_answered(saved, tmp_path):
    """The answer is made slow, so that the interrupt comes in the middle of it."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import merv\n"
        "from support.conversation import TextStream\n"
        "plain = TextStream.add\n"
        "def add(self, ids):\n"
        "    plain(self, ids)\n"
        "    print('#', end='', flush=True)\n"
        "    time.sleep(0.1)\n"
        "TextStream.add = add\n"
        f"merv.main(['--checkpoint', {str(saved)!r}, '--device', 'cpu'])\n"
    )
    process, screen = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, str(slow)], ENVIRONMENT)
    program = Terminal.__new__(Terminal)
    program.process, program.screen, program.shown = process, screen, ""
    for _ in range(2):
        program.read_until("> ")
        program.type("what moves\n")
        program.read_until("#(?s:.*)#")
        program.type("\x03")
        shown = program.read_until(r"\(stopped\)\r\n")
        assert shown.count("#") < 100, "the answer ran to its end"
    program.read_until("> ")
    program.type("\x04")
    assert program.wait() == 0
    os.close(screen)


def test_ctrl_c_ends_a_pipe(saved):
    """Nobody is there to ask the next question; 130 is what a shell reports."""
    command = [sys.executable, str(REPOSITORY / "merv.py"), "--checkpoint", str(saved)]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--max-new-tokens", "3"], env=ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdin.write(b"what\n")
        process.stdin.flush()
        process.stdout.readline()  # it is ready, and waits for the next line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
