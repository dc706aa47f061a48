"""The world is what its questions say, and each specialist's objective can be learned."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.random import default_rng

import miniature
from encoders import ENCODERS, load_encoder, save_encoder
from miniature import specialists, world
from miniature.world import CLIPS, PAIRS, REVERSED, draw_clip, write_world
from support import benchmarks, errors
from support.video import load_video

TINY = {"train": 12, "val": 3, "test": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world of a few clips."""
    path = tmp_path_factory.mktemp("miniature") / "world"
    write_world(path, TINY)
    return path


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Films, questions, tokenizer: a world that is written again is the same, file by file."""
    write_world(tmp_path / "again", TINY)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 12 + 3 + 3 + 2 + 4 + 4 + 1
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_splits_never_share_a_seed():
    """A million clips lie between the first clips of two splits; the largest has a few thousand."""
    firsts = sorted(world.FIRST_SEED.values())
    learned, probed = specialists.train, specialists.probe.__wrapped__
    assert min(np.diff(firsts)) > max(*CLIPS.values(), *learned.__defaults__, *probed.__defaults__)
    assert len({*firsts}) == 5


def test_the_file_shows_what_was_drawn(folder):
    """H.264 keeps a clip of 32x32 pixels: 4:4:4 and 30 dB, where 4:2:0 would lose the colours."""
    _, drawn = draw_clip(world.FIRST_SEED["test"])
    read = load_video(folder / "test/videos/clip_000000.mp4", 8).numpy()
    assert read.shape == drawn.shape == (8, 3, 32, 32)
    assert ((read.astype(float) - drawn) ** 2).mean() < 255**2 / 1000


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_one_film_played_forwards_and_backwards(pair):
    """Not only the last frame and the first change places: every state of the actor does."""
    for seed in range(20):
        scene = world.sample_scene(default_rng(seed))
        forward, backward = (world.motion(scene._replace(action=action)) for action in pair)
        for one, other in zip(forward, backward, strict=True):
            np.testing.assert_array_equal(one, other[::-1])
        assert any(np.ptp(state) > 0 for state in forward), "something changes"


def test_a_single_frame_does_not_tell_the_direction():
    """Which is why: both directions go through the same states, only in another order."""
    scene = world.sample_scene(default_rng(0))
    for pair in PAIRS:
        states = [np.stack(world.motion(scene._replace(action=action)), 1) for action in pair]
        one, other = (sorted(map(tuple, np.round(s.view(float), 6))) for s in states)
        assert one == other


def scenes_and_questions(count=150):
    """(scene, film, [(kind, text, answer, answers)]) of many clips."""
    for seed in range(count):
        scene, film = draw_clip(seed)
        yield scene, film, list(world.ask(scene))


def test_every_answer_is_right():
    """Each is found a second time, from coordinates, by the words of the question."""
    seen = set()
    for scene, _, questions in scenes_and_questions():
        by_shape = {a.shape: a for a in scene.things}
        by_colour = {a.colour: a for a in scene.things}
        for kind, text, answer, answers in questions:
            assert answer in answers
            about = by_shape.get(text.rstrip("?").split()[-1]) or by_shape.get(
                text.rstrip("?").split()[-2]
            )
            seen.add(kind)
            if kind == "colour":
                assert answer == about.colour
            elif kind == "shape":
                assert by_colour[text.split()[4]].shape == answer
            elif kind == "texture":
                assert answer == about.texture
            elif kind == "how many":
                assert ["one", "two", "three", "four"].index(answer) + 1 == len(scene.things)
            elif kind == "where":
                right, down = about.x - 16, about.y - 16
                towards = {"right": right, "left": -right, "bottom": down, "top": -down}
                if answer == "centre":
                    assert max(towards.values()) < 4
                else:
                    assert answer == max(towards, key=towards.get) and towards[answer] >= 4
            elif kind == "left of":
                other = by_shape[answer]
                assert other.x < about.x - 2
                assert all(a.x > about.x + 2 for a in scene.things if a not in (other, about))
                if scene.action.startswith(("moves", "orbits")):  # at every time of the film
                    acts, offset = scene.things[scene.actor], world.motion(scene)[0].real
                    assert about is not acts
                    assert len({*np.sign(acts.x + offset - about.x)}) == 1
            else:
                assert kind == ("temporal" if answer in REVERSED else "what happens")
                assert answer == scene.action
    assert seen == {"colour", "shape", "texture", "where", "left of", "how many",
                    "what happens", "temporal"}  # fmt: skip


def test_every_object_can_be_seen():
    """Where it lies, and on pixels that no object before it covers: counting is never guessing."""
    grid = np.arange(32) + 0.5
    for scene, film, _ in scenes_and_questions(60):
        covers = [
            world.SHAPES[a.shape](grid - a.x, grid[:, None] - a.y, a.radius) < 0
            for a in scene.things
        ]
        for index, a in enumerate(scene.things):
            hidden = np.any([np.zeros((32, 32)), *covers[index + 1 :]], 0)
            free = covers[index] & ~hidden
            if index == scene.actor or any(
                i != index and i == scene.actor for i in range(len(scene.things))
            ):
                assert free.sum() > 5 or index == scene.actor
                continue
            colour = film[0][:, free].mean(1) / 255
            wanted = np.array(world.COLOURS[a.colour])
            # The colour's direction is right; textures make it darker.
            assert colour @ wanted / np.linalg.norm(colour) / np.linalg.norm(wanted) > 0.85


def test_objects_hide_parts_of_each_other():
    """In many clips, but never most of one."""
    hidden = [
        min(np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius for b in scene.things if b != a)
        for scene, _, _ in scenes_and_questions()
        for a in scene.things
        if len(scene.things) > 1
    ]
    assert 0.2 < np.mean(np.array(hidden) < -1) < 0.8


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
            asked = [(text, right) for _, text, right, _ in world.ask(scene)]
            assert (question.text, answer) in asked


def test_temporal_options_are_two_pairs():
    """So no option can be struck out without knowing the direction of time."""
    rng = default_rng(0)
    for answer in REVERSED:
        options = world.choose_options("temporal", answer, world.ACTIONS, rng)
        assert len(options) == len({*options}) == 4
        assert {REVERSED[option] for option in options} == {*options}
        assert answer in options


def test_training_rows_are_conversations_about_one_video(folder):
    """Questions and answers in turn, one <video>, what happens always asked, each once."""
    rows = json.loads((folder / "train/stage2.json").read_text())
    for row in rows:
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        assert [who for who, _ in said] == ["human", "gpt"] * (len(said) // 2)
        assert sum("<video>" in text for _, text in said) == 1
        assert sum("What happens?" in text for _, text in said) == 1
        assert (folder / "train" / row["video"]).exists()
        assert len({*said[::2]}) == len(said[::2]) <= 8
    captions = json.loads((folder / "train/stage1.json").read_text())
    assert len(captions) == len(rows) == TINY["train"]


def test_vivits_labels_are_changes_without_a_name():
    """x, y, size and opacity fall (0), stay (1) or rise (2) between frames; no action is said."""
    expected = {
        "moves left": [0, 1, 1, 1], "moves right": [2, 1, 1, 1], "moves down": [1, 2, 1, 1],
        "grows": [1, 1, 2, 1], "fades": [1, 1, 1, 0], "stays": [1, 1, 1, 1],
    }  # fmt: skip
    for number in range(120):
        scene, _ = draw_clip(world.FIRST_SEED["more"] + number)
        _, changes, film = specialists.lesson(number, alone=False)
        assert film.shape == (8, 3, 32, 32) and changes.shape == (4, 4)
        if (found := expected.pop(scene.action, None)) is not None:
            assert (changes == found).all(), scene.action
    assert not expected, "each was seen"


def test_the_other_worlds_break_the_tie_of_clip_and_question_on_purpose(tmp_path):
    """ "shuffled" shows the next clip; "two_kinds" asks a grey clip what happens, and one whose
    frames are out of order everything else."""
    for kind in ("", "shuffled", "two_kinds"):
        write_world(tmp_path / f"{kind}_", {"train": 12, "test": 4}, kind)

    def film(kind, number):
        return load_video(tmp_path / f"{kind}_" / f"test/videos/clip_{number:06d}.mp4", 8).int()

    def asked(kind):
        rows = json.loads((tmp_path / f"{kind}_" / "test/open_q.json").read_text())
        return [(int(row["video_name"][-1]), row["question"]) for row in rows]

    assert asked("shuffled") == asked("")
    assert torch.equal(film("shuffled", 0), film("", 1))
    assert {number for number, _ in asked("two_kinds")} == {0, 1, 2, 3}
    assert all(
        (number % 2 == 1) == (text == "What happens?") for number, text in asked("two_kinds")
    )
    grey, before = film("two_kinds", 1), film("", 1)
    assert (grey - grey[:, :1]).abs().max() < 12 < (before - before[:, :1]).abs().max()
    mixed, before = film("two_kinds", 2), film("", 2)
    order = [int((before - frame).abs().sum((1, 2, 3)).argmin()) for frame in mixed]
    assert len({*order}) > 4 and order != sorted(order)


@pytest.mark.parametrize("name", specialists.RECIPES)
def test_each_objective_is_learned_in_a_few_steps(name, monkeypatch, tmp_path):
    """Its loss falls, and its encoder loads under the names of the released files."""
    loss, _, _, frames, _ = specialists.RECIPES[name]
    monkeypatch.setitem(specialists.RECIPES, name, (loss, 24, 8, frames, 0.02))
    pupil = specialists.Pupil(name, 0)
    losses = specialists.train(pupil, name, 0, num_clips=8)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02
    save_encoder(pupil.encoder, tmp_path / "encoder.safetensors")
    loaded = load_encoder(f"miniature-{name}", tmp_path / "encoder.safetensors")
    config = ENCODERS[f"miniature-{name}"]
    clip = torch.randn(2, config.num_frames, 3, 32, 32)
    assert loaded(clip).shape == (2, *config.grid, config.hidden_size)
    assert sum(p.numel() for p in pupil.encoder.parameters()) < 1e6


def test_pretraining_leaves_four_files_and_prints_what_they_know(monkeypatch, tmp_path, capsys):
    """Both chains, here with threads for processes, two steps and few clips."""
    short = {name: (r[0], 2, 4, *r[3:]) for name, r in specialists.RECIPES.items()}
    monkeypatch.setattr(specialists, "RECIPES", short)
    monkeypatch.setattr(specialists.train, "__defaults__", (4,))
    monkeypatch.setattr(specialists.probe.__wrapped__, "__defaults__", (30,))
    monkeypatch.setattr(
        specialists, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1)
    )
    specialists.pretrain(tmp_path / "encoders-0")
    files = {path.stem for path in (tmp_path / "encoders-0").glob("*.safetensors")}
    assert files == {*short}
    assert capsys.readouterr().out.count("texture") == 4


def test_languagebind_starts_as_siglip():
    """Before its first step it gives SigLIP's features, up to the class token that it adds."""
    siglip, languagebind = (specialists.Pupil(name, 0) for name in ("siglip", "languagebind"))
    languagebind.start_from(siglip)
    ours, theirs = languagebind.state_dict(), siglip.state_dict()
    skip = "position", "teacher"
    same = [name for name in theirs if name in ours and not any(part in name for part in skip)]
    assert len(same) > 40
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    time = [b.temporal_attention.out_proj.weight for b in languagebind.encoder.blocks]
    assert all(not weight.any() for weight in time)


