"""What tests/fuzz.py works with: good files of every kind, ways to damage them, and their readers.

Good files are written as KIND/UNIT/FILE. A unit is what belongs together, such as a checkpoint.
"""

from __future__ import annotations

import builtins
import csv
import io
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import eval
import train
from data import TEMPLATES, ConversationDataset, load_pixels
from encoders import ENCODERS, load_encoder, save_encoder
from llama import LLAMAS, Tokenizer, load_llama
from merv import FOUR, MERV, MERVS
from support import report, runs, weights
from support.benchmarks import load_questions
from support.errors import DataError, UserError
from support.features import FeatureCache
from support.files import Journal
from support.judge import read_reply
from support.released import AUTHORS_ENCODERS, LLAMA_HF_SETTINGS
from tests.foreign_files import TINY_LLAMA, llama_of_meta, write_checkpoint
from tests.helpers import SMALL, numbered_frames, talk, train_tokenizer, write_video

CASES = Path(__file__).parent / "cases"
MARKER = "code-ran"  # the folder that code in a pickle makes

# --------------------------------------------------------------------------------------- damage

EXTREMES = [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\1\0\0"]


def damage_bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one of the ways that disks, networks and strangers do.

    other: the bytes of another good file.
    """
    data = bytearray(content)
    begin, end = sorted(rng.choices(range(len(data) + 1), k=2))
    if rng.random() < 0.3:  # in the header, where sizes and types stand
        begin, end = min(begin, rng.randrange(64)), min(end, 512)
    how = rng.choice(["flip", "flip", "flip", "extreme", "cut", "drop", "repeat", "splice", "zero"])
    if how == "flip":
        for _ in range(rng.choice([1, 2, 8, 64])):
            if begin < end:
                data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    elif how == "extreme":
        number = rng.choice(EXTREMES) * rng.choice([1, 2])
        data[begin : begin + len(number)] = number
    elif how == "cut":
        del data[begin:]
    elif how == "drop":
        del data[begin:end]
    elif how == "repeat":
        times = min(rng.choice([2, 100, 10_000]), 1_000_000 // (end - begin + 1))
        data[begin:begin] = data[begin:end] * times
    elif how == "splice":  # the beginning of one file, the rest of another
        data[begin:] = other[rng.randrange(len(other) + 1) :]
    else:
        data[begin:end] = bytes(end - begin)
    return bytes(data)


NASTY = (
    None, True, False, 0, -1, 1, 3, 0.5, 10**9, 2**63, 10**400, 1e308, -1e-300, math.nan, math.inf,
    "", " ", "7", "nan", "-", "\ud83d", "\0", "../x", "/etc/passwd", "<script>", "A\u2028B",
    "x" * 200_000, [], {}, [[]], [1, "a"], [None] * 30, {"a": 1}, {"": {}},
)  # fmt: skip


def damage_values(value: object, rng: random.Random) -> object:
    """Damage a JSON value: somewhere in it, another type, number or text; or a field is lost."""
    root = [value]
    spots = []
    containers = [root]
    while containers:
        container = containers.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            spots.append((container, key))
            if isinstance(container[key], dict | list):
                containers.append(container[key])
    for container, key in rng.choices(spots, k=rng.choice([1, 1, 2, 4])):
        how = rng.choice(["replace", "replace", "replace", "wrap", "exchange", "lose"])
        if how == "replace":
            container[key] = rng.choice(NASTY)
        elif how == "wrap":
            container[key] = rng.choice([[container[key]], {"a": container[key]}])
        elif how == "exchange":
            elsewhere, place = rng.choice(spots)
            container[key] = json.loads(json.dumps(elsewhere[place]))
        elif isinstance(container, dict):
            container.pop(key, None)
            return root[0]  # the other spots may be gone
    return root[0]


def damage_text(text: str, rng: random.Random) -> bytes:
    """Damage JSON text as a whole: its encoding, line ends, depth, or a number of many digits."""
    how = rng.choice(["utf-16", "utf-8-sig", "latin-1", "line ends", "depth", "digits"])
    if how == "line ends":
        text = text.replace(", ", ",\r\n")
    elif how == "depth":
        text = text.replace("]", "[" * 100_000 + "]" * 100_001, 1)
    elif how == "digits":
        text = text.replace("1", "9" * 5000, 1)
    else:
        return text.encode(how, errors="replace")
    return text.encode()


def damage(file: Path, other: Path, rng: random.Random) -> None:
    """Damage a file: what it says, if it is JSON or CSV or begins with JSON, or its bytes."""
    content = file.read_bytes()
    if file.suffix in STRUCTURED and rng.random() < 0.8:
        content = STRUCTURED[file.suffix](content, rng)
    else:
        for _ in range(rng.choice([1, 1, 2, 4])):
            content = damage_bytes(content, other.read_bytes(), rng)
    file.write_bytes(content)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    text = json.dumps(damage_values(json.loads(content), rng))
    return damage_text(text, rng) if rng.random() < 0.2 else text.encode()


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    values = damage_values([json.loads(line) for line in content.splitlines()], rng)
    if not isinstance(values, list):
        values = [values]
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def damage_csv(content: bytes, rng: random.Random) -> bytes:
    rows = damage_values(list(csv.reader(io.StringIO(content.decode()))), rng)
    text = io.StringIO()
    for row in rows if isinstance(rows, list) else [[rows]]:
        csv.writer(text).writerow(row if isinstance(row, list) else [row])
    return text.getvalue().encode(errors="replace")


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(damage_values(json.loads(content[8:end]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


STRUCTURED = {
    ".json": damage_json, ".jsonl": damage_lines, ".csv": damage_csv,
    ".safetensors": damage_safetensors,
}  # fmt: skip

# ----------------------------------------------------------------------------- videos and pictures

FILMS = {  # name -> codec, options of write_video
    "plain.mp4": ("libx264", {"b_frames": 2}),
    "vp9.webm": ("libvpx-vp9", {}), "vp8.webm": ("libvpx", {}), "old.avi": ("mpeg4", {}),
    "broadcast.ts": ("libx264", {}), "disc.mpg": ("mpeg2video", {}), "flash.flv": ("flv", {}),
    "alpha.mov": ("qtrle", {"pixel_format": "argb"}), "frames.mov": ("mjpeg", {"pixel_format":
    "yuvj420p"}), "drawn.gif": ("gif", {"pixel_format": "rgb8"}), "wm.wmv": ("wmv2", {}),
    "archive.mkv": ("ffv1", {}), 
    "phone.mp4": ("libx264", {"times": [0, 40, 80, 400, 1000, 3000]}),
}  # fmt: skip
PICTURES = ("a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.avif", "a.gif")


def unit(folder: Path, name: str) -> Path:
    """The path of a unit's only file."""
    (folder / name).mkdir(parents=True)
    return folder / name / name


def make_videos(folder: Path) -> None:
    for name, (codec, options) in FILMS.items():
        frames = numbered_frames(len(options.get("times", range(24))))
        write_video(unit(folder, name), frames, codec, **options)
    for file in CASES.glob("*.*"):
        if file.suffix != ".json":
            shutil.copy(file, unit(folder, file.name))
    stills = [Image.fromarray(frame) for frame in numbered_frames(6)]
    for name in ("moving.png", "moving.webp"):
        stills[0].save(unit(folder, name), save_all=True, append_images=stills[1:], duration=70)


def make_pictures(folder: Path) -> None:
    colours = Image.fromarray(numbered_frames(9)[8])
    for name in PICTURES:
        colours.save(unit(folder, name))
    for mode, name in [("RGBA", "a.png"), ("L", "a.tif"), ("P", "a.png"), ("1", "a.png"),
                       ("I;16", "a.png"), ("F", "a.tif"), ("CMYK", "a.jpg"), ("LA", "a.png"),
                       ("I;16", "a.tif"), ("RGBA", "a.webp"), ("RGBA", "a.tif")]:  # fmt: skip
        picture = colours.convert("L" if ";" in mode else mode).convert(mode)
        picture.save(unit(folder, f"{mode[0]}{len(mode)}{name}"))
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(unit(folder, "turned.jpg"), exif=exif)


def read_video(place: Path, file: Path, rng: random.Random) -> None:
    """Load all or a part of a film for two encoders, sometimes under another kind of name."""
    if rng.random() < 0.1:
        file = file.rename(file.with_suffix(rng.choice([".mp4", ".png", ".ts", ".gif", ""])))
    start, end = rng.choice([(None, None), (0.1, 0.5), (2.0, None)])
    pixels = load_pixels(file, SMALL[:2], start, end)
    for clip in pixels.values():
        assert clip.shape[1:] == (3, 32, 32) and clip.isfinite().all()


# ------------------------------------------------------------------------------------------- texts

PLAIN = {"question_id": "7", "video_name": "clip", "question": "What moves?"}
OPTIONS = {"options": ["a cat", "a dog"], "start": 0.5, "end": "2.5", "end_frame": 7}
FIVE = {f"a{number}": f"choice {number}" for number in range(5)}
HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
BENCHMARKS = {  # benchmark -> file -> what is in it; text is written as it is
    "msvd": {"test_q.json": [PLAIN], "test_a.json": [{"question_id": "7", "answer": "a man"}]},
    "tgif": {
        "test_q.json": [PLAIN | OPTIONS],
        "test_a.json": [{"question_id": "7", "answer_id": 1, "answer": "a dog", "type": 3}],
    },
    "perception": {
        "mc_question_valid.json": {"clip": {"mc_question": [
            {"id": 0, "question": "what", "options": ["a", "b", "c"], "answer_id": 2,
             "area": "physics"}]}},
        "cut_frame_mapping_valid.json": {"clip": 120, "other": -1},
    },
    "nextqa": {"val.csv": HEADER + 'clip,8,32,32,"why, then",3,0,CW,one,"two, or 2",3,4,5\n'},
    "vlep": {"vlep_dev_release.jsonl": json.dumps(
        {"example_id": 1, "vid_name": "clip", "ts": [1, 2.5], "events": ["a", "b"], "answer": 1})},
    "tvqa": {"tvqa_val.jsonl": json.dumps(
        {"qid": 1, "q": "Who?", "answer_idx": 1, "ts": "7-9.5", "vid_name": "clip"} | FIVE)},
    "ssv2-mcq": {
        "labels.json": {f"Doing {number}": str(number) for number in range(6)},
        "validation.json": [{"id": "7", "template": "[Doing] 1"}],
    },
}  # fmt: skip
REPLIES = ('{"pred": "yes", "score": 4}', "<think>?</think> ```json {'pred': 'No', 'score': '1.0'}",
           "The answer is B: a dog", "**(b)**", "Answer: A or option B. Not (C)")  # fmt: skip


def write_unit(folder: Path, files: dict) -> None:
    """Write name -> text or JSON value."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def make_questions(folder: Path) -> None:
    for benchmark, files in BENCHMARKS.items():
        write_unit(folder / benchmark, files)


def read_questions(place: Path, file: Path, rng: random.Random) -> None:
    """Read a benchmark, score answers to it and make a table."""
    questions = load_questions(place.name, place)
    for question in questions:
        question.answer = rng.choice([question.prompt, question.expected])
        eval.score(question, rng.choice(["parse", "released"]))
    eval.summarise(questions)
    eval.summarise(questions, "first_word")


def make_rows(folder: Path) -> None:
    rows = [
        {"id": "v", "video": "a.mp4", "conversations": talk("<video>\nWhat moves?", "a square")},
        {
            "id": 2,
            "image": "a.png",
            "conversations": talk("<image>\nWhat?", "red", "Why?", "It is"),
        },
        {"conversations": [{"from": "system", "value": "Be kind."}, *talk("left?", "right")]},
    ]
    write_unit(folder / "rows", {"rows.json": rows})
    write_video(folder / "rows" / "a.mp4", numbered_frames(8))
    Image.fromarray(numbered_frames(2)[1]).save(folder / "rows" / "a.png")
    train_tokenizer(folder / "rows" / "tokenizer.model")


def read_rows(place: Path, file: Path, rng: random.Random) -> None:
    """Read all rows of a training set, and one as the training loop does."""
    tokenizer = Tokenizer(place / "tokenizer.model")
    dataset = ConversationDataset(place / "rows.json", tokenizer, TEMPLATES["base"], SMALL[:2])
    first = None
    for index in range(len(dataset)):
        try:
            dataset.read(index)
        except DataError as error:
            first = first or error
    if first:
        raise first
    assert not len(dataset) or dataset[rng.randrange(len(dataset))].input_ids.numel()


def make_replies(folder: Path) -> None:
    for number, reply in enumerate(REPLIES):
        write_unit(folder / f"{number}", {"reply.txt": reply})


def read_replies(place: Path, file: Path, rng: random.Random) -> None:
    """Read what a judge or a model may say: never an error."""
    reply = file.read_bytes().decode(errors="surrogateescape")
    read_reply(reply)
    assert eval.parse_letter(reply, ("a cat", "a dog", "(B")) in ("", "A", "B", "C")
    assert 0 <= eval.token_f1(reply, "a dog") <= 1


# -------------------------------------------------------------------------------------------- runs

SETTINGS = {"benchmark": "msvd", "data": "data", "encoders": ["a", "b"], "weights": "7"}


def make_results(folder: Path) -> None:
    question = {
        "id": "7", "video": "clip", "text": "What?", "expected": "A", "options": ["a", "b"],
        "kind": "", "answer": "A", "mixing_weights": [0.25, 0.75], "correct": True, "f1": 0.5,
        "verdict": "yes", "mark": 4, "failure": "", "cut": [0, 2.5, None],
    }  # fmt: skip
    result = {"settings": SETTINGS | {"judge": {"model": "gpt", "replies": {"strict": 1}}},
              "rule": "parse", "questions": [question, question | {"id": 8}]}  # fmt: skip
    write_unit(folder / "results" / "eval", {"msvd.json": result})


def read_results(place: Path, file: Path, rng: random.Random) -> None:
    report.write_report([str(place)], place / "page.html", eval.summarise)


def make_journals(folder: Path) -> None:
    answer = {"answers": {"7": "red"}, "mixing_weights": [0.5, 0.5], "failure": ""}
    lines = json.dumps(answer) + "\n"
    write_unit(folder / "journal", {"settings.json": SETTINGS, "0.jsonl": lines, "1.jsonl": lines})


def read_journals(place: Path, file: Path, rng: random.Random) -> None:
    eval.stored_answers(Journal(place, SETTINGS))


def make_runs(folder: Path) -> None:
    for recipe in ("frozen", "full"):
        metrics = [{"step": n, "loss": 1.5 / n, "held_out_loss": 2.0} for n in range(1, 5)]
        bad = {"step": 2, "row": 7, "id": "v", "file": "rows.json", "reason": "it is gone"}
        config = {"code": "7", "commit": "", "torch": "2"} | asdict(
            train.preset("miniature", recipe)
        )
        files = {"config.json": config, "bad_examples.jsonl": json.dumps(bad) + "\n",
                 "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics)}  # fmt: skip
        write_unit(folder / recipe, files)


def read_runs(place: Path, file: Path, rng: random.Random) -> None:
    """What --resume reads before the saves."""
    runs.saved_options(place, train.TrainConfig, train.preset)
    runs.cut_log(place / "metrics.jsonl", 3)
    runs.cut_log(place / "bad_examples.jsonl", 3)
    runs.draw_loss(place)


def trained(place: Path) -> tuple:
    """A model, its optimizers and the run that they belong to."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, [optimizer], runs.Run(train.TrainConfig(), place, done=2, bad=0)


def make_saves(folder: Path) -> None:
    runs.save_state(*trained(folder / "run"), 2)


def read_saves(place: Path, file: Path, rng: random.Random) -> None:
    runs.load_state(*trained(place))


# -------------------------------------------------------------------------------------- checkpoints


class Code:
    """Unpickling this calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def make_pickles(folder: Path) -> None:
    """Pickles in three formats that make the folder MARKER, in five ways."""
    marker = str(folder.parents[1] / MARKER)
    command = f"__import__('os').mkdir({marker!r})"
    calls = {
        "call": (os.mkdir, (marker,)),
        "method": (Path.mkdir, (Path(marker),)),
        "shell": (os.system, (f"mkdir {marker}",)),
        "eval": (builtins.eval, (command,)),
        "exec": (exec, (command,)),
    }
    for name, call in calls.items():
        state = {"weight": torch.ones(3), "code": Code(*call)}
        torch.save(state, unit(folder, f"{name}.bin"))
        torch.save(state, unit(folder, f"{name}-old.bin"), _use_new_zipfile_serialization=False)
        unit(folder, f"{name}.metadata").write_bytes(pickle.dumps(Code(*call)))


def read_pickles(place: Path, file: Path, rng: random.Random) -> None:
    if file.suffix == ".bin":
        weights.read_tensors(file, weights.FILES)
        return
    index = place / "saves" / "00000002" / ".metadata"
    index.parent.mkdir(parents=True)
    file.rename(index)
    read_saves(place, index, rng)


LLM = replace(LLAMAS["miniature"], vocab_size=320, hidden_size=32, intermediate_size=48,
              num_heads=4, num_kv_heads=2, num_layers=2, max_positions=256)  # fmt: skip
TINY = replace(
    MERVS["miniature"], llm=LLM,
    encoders=tuple(replace(e, hidden_size=16, num_heads=2, num_layers=1, released_layers=1)
                   for e in MERVS["miniature"].encoders),
)  # fmt: skip
AUTHORS_LLM = replace(LLM, name="llama2-7b", vocab_size=32064)


def make_mervs(folder: Path) -> None:
    folder.mkdir()
    tokenizer = Tokenizer(train_tokenizer(folder.parent / "tokenizer.model"))
    MERV.create(TINY, tokenizer).save_pretrained(folder / "model")
    write_checkpoint(folder / "authors", AUTHORS_LLM, list(AUTHORS_ENCODERS))
    shutil.copy(tokenizer.path, folder / "authors")


def read_mervs(place: Path, file: Path, rng: random.Random) -> None:
    """Load a model and ask it. Where the authors' format means full sizes, it gets small ones."""
    small = {name: replace(ENCODERS[f"miniature-{name}"], name=name) for name in FOUR}
    sources = {}
    if place.name == "authors":
        sources = {name: place / f"{name}.safetensors" for name in FOUR}
    with mock.patch.dict(LLAMAS, {AUTHORS_LLM.name: AUTHORS_LLM}), mock.patch.dict(ENCODERS, small):
        model = MERV.from_pretrained(place, sources=sources)
    model.answer(torch.zeros(32, 3, 32, 48, dtype=torch.uint8), "what", max_new_tokens=2)


def make_llamas(folder: Path) -> None:
    state = {}
    for name, tensor in load_llama(LLM).state_dict().items():
        state["lm_head.weight" if name == "lm_head.weight" else f"model.{name}"] = tensor
    config = {theirs: getattr(LLM, ours) for ours, theirs in LLAMA_HF_SETTINGS.items()}
    for name in ("mapped", "pickled"):
        write_unit(folder / name, {"config.json": config | {"model_type": "llama"}})
        shutil.copy(folder.parent / "tokenizer.model", folder / name)
    torch.save(state, folder / "pickled" / "pytorch_model.bin")
    names = sorted(state)
    where = {name: f"{names.index(name) % 2}.safetensors" for name in names}
    for file in set(where.values()):
        part = {name: state[name].contiguous() for name in names if where[name] == file}
        save_file(part, folder / "mapped" / file)
    index = folder / "mapped" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "meta").mkdir()
    for name, content in llama_of_meta(load_llama(replace(TINY_LLAMA, vocab_size=320))).items():
        (folder / "meta" / name).write_bytes(content)
    shutil.copy(folder.parent / "tokenizer.model", folder / "meta")


