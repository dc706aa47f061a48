"""The miniature: clips show what their facts say, and each encoder learns from its objective."""

import contextlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from numpy.random import default_rng

import miniature
from encoders import ENCODERS, load_encoder, save_encoder
from miniature import specialists, world
from miniature.world import CLIPS, PAIRS, REVERSED, draw_clip, write_world
from support import benchmarks, dataset_writer, errors
from support.dataset_writer import Fact
from support.drawing import signed_distance
from support.video import load_video

TINY = {"train": 12, "val": 3, "test": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world of a few clips."""
    path = tmp_path_factory.mktemp("miniature") / "world"
    write_world(path, TINY)
    return path


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Videos, questions, tokenizer: writing a world twice gives the same bytes in each file."""
    write_world(tmp_path / "again", TINY)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 12 + 3 + 3 + 2 + (2 + 4) + 4 + 1
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_splits_never_share_a_seed():
    """The first seeds of two splits are a million apart, and no split has that many clips."""
    firsts = sorted(world.FIRST_SEED.values())
    learned, probed = specialists.train, specialists.probe.__wrapped__
    assert min(np.diff(firsts)) > max(*CLIPS.values(), *learned.__defaults__, *probed.__defaults__)
    assert len({*firsts}) == 5


def test_the_file_shows_what_was_drawn(folder):
    """Video coding keeps a 32x32 clip to 30 dB, because it does not subsample the colours."""
    _, drawn = draw_clip(world.FIRST_SEED["test"])
    read = load_video(folder / "test/videos/clip_000000.mp4", 8).numpy()
    assert read.shape == drawn.shape == (8, 3, 32, 32)
    assert ((read.astype(float) - drawn) ** 2).mean() < 255**2 / 1000


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_actions_is_one_clip_played_forwards_and_backwards(pair):
    """The actor goes through the same states in the opposite order, so no frame tells which."""
    for seed in range(20):
        scene = world.sample_scene(default_rng(seed), 1 + seed % 3)
        forward, backward = (world.motion(replace(scene, action=action)) for action in pair)
        assert forward.shape == (4, 8)  # x, y, size, opacity in each frame
        np.testing.assert_array_equal(forward, backward[:, ::-1])
        assert np.ptp(forward, axis=1).max() > 0, "something changes"


@pytest.mark.parametrize("action", ["stays", "shakes", "blinks", "pulses"])
def test_actions_without_a_pair_have_no_direction_of_time(action):
    """Nothing drifts: from the first half of the clip to the second, the state stays the same."""
    drifts = []
    for seed in range(400):
        scene = replace(world.sample_scene(default_rng(seed), 1 + seed % 3), action=action)
        states = world.motion(scene)
        drifts.append(states[:, 4:].mean(1) - states[:, :4].mean(1))
    np.testing.assert_allclose(np.mean(drifts, 0), 0, atol=0.02)


def test_every_answer_is_right():
    """Each answer is found a second time, from coordinates, by the words of the question."""
    seen = set()
    for seed in range(150):
        scene, _ = draw_clip(seed)
        by_shape = {a.shape: a for a in scene.things}
        by_colour = {a.colour: a for a in scene.things}
        for fact in world.facts(scene):
            kind, text, answer = fact.kind, fact.question, fact.answer
            assert answer in fact.choices
            about = by_shape.get(text.rstrip("?").split()[-1]) or by_shape.get(
                text.rstrip("?").split()[-2]
            )
            seen.add(kind)
            if kind == "colour":
                assert answer == about.colour
            elif kind == "shape":
                assert by_colour[text.split()[4]].shape == answer
            elif kind == "texture":
                assert answer == by_colour[text.split()[4]].texture
            elif kind == "how many":
                assert {"one": 1, "two": 2, "three": 3}[answer] == len(scene.things)
            elif kind == "where":
                about = by_colour[text.split()[3]]
                down, right = answer.split()
                assert (about.y > 16 + 2) if down == "bottom" else (about.y < 16 - 2)
                assert (about.x > 16 + 2) if right == "right" else (about.x < 16 - 2)
            else:
                assert kind == ("temporal" if answer in REVERSED else "what happens")
                assert answer == scene.action
    kinds = {"colour", "shape", "texture", "where", "how many", "what happens", "temporal"}
    assert seen == kinds


def test_the_colour_of_every_object_can_be_seen():
    """Some frame shows at least ten pixels of it, and of the six colours they are closest to its.

    So no question asks about an object that is hidden, and counting is not guessing.
    """
    names, colours = list(world.COLOURS), np.array(list(world.COLOURS.values()))
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)  # textures change only the brightness
    counts = []
    for seed in range(400):
        scene, frames = draw_clip(seed)
        counts.append(len(scene.things))
        for thing, visible in zip(scene.things, visible_pixels(scene), strict=True):
            frame = visible.sum((1, 2)).argmax()
            assert visible[frame].sum() >= 10, (seed, thing)
            colour = frames[frame][:, visible[frame]].mean(1)
            assert names[(colours @ colour).argmax()] == thing.colour, (seed, thing)
    assert {*counts} == {1, 2, 3}