def test_a_probe_gives_fractions():
    """On random features, better than nothing and worse than everything."""
    known = specialists.probe(load_encoder("miniature-siglip"), clips=60)
    assert set(known) == {"colour", "shape", "texture", "action"}
    assert all(0 <= right <= 1 for right in known.values())


def test_prepare_does_nothing_the_second_time(tmp_path, monkeypatch):
    """Another seed's encoders are added beside; another code's are replaced."""
    made = []

    def write(what, folder):
        made.append(what)
        folder.mkdir(parents=True)
        (folder / "content").write_text(what)

    monkeypatch.setattr(world, "write_world", lambda path, clips: write("world", path))
    monkeypatch.setattr(specialists, "pretrain", lambda path, seed: write(f"{seed}", path))
    target = tmp_path / "data" / "miniature"
    for seed in (0, 0, 1, 0, 1):
        assert miniature.prepare(target, seed) == target
    assert made == ["world", "0", "1"]
    (target / "made_by.txt").write_text("other code")
    miniature.prepare(target)
    assert made[3:] == ["world", "0"], "a new world needs new encoders"
    assert not list(tmp_path.rglob("*.partial"))


def test_prepare_refuses_a_foreign_folder(tmp_path):
    """It would replace what somebody else put there."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(errors.UserError, match="in the way"):
        miniature.prepare(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
