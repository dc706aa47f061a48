"""A conversation about a video: turns that share one KV cache, and the command that reads them.

    $ python merv.py clip.mp4
    > What happens?
    A red square moves left.
    > /video other.mp4

In a pipe there is no prompt, and standard output holds the answers alone, a line for each question:

    $ echo "What happens?" | python merv.py clip.mp4
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from support.errors import UserError

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  input() then edits lines and remembers them

HELP = """Ask a question, or type one of
  /video PATH   look at another video; this starts a new conversation
  /text         start a new conversation without a video
  /help         show this text
Ctrl-C stops an answer, Ctrl-D leaves."""


class TextStream:
    """Turns the ids of one answer into text, and passes on each piece as soon as it is final.

    A character may consist of several tokens, one for each byte, so an incomplete one waits. White
    space waits too, because an answer does not end with it.
    """

    def __init__(self, tokenizer, write: Callable[[str], object]):
        self.tokenizer = tokenizer
        self.write = write
        self.ids: list[int] = []
        self.written = ""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.tokenizer.decode(self.ids).strip()

    def add(self, next_ids: list[int]) -> None:
        """Take the next id, the only item of `next_ids`; </s> adds nothing."""
        if next_ids[0] != self.tokenizer.eos_id:
            self.ids.extend(next_ids)
            self.write_up_to(self.text.rstrip("\ufffd").rstrip())  # incomplete bytes decode to this

    def close(self) -> None:
        """Write what is left at the end of the answer."""
        self.write_up_to(self.text)

    def write_up_to(self, text: str) -> None:
        if len(text) > len(self.written):
            self.write(text[len(self.written) :])
            self.written = text


class Conversation:
    """A video, or text alone, and the turns so far. Each token passes through the LLM once.

        turn 1   cache   [BOS] v v v  In : ... Out :  A cat        pending  </s>
        turn 2   runs    </s> In : ... Out :                       the cache holds the rest

    model: a MERV; pixels: as in MERV.prefill.
    """

    def __init__(self, model, pixels: dict):
        self.model = model
        self.turns: list[dict] = []
        self.visual = bool(pixels)
        num_visual = model.config.num_visual if pixels else 0
        self.length = model.config.llm.max_positions
        self.cache, self.mixing_weights = model.prefill(pixels, self.length - 1 - num_visual)
        self.pending: list[int] = []  # ids of earlier turns that are not in the cache

    def prompt_ids(self, question: str) -> list[int]:
        """The ids of the next human turn alone."""
        before = 0
        if self.turns:
            before = int(self.model.prompts([self.turns], self.visual)[1])
        turns = [*self.turns, {"from": "human", "value": question}]
        return self.model.prompts([turns], self.visual)[0][0].tolist()[before:]

    def ask(self, question: str, write: Callable[[str], object], max_new_tokens: int = 256) -> str:
        """Answer the next question, and call `write` with each piece of the answer.

        After a KeyboardInterrupt the part that was answered stays as this turn. Raises UserError if
        the conversation gets longer than the LLM can read; it stays as it was.
        """
        ids = self.pending + self.prompt_ids(question)
        start = int(self.cache.lengths[0])
        room = self.length - start - len(ids)
        if room < 1:
            what = f"This conversation is longer than {self.length} tokens."
            why = f"{self.model.config.llm.name} reads no more than that."
            raise UserError(what, why, "start a new one with /video PATH or /text.")
        answer = TextStream(self.model.tokenizer, write)
        eos_id = self.model.tokenizer.eos_id
        prompt = torch.tensor([ids], device=self.model.device)
        try:
            self.model.llm.generate(
                prompt, max_new_tokens=min(max_new_tokens, room), eos_id=eos_id, cache=self.cache,
                on_ids=answer.add,
            )  # fmt: skip
            answer.close()
        except BaseException:
            # Ctrl-C may come in the middle of a layer, so the next turn runs this one again.
            self.cache.cut(start)
            raise
        finally:
            in_cache = int(self.cache.lengths[0]) - start
            self.pending = [*ids, *answer.ids, eos_id][in_cache:]
            self.turns.append({"from": "human", "value": question})
            self.turns.append({"from": "gpt", "value": answer.text})
        return answer.text


def converse(model, pixels: dict, load: Callable[[str], dict], max_new_tokens: int) -> int:
    """Read questions from standard input and print their answers until it ends.

    pixels: of the first video, {} for text alone; load: maps a path to the pixels of another one.
    Returns the exit status: 1 if a line in a pipe was an error, else 0.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # continue even if bytes are not text
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(HELP)
    conversation = Conversation(model, pixels)
    status = 0
    for line in read_lines(terminal):
        try:
            conversation = respond(conversation, line, load, max_new_tokens)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 0 if terminal else 1
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(" (stopped)")
    return status


def read_lines(terminal: bool) -> Iterator[str]:
    """The lines of standard input that are not empty; a terminal is asked for each with "> "."""
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:  # Ctrl-D, or the end of a pipe
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line:
            yield line


def respond(conversation: Conversation, line: str, load, max_new_tokens: int) -> Conversation:
    """Answer a question or follow a command. Returns the conversation to continue."""
    model = conversation.model
    command, _, argument = line.partition(" ")
    argument = argument.strip().strip("\"'")
    if command == "/video":
        if not argument:
            fix = "write it after the command, as in /video b.mp4."
            raise UserError("/video needs the path of a video.", "it looks at another one.", fix)
        return Conversation(model, load(os.path.expanduser(argument)))
    if command == "/text":
        return Conversation(model, {})
    if command == "/help":
        print(HELP)
    elif command.startswith("/"):
        what = f"There is no command {line}."
        raise UserError(what, "a line that begins with / is a command.", HELP)
    else:
        conversation.ask(line, partial(print, end="", flush=True), max_new_tokens)
        print(flush=True)
    return conversation