def visible_pixels(scene):
    """For each object, bool (T, H, W): pixels inside it that no object in front of it touches."""
    grid = np.arange(32) + 0.5
    touched, inside = [], []
    for index, a in enumerate(scene.things):
        action = scene.action if index == scene.actor else "stays"
        dx, dy, size, opacity = world.motion(replace(scene, action=action))[:, :, None, None]
        x, y = np.broadcast_arrays(grid - a.x - dx, grid[:, None] - a.y - dy)
        distance = signed_distance(a.shape, x, y, a.radius * size)
        touched.append((distance < 0.5) & (opacity > 0))
        inside.append((distance < -0.5) & (opacity > 0.9))
    nothing = np.zeros((8, 32, 32), bool)
    return [
        own & ~np.any([nothing, *touched[index + 1 :]], axis=0) for index, own in enumerate(inside)
    ]


def test_objects_at_rest_do_not_overlap():
    """Their centres are 12 pixels apart, so discs touch at most; corners of squares may overlap."""
    for seed in range(150):
        scene, _ = draw_clip(seed)
        for a in scene.things:
            for b in scene.things:
                if b is not a:
                    distance = np.hypot(a.x - b.x, a.y - b.y)
                    assert distance >= 12 > a.radius + b.radius - 0.5


def test_no_kind_of_question_has_an_answer_that_is_mostly_right():
    """Always giving the most common answer of a kind is right in less than 35 % of its test
    questions, and every clip is asked what happens and how many objects there are."""
    first, count = world.FIRST_SEED["test"], CLIPS["test"]
    known = []
    for seed in range(first, first + count):
        known.append(world.facts(world.sample_scene(default_rng(seed), 1 + seed % 3)))
    files = dataset_writer.evaluation_files(known, PAIRS, first)
    answers = {}
    for row in files["open_a"]:
        answers.setdefault(row["type"], []).append(row["answer"])
    assert len(answers) == 7
    assert len(answers["how many"]) == len(answers["temporal"] + answers["what happens"]) == count
    for kind, given in answers.items():
        commonest = max(given.count(answer) for answer in {*given})
        assert commonest / len(given) < 0.35, kind
        assert len(given) >= 80, kind