def read_llamas(place: Path, file: Path, rng: random.Random) -> None:
    tokenizer = Tokenizer(place)
    model = load_llama(place)
    tokenizer.require_fit(model.config)
    ids = tokenizer.encode("what moves")
    model(torch.tensor([ids]))
    tokenizer.decode(ids)


def make_encoders(folder: Path) -> None:
    for config in TINY.encoders:
        files = {"config.json": {"vision_config": {"hidden_act": "gelu"}}}
        write_unit(folder / config.name, files)
        save_encoder(load_encoder(config), folder / config.name / "model.safetensors")


def read_encoders(place: Path, file: Path, rng: random.Random) -> None:
    (config,) = [config for config in TINY.encoders if config.name == place.name]
    encoder = load_encoder(config, place)
    encoder(torch.zeros(1, config.num_frames, 3, config.image_size, config.image_size))


def make_features(folder: Path) -> None:
    """Pooled features of a clip and of a still, each with the hash of the clip's bytes."""
    for name, features in {
        "clip": torch.randn(4, 2, 2, 8),
        "still": torch.ones(4, 2, 2, 8),
    }.items():
        unit = folder / name
        write_unit(unit, {"clip.bin": name})
        cache = FeatureCache(unit, {"a": "a"})
        cache.put(unit / "clip.bin", {"a": features})
        shutil.copy(cache.memory_of(unit / "clip.bin"), unit / "clip.hash")
        cache.paths(unit / "clip.bin")["a"].rename(unit / "clip.safetensors")
        shutil.rmtree(unit / "hashes")
        shutil.rmtree(unit / "a")


