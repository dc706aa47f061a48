"""Write tests/legacy/: a complete run, and one stopped half-way, as commit 07e06b2 leaves them.

    git worktree add /tmp/old 07e06b2 && cd /tmp/old && python .../make_legacy.py OUTPUT

The model is the miniature's with narrower layers, so that the files stay small.
"""

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, ".")
import encoders
import eval as evaluation
import llama
import merv
import train
from miniature import world

out = Path(sys.argv[1])
shutil.rmtree(out, ignore_errors=True)
data = out / "data"
data.mkdir(parents=True)
rng = np.random.default_rng(0)
rows, questions, answers = [], [], []
colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
(data / "videos").mkdir()
for number in range(8):
    name = list(colours)[number % 3]
    picture = np.full((32, 32, 3), colours[name]) + rng.integers(0, 30, (32, 32, 1))
    Image.fromarray(picture.astype(np.uint8)).save(data / "videos" / f"{number}.png")
    said = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": name}]
    rows.append({"id": str(number), "image": f"videos/{number}.png", "conversations": said})
    questions.append({"question_id": str(number), "video_name": str(number), "question": "What colour is it?"})
    answers.append({"question_id": str(number), "answer": name})
(data / "stage2.json").write_text(json.dumps(rows, indent=1))
(data / "test_q.json").write_text(json.dumps(questions))
(data / "test_a.json").write_text(json.dumps(answers))
import sentencepiece
texts = [turn["value"] for row in rows for turn in row["conversations"]]
with (data / "tokenizer.model").open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts * 20), model_writer=file, vocab_size=300,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2)

small = tuple(replace(e, hidden_size=8, num_heads=2) for e in merv.MERVS["miniature"].encoders)
llm = replace(llama.LLAMAS["miniature"], hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=2, vocab_size=300)
merv.MERVS["miniature"] = train.MERVS["miniature"] = replace(merv.MERVS["miniature"], encoders=small, llm=llm)
train.MINIATURE = out
for e in small:
    encoder = encoders.FAMILIES[e.family](replace(e, source=""))
    encoders.initialise(encoder, torch.Generator().manual_seed(1))
    encoders.save_encoder(encoder, out / "encoders-0" / (e.name.removeprefix("miniature-") + ".safetensors"))

def run(name, **more):
    config = train.TrainConfig(data=str(data), tokenizer=str(data / "tokenizer.model"), name=name, workers=0, cache_features="none",
        global_batch=4, epochs=2, device="cpu", evaluate=False, **more)
    return train.train(train.settle(config))

if sys.argv[2] == "complete":
    done = run("legacy-complete")
    model = merv.MERV.from_pretrained(done.folder)
    evaluation.evaluate(model, "msvd", data, done.folder / "eval")
    replies = model.answer(data / "videos" / "0.png", ["What colour is it?"], 8)
    pixels = model.pixels(data / "videos" / "0.png")
    tokens, mixing = model.encode({k: v[None] for k, v in pixels.items()})
    (done.folder / "answer.json").write_text(json.dumps({"text": replies[0].text, "weights": replies[0].weights.tolist(),
        "visual_tokens_mean": tokens.mean().item(), "visual_tokens_std": tokens.std().item(), "question": "What colour is it?", "video": "0.png"}))
else:  # straight to the end, with a save after step 2: then drop what came after
    done = run("legacy-stopped", save_every=2, keep=0)
train.leave()