def test_the_tokenizer_knows_the_prompt(folder):
    """ "In:" and "Out:" are words of the vocabulary, and a newline is a token of its own."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = tokenizer.encode("In: What happens?\nOut:", out_type=str)
    assert pieces == ["▁In", ":", "▁What", "▁happens", "?", "\n", "Out", ":"]


def test_files_are_what_eval_reads(folder):
    """Open questions and multiple choice; 3 to 5 options, and the right one among them once."""
    for name in ("miniature-open", "miniature-mcq"):
        questions = benchmarks.load_questions(name, folder / "test")
        assert len({q.video for q in questions}) == 3
        assert {q.kind for q in questions} >= {"colour", "shape", "texture", "how many"}
        for question in questions:
            if name == "miniature-mcq":
                options = question.options
                assert len(options) in (3, 4, 5)  # three: how many there are
                assert len({*options}) == len(options)
                answer = options["ABCDE".index(question.expected)]
            else:
                answer = question.expected
            scene, _ = draw_clip(world.FIRST_SEED["test"] + int(question.video[-6:]))
            known = [(fact.question, fact.answer) for fact in world.facts(scene)]
            assert (question.text, answer) in known


def test_temporal_options_are_two_pairs():
    """So no option can be ruled out without knowing the direction of time."""
    rng = default_rng(0)
    for answer in REVERSED:
        fact = Fact("temporal", "What happens?", answer, world.ACTIONS)
        options = dataset_writer.choose_options(fact, PAIRS, rng)
        assert len(options) == len({*options}) == 4
        assert {REVERSED[option] for option in options} == {*options}
        assert answer in options


def test_training_rows_are_conversations_about_one_video(folder):
    """Questions and answers alternate, <video> occurs once, every fact is asked once."""
    rows = json.loads((folder / "train/stage2.json").read_text())
    for row in rows:
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        assert [who for who, _ in said] == ["human", "gpt"] * (len(said) // 2)
        assert sum("<video>" in text for _, text in said) == 1
        assert sum("What happens?" in text for _, text in said) == 1
        assert (folder / "train" / row["video"]).exists()
        assert len({*said[::2]}) == len(said[::2]) >= 5
    captions = json.loads((folder / "train/stage1.json").read_text())
    assert len(captions) == TINY["train"] and len(rows) == 2 * TINY["train"]


def test_the_validation_split_has_conversations_too(folder):
    """The loss on them is logged during training; their clips are not those of the training."""
    training = json.loads((folder / "train/stage2.json").read_text())
    held_out = json.loads((folder / "val/stage2.json").read_text())
    assert len(held_out) == 2 * TINY["val"]
    assert held_out[0]["conversations"] != training[0]["conversations"]
    assert not (folder / "test/stage2.json").exists()


def test_vivits_labels_are_changes_without_a_name():
    """x, y, size and opacity fall (0), stay (1) or rise (2); the label does not name the action."""
    expected = {
        "moves left": [0, 1, 1, 1], "moves right": [2, 1, 1, 1], "moves down": [1, 2, 1, 1],
        "grows": [1, 1, 2, 1], "fades": [1, 1, 1, 0], "stays": [1, 1, 1, 1],
    }  # fmt: skip
    for number in range(120):
        scene, _ = draw_clip(world.FIRST_SEED["pretraining"] + number)
        _, changes, film = specialists.example(number, alone=False)
        assert film.shape == (8, 3, 32, 32) and changes.shape == (4, 4)
        if (found := expected.pop(scene.action, None)) is not None:
            assert (changes == found).all(), scene.action
    assert not expected, "each was seen"


def test_captions_name_objects_and_a_coarse_verb():
    """They never tell a direction, so LanguageBind cannot learn it from its texts."""
    for number in range(60):
        scene, _ = draw_clip(world.FIRST_SEED["pretraining"] + number)
        caption, _, _ = specialists.example(number, alone=False)
        phrases = [specialists.PHRASES[index] for index in caption]
        assert {*phrases[:3]} - {""} == {f"{a.colour} {a.shape}" for a in scene.things}
        assert phrases[3] in ("moves", "changes size", "changes light", "rests")
        if scene.action in REVERSED:
            backward = specialists.VERBS.get(REVERSED[scene.action], "moves")
            assert phrases[3] == backward, "both directions have the same verb"


def test_the_other_worlds_break_the_link_between_clips_and_questions(tmp_path):
    """ "shuffled" shows another clip. "two_kinds" asks grey clips what happens, and clips whose
    frames are in random order everything else."""
    for kind in ("plain", "shuffled", "two_kinds"):
        write_world(tmp_path / kind, {"train": 12, "test": 4}, kind)

    def film(kind, number):
        return load_video(tmp_path / kind / f"test/videos/clip_{number:06d}.mp4", 8).int()

    def asked(kind):
        rows = json.loads((tmp_path / kind / "test/open_q.json").read_text())
        return [(int(row["video_name"][-1]), row["question"]) for row in rows]

    assert asked("shuffled") == asked("plain")
    assert torch.equal(film("shuffled", 0), film("plain", 1))
    assert {number for number, _ in asked("two_kinds")} == {0, 1, 2, 3}
    assert all(
        (number % 2 == 1) == (text == "What happens?") for number, text in asked("two_kinds")
    )
    grey, before = film("two_kinds", 1), film("plain", 1)
    assert (grey - grey[:, :1]).abs().max() < 12 < (before - before[:, :1]).abs().max()
    mixed, before = film("two_kinds", 2), film("plain", 2)
    order = [int((before - frame).abs().sum((1, 2, 3)).argmin()) for frame in mixed]
    assert len({*order}) > 4 and order != sorted(order)


def test_a_mismatched_clip_does_not_tell_how_many_objects_its_conversation_is_about():
    """It is another clip, and with any number of objects each answer is equally frequent. It was
    always the next clip, so the right answer followed from a count of the wrong objects.
    """
    pairs = []
    for number in range(9):
        frames, _, known = world.make_clip("shuffled", "train", number)
        (answer,) = [fact.answer for fact in known if fact.kind == "how many"]
        shown = [o for o in range(12) if np.array_equal(frames, world.draw_clip(o)[1])]
        assert len(shown) == 1 and shown != [number]
        pairs.append((answer, world.NUMBERS[shown[0] % 3]))
    assert len(set(pairs)) == 9


@pytest.mark.parametrize("name", specialists.RECIPES)
def test_each_objective_is_learned_in_a_few_steps(name, monkeypatch, tmp_path):
    """The loss falls, and the encoder can be loaded from a file in the released format."""
    recipe = replace(specialists.RECIPES[name], steps=24, batch=8, muon_lr=0.02)
    monkeypatch.setitem(specialists.RECIPES, name, recipe)
    model = specialists.Pretrainer(name, 0)
    losses = specialists.train(model, name, 0, num_clips=8)
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02
    save_encoder(model.encoder, tmp_path / "encoder.safetensors")
    loaded = load_encoder(f"miniature-{name}", tmp_path / "encoder.safetensors")
    config = ENCODERS[f"miniature-{name}"]
    clip = torch.randn(2, config.num_frames, 3, 32, 32)
    assert loaded(clip).shape == (2, *config.grid, config.hidden_size)
    assert sum(p.numel() for p in model.encoder.parameters()) < 1e6


@pytest.mark.parametrize("name", ["siglip", "languagebind", "vivit"])
def test_pretraining_keeps_all_tensors_where_the_model_is(name, monkeypatch):
    """As a GPU needs it. The meta device stands in for one: it too refuses tensors of the CPU.

    DINOv2 is missing, because there is no selecting by a mask on that device.
    """
    short = replace(specialists.RECIPES[name], steps=2, batch=4)
    monkeypatch.setitem(specialists.RECIPES, name, short)
    monkeypatch.setattr(torch.Tensor, "item", lambda number: 1.0)
    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())
    model = specialists.Pretrainer(name, 0).to("meta")
    assert specialists.train(model, name, 0, num_clips=8) == [1.0, 1.0]


def test_pretraining_writes_four_files_and_prints_what_they_have_learned(
    monkeypatch, tmp_path, capsys
):
    """All chains, here in a thread instead of processes, with two steps and few clips."""
    short = {name: replace(r, steps=2, batch=4) for name, r in specialists.RECIPES.items()}
    monkeypatch.setattr(specialists, "RECIPES", short)
    monkeypatch.setattr(specialists.train, "__defaults__", (4,))
    monkeypatch.setattr(specialists.probe.__wrapped__, "__defaults__", (30,))
    monkeypatch.setattr(
        specialists, "ProcessPoolExecutor", lambda count, context, begin: ThreadPoolExecutor(1)
    )
    specialists.pretrain(tmp_path / "encoders-0")
    files = {path.stem for path in (tmp_path / "encoders-0").glob("*.safetensors")}
    assert files == {*short}
    assert capsys.readouterr().out.count("texture") == 4


def test_every_text_that_fits_a_clip_counts_as_a_match():
    """Also the text of another clip: of nine pairs of an image and a text, five match here."""
    width, red, blue = 4, 1, 2
    captions = torch.tensor([[red, 0, 0, 31], [red, 0, 0, 31], [blue, 0, 0, 31]])
    direction = torch.eye(width)[0]
    text_encoder = torch.nn.Embedding(3, width)
    text_encoder.weight.data[red], text_encoder.weight.data[blue] = direction, -direction

    def loss(signs):
        images = torch.stack([sign * direction for sign in signs])[:, None, None, None]
        model = SimpleNamespace(
            encoder=lambda frames: images, head=torch.nn.Identity(), text_encoder=text_encoder,
            scale=torch.zeros(1), bias=torch.zeros(1),
        )  # fmt: skip
        frames = torch.zeros(3, 1, 3, 32, 32)
        return specialists.matching_loss(model, frames, captions, torch.Generator()).item()

    # Logits are 10 * cosine - 5: 5 for the five matches, -15 for the four other pairs.
    expected = (5 * np.log1p(np.exp(-5)) + 4 * np.log1p(np.exp(-15))) / 3
    assert loss([1, 1, -1]) == pytest.approx(expected, rel=1e-4)
    assert loss([1, -1, -1]) > expected + 5


def test_languagebind_starts_from_siglip():
    """Before its first step it has SigLIP's weights, and its temporal attention adds nothing."""
    siglip = specialists.Pretrainer("siglip", 0)
    languagebind = specialists.Pretrainer("languagebind", 1)
    languagebind.start_from(siglip)
    ours, theirs = languagebind.state_dict(), siglip.state_dict()
    same = [name for name in theirs if name in ours and "position" not in name]
    assert len(same) > 40
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    for block in languagebind.encoder.blocks:
        assert not block.temporal_attention.out_proj.weight.any()


