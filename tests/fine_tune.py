"""Follow docs/train.md, "Fine-tune your own in one page", with clips and questions of our own.

    python -m tests.fine_tune RUN     such as runs/miniature-frozen

RUN is a trained miniature, which has never been asked whether anything moves. It is fine-tuned on
new clips with this question, among questions of the kinds that it knows. The code and the five
commands are those on the page; only what belongs to the 7B model is replaced.
Exits with 1 unless the model learns the new kind and keeps the old ones.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from numpy.random import default_rng

from miniature.world import FPS, draw_clip, facts
from support.dataset_writer import write_video

ROOT = Path(__file__).parent.parent
FIRST_SEEDS = {"mydata": 6_000_000, "mytest": 7_000_000}  # no split of the world has these
CLIPS = {"mydata": 1200, "mytest": 300}
OLD_QUESTIONS = 6  # about each clip of mydata
NEW_KIND, NEW_QUESTION = "anything moves", "Does anything move?"
MOVES = ("moves", "orbits", "shakes")  # 7 of the 14 actions, so always saying "yes" scores 50 %
MIN_ACCURACY = 70  # percent, of the new kind
MAX_LOSS = 3  # points that the old kinds may lose

# Words on the page -> words for the miniature.
MINIATURE = {
    "merv": "miniature",  # the model of cost.py plan
    "tokenizer.model": "none",  # the run has its own
    "clip.mp4": "mydata/videos/0.mp4",
    "What happens?": NEW_QUESTION,
}
# It is small, so it takes larger micro-batches and a higher learning rate.
FASTER = "--learning-rate 3e-3 --micro-batch 16 --no-activation-checkpointing"
FASTER += " --held-out none --cache-features mydata/features --no-evaluate"


def write_clips(folder: Path) -> list[list[tuple[str, str, str]]]:
    """Draw the videos of a folder; (kind, question, answer) of all questions about each."""
    (folder / "videos").mkdir(parents=True)
    asked = []
    for number in range(CLIPS[folder.name]):
        scene, frames = draw_clip(FIRST_SEEDS[folder.name] + number)
        write_video(frames, FPS, folder / "videos" / f"{number}.mp4")
        moves = "yes" if scene.action.startswith(MOVES) else "no"
        known = [(fact.kind, fact.question, fact.answer) for fact in facts(scene)]
        asked.append([(NEW_KIND, NEW_QUESTION, moves), *known])
    return asked


def write_training_table(folder: Path) -> None:
    """The list of questions that the page starts from: the new kind among some old ones."""
    rng = default_rng(0)
    asked = write_clips(folder)
    with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "question", "answer"])
        for number, (new, *known) in enumerate(asked):
            old = rng.permutation(len(known))[:OLD_QUESTIONS]
            chosen = [new, *(known[index] for index in old)]
            for index in rng.permutation(len(chosen)):
                table.writerow([f"{number}.mp4", *chosen[index][1:]])


def write_test(folder: Path) -> None:
    """Questions of all kinds about other clips, in the layout of msvd."""
    questions, answers = [], []
    for number, asked in enumerate(write_clips(folder)):
        for place, (kind, question, answer) in enumerate(asked):
            id = f"{number}_{place}"
            questions.append({"question_id": id, "video_name": str(number), "question": question})
            answers.append({"question_id": id, "answer": answer, "type": kind})
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))


def run(words: list[str], place: Path) -> None:
    """Run one of our programs in a folder; its output is shown.

    With one thread, because the processes that decode videos need the other cores.
    """
    print("$ python", shlex.join(words), flush=True)
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    subprocess.run(command, cwd=place, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def accuracies(run_folder: Path) -> tuple[float, float]:
    """Percent right answers to the new kind, and to all old kinds together."""
    result = json.loads((run_folder / "eval" / "msvd.json").read_text())
    right: dict[bool, list[bool]] = {True: [], False: []}
    for question in result["questions"]:
        right[question["kind"] == NEW_KIND].append(question["correct"])
    return tuple(100 * sum(found) / len(found) for found in (right[True], right[False]))


def main(checkpoint: str) -> None:
    """Fine-tune in a temporary folder, and compare the accuracies before and after."""
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    page = page.split("## Fine-tune your own in one page")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    commands = re.search(r"```sh\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    replaced = MINIATURE | {"merv-frozen": str(Path(checkpoint).resolve())}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_training_table(place / "mydata")
        write_test(place / "mytest")
        subprocess.run([sys.executable, "-c", code], cwd=place, check=True)
        for line in commands.splitlines():
            words = [replaced.get(word, word) for word in shlex.split(line, comments=True)]
            words = words[1:]  # without "python"
            if words[0] == "train.py":
                words += shlex.split(FASTER)
            run(words, place)
        score = ["eval.py", "--benchmark", "msvd", "--data", "mytest"]
        run([*score, "--checkpoint", replaced["merv-frozen"], "--output", "before/eval"], place)
        new_before, old_before = accuracies(place / "before")
        new_after, old_after = accuracies(place / "runs" / "mine")
    print(f"the new kind: {new_before:.1f} % before, {new_after:.1f} % after")
    print(f"the old kinds: {old_before:.1f} % before, {old_after:.1f} % after")
    if new_after < MIN_ACCURACY or old_after < old_before - MAX_LOSS:
        sys.exit("The new kind is not learned, or the old ones are lost.")


if __name__ == "__main__":
    main(*sys.argv[1:])