def read_features(place: Path, file: Path, rng: random.Random) -> None:
    """Put the two files where the cache looks for them, and look for them."""
    cache = FeatureCache(place, {"a": "a"})
    clip = place / "clip.bin"
    stored = cache.paths(clip)["a"]
    stored.parent.mkdir(parents=True)
    shutil.copy(place / "clip.safetensors", stored)
    shutil.copy(place / "clip.hash", cache.memory_of(clip))
    found = cache.get(clip)
    assert found is None or (found["a"].ndim == 4 and found["a"].isfinite().all())


@dataclass(frozen=True)
class Kind:
    """A kind of files. read: raises UserError for damage; all else that it raises is a finding."""

    share: int  # of the cases, compared with the other kinds
    make: Callable[[Path], None]  # writes good units into a folder
    read: Callable[[Path, Path, random.Random], None]  # (folder of the unit, damaged file, rng)


KINDS = {
    "video": Kind(6, make_videos, read_video),
    "picture": Kind(4, make_pictures, read_video),
    "questions": Kind(4, make_questions, read_questions),
    "rows": Kind(1, make_rows, read_rows),
    "reply": Kind(1, make_replies, read_replies),
    "result": Kind(1, make_results, read_results),
    "journal": Kind(1, make_journals, read_journals),
    "run": Kind(1, make_runs, read_runs),
    "save": Kind(1, make_saves, read_saves),
    "pickle": Kind(1, make_pickles, read_pickles),
    "merv": Kind(1, make_mervs, read_mervs),
    "llama": Kind(1, make_llamas, read_llamas),
    "encoder": Kind(1, make_encoders, read_encoders),
    "features": Kind(1, make_features, read_features),
}


def make_good_files(folder: Path) -> None:
    """Write the good files of all kinds, and see that each is read, or refused on purpose."""
    folder.mkdir()
    for name, kind in KINDS.items():
        kind.make(folder / name)
        for good in (folder / name).iterdir():
            place = Path(shutil.copytree(good, folder / "copy" / good.name))
            try:
                kind.read(place, next(place.rglob("*.*")), random.Random(0))
            except UserError:
                if name != "pickle" and good.suffix != ".mp3":  # code, a song
                    raise
            shutil.rmtree(folder / "copy")