def test_torch_without_mkldnn_can_import_the_specialists():
    """macOS builds of torch cannot say whether bfloat16 is fast: then float32 is used."""
    code = (
        "import torch, types\n"
        "torch.ops.mkldnn = types.SimpleNamespace()\n"
        "from miniature import specialists\n"
        "assert specialists.fast_bfloat16(torch.device('cpu')) is False\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=world.__file__.rsplit("/", 2)[0])


def test_a_probe_gives_accuracies():
    """Four fractions, for features of an untrained encoder."""
    accuracies = specialists.probe(load_encoder("miniature-siglip"), num_clips=60)
    assert set(accuracies) == {"colour", "shape", "texture", "action"}
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())


def test_prepare_does_nothing_the_second_time(tmp_path, monkeypatch):
    """Encoders of another seed are added; what other code made is replaced."""
    made = []

    def write(what, folder):
        made.append(what)
        folder.mkdir(parents=True)
        (folder / "content").write_text(what)

    monkeypatch.setattr(world, "write_world", lambda path, clips: write("world", path))
    monkeypatch.setattr(specialists, "pretrain", lambda path, seed, device: write(f"{seed}", path))
    target = tmp_path / "data" / "miniature"
    for seed in (0, 0, 1, 0, 1):
        assert miniature.prepare(target, seed) == target
    assert made == ["world", "0", "1"]
    (target / "made_by.txt").write_text("other code")
    miniature.prepare(target)
    assert made[3:] == ["world", "0"], "a new world needs new encoders"
    assert not list(tmp_path.rglob("*.partial"))


def test_prepare_does_not_replace_a_folder_that_it_did_not_make(tmp_path):
    """A folder without made_by.txt may hold somebody's work."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(errors.UserError, match="in the way"):
        miniature.prepare(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
