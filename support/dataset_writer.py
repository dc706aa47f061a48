"""Write a video dataset from known facts, in the formats that data.py and eval.py read.

miniature/world.py draws clips and knows what they show; this file turns that into videos,
conversations, benchmark questions and a tokenizer. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import sentencepiece
from numpy.random import Generator, default_rng

CLIP = "clip_{:06d}"  # the name of clip number n; its file is videos/<name>.mp4


def digest_files(files: Iterable[str | Path], text: str = "") -> str:
    """A hash of the contents of files and of a text."""
    digest = hashlib.sha256(text.encode())
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Fact:
    """A question about a clip, with its answer."""

    kind: str  # the row of a results table that it counts in
    question: str
    answer: str
    choices: tuple[str, ...]  # all answers to questions of this kind


def write_video(frames: np.ndarray, fps: int, file: Path) -> None:
    """Write frames, uint8 (T, 3, H, W), as an H.264 file."""
    with av.open(file, "w", options={"fflags": "+bitexact"}) as container:
        # WHY: mbtree reads uninitialised memory if the picture is very small.
        options = {"crf": "16", "preset": "fast", "mbtree": "0"}
        stream = container.add_stream("libx264", fps, options=options)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv444p"  # WHY: the usual 4:2:0 keeps a quarter of the colours
        stream.codec_context.thread_count = 1  # WHY: the bytes depend on the number of threads
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        pictures = np.ascontiguousarray(frames.transpose(0, 2, 3, 1))  # (T, H, W, 3)
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_tokenizer(texts: list[str], vocab_size: int, file: Path) -> None:
    """Train a SentencePiece model with LLaMA-2's settings on texts."""
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,  # a character that never occurs becomes bytes
            character_coverage=1.0,
            user_defined_symbols=["\n"],  # else "?\n" would become one piece
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,  # errors only
        )


def training_row(number: int, texts: list[str]) -> dict:
    """A row in Video-LLaVA's format about clip `number`; the texts alternate: human, gpt, ..."""
    turns = []
    for index, text in enumerate(texts):
        turns.append({"from": "gpt" if index % 2 else "human", "value": text})
    turns[0]["value"] = "<video>\n" + turns[0]["value"]
    name = CLIP.format(number)
    return {"id": name, "video": f"videos/{name}.mp4", "conversations": turns}


def training_files(captions: list[str], facts: list[list[Fact]], seed: int) -> dict[str, list]:
    """For each clip, a row with its caption (stage1) and two conversations about all its facts
    (stage2), each in a random order of its own.

    WHY two: where one order is all there is, a small LLM learns the answers of a row by heart.
    """
    rng = default_rng(seed)
    stage1, stage2 = [], []
    for number, (caption, known) in enumerate(zip(captions, facts, strict=True)):
        stage1.append(training_row(number, ["Describe the video.", caption]))
        for _ in range(2):
            texts = []
            for index in rng.permutation(len(known)):
                texts += [known[index].question, known[index].answer]
            stage2.append(training_row(number, texts))
    return {"stage1": stage1, "stage2": stage2}


def choose_options(fact: Fact, pairs: tuple[tuple[str, str], ...], rng: Generator) -> list[str]:
    """Three to five options of a multiple-choice question, shuffled; one is the answer.

    A temporal question offers two of `pairs`, each with both of its directions of time, so that
    no option can be ruled out by a single frame.
    """
    if fact.kind == "temporal":
        others = [pair for pair in pairs if fact.answer not in pair]
        (own,) = {*pairs} - {*others}
        (opposite,) = {*own} - {fact.answer}
        wrong = [opposite, *rng.choice(others)]
    else:
        wrong = rng.permutation([choice for choice in fact.choices if choice != fact.answer])
        wrong = wrong[: rng.integers(3, 5)]
    return rng.permutation([fact.answer, *wrong]).tolist()


def evaluation_files(
    facts: list[list[Fact]], pairs: tuple[tuple[str, str], ...], seed: int
) -> dict[str, list]:
    """For each clip one question of each kind, open-ended and as multiple choice (mcq).

    Of several questions of a kind, it asks the one whose answer has been right least often so far,
    so that the answers of a kind are about equally frequent, and none is a good guess. Files that
    end in _q hold the questions, files that end in _a the answers.
    """
    rng = default_rng(seed)
    open_questions, mcq_questions, answers = [], [], []
    asked: Counter[tuple[str, str]] = Counter()
    for number, known in enumerate(facts):
        chosen: dict[str, Fact] = {}
        for index in rng.permutation(len(known)):
            fact = known[index]
            rival = chosen.get(fact.kind, fact)
            if asked[fact.kind, fact.answer] <= asked[fact.kind, rival.answer]:
                chosen[fact.kind] = fact
        for kind, fact in sorted(chosen.items()):
            asked[kind, fact.answer] += 1
            name = CLIP.format(number)
            question_id = f"{name}_{kind.replace(' ', '_')}"
            question = {"question_id": question_id, "video_name": name, "question": fact.question}
            options = choose_options(fact, pairs, rng)
            answer = {
                "question_id": question_id,
                "answer": fact.answer,
                "answer_id": options.index(fact.answer),
                "type": kind,
            }
            open_questions.append(question)
            mcq_questions.append({**question, "options": options})
            answers.append(answer)
    return {"open_q": open_questions, "open_a": answers, "mcq_q": mcq_questions, "mcq_a": answers}
