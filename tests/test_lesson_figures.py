"""lesson/: the numbers behind the pictures, recomputed by other means; and the pictures."""

from __future__ import annotations

import os
import re
import shutil
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pictures
import pytest
import torch
from PIL import Image
from tiny_encoders import build, tiny
from tiny_encoders import clip as random_clip
from tiny_merv import *  # noqa: F403 (its fixtures)
from tiny_merv import QUESTIONS, TINY, random_pixels

import eval
from data import IGNORE, TEMPLATES, render_prompt, tokenize
from lesson import figures, views
from lesson.__main__ import main
from lesson.figures import fill
from merv import MERV, MERVS, pooling_matrix
from support.benchmarks import Question

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("one_thread", "short_answers")


@pytest.fixture
def short_answers(monkeypatch):
    """Random weights never end an answer, so it is cut after four tokens."""
    monkeypatch.setattr(views, "LONGEST", 4)


@pytest.fixture
def lab(model, short_clip, claims) -> figures.Lab:
    """A tiny random model with a short clip, three clips with questions, and stored results."""
    lab = figures.open_lab(model, short_clip, QUESTIONS[:2])
    for seed in range(3):
        pixels = random_pixels(seed)
        asked = []
        for number, text in enumerate(QUESTIONS):
            asked.append(Question(f"{seed}-{number}", "clip", text, "red", kind=f"kind {number}"))
        lab.clips.append(views.look_both_ways(model, pixels, asked))
    lab.claims = figures.read_claims(claims, "miniature-open")
    return lab


@pytest.fixture(scope="module")
def claims(tmp_path_factory) -> Path:
    """What `python -m miniature claims` leaves, in small: runs with stored answers.

    Two questions a clip, of two kinds. Two versions of the code ran "MERV"; the last one counts.
    """
    folder = tmp_path_factory.mktemp("claims")
    names = [encoder.name for encoder in TINY.encoders]
    rows = [
        ("MERV-0-00000000", 30, 0, names), ("MERV-0-12345678", 30, 3, names),
        ("MERV-15-steps-0-12345678", 15, 1, names), ("SigLIP-0-12345678", 30, 2, names[-1:]),
        ("MERV-1-12345678", 30, 4, names), ("concat-channel-0-12345678", 30, 4, names),
        ("split-cross-attention-250-steps-0-12345678", 30, 4, names),
    ]  # fmt: skip
    for age, (name, steps, right, encoders) in enumerate(rows):
        questions = []
        for clip in range(4):
            moves = clip % 2  # in the world of two kinds, clip 1 and 3 are asked what happens
            share = 0.9 if moves else 0.3
            mixing_weights = (share, *[(1 - share) / 3] * 3)[: len(encoders)]
            for kind, prompt in (("action", "What happens?"), ("colour", "What colour?")):
                if name.startswith("split") and (kind == "action") != bool(moves):
                    continue
                answer = "yes" if kind == "colour" or clip < right else "no"
                questions.append(Question(
                    f"{clip}{kind}", f"clip {clip}", prompt, "yes", kind=kind, answer=answer,
                    mixing_weights=mixing_weights,
                ))  # fmt: skip
        file = folder / name / "eval/miniature-open.json"
        settings = {"benchmark": "miniature-open", "data": "test", "encoders": encoders}
        eval.write_results(file, settings, questions, "parse")
        os.utime(file, (age, age))
        (folder / name / "metrics.jsonl").write_text('{"step": 1}\n' * steps)
    return folder


# ------------------------------------------------------------------------------------------ numbers


def test_colours_are_the_three_directions_of_largest_variance():
    """Along red, green and blue the patches differ less and less, and never together.

    The covariance of the colours, before they are scaled to their range, is diagonal: so each
    colour tells what the others do not. Three known directions are found again.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4 * 5 * 5, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    directions, _ = torch.linalg.qr(torch.randn(12, 3, generator=generator))
    features = (hidden @ directions.mT + 7).view(4, 5, 5, 12)
    colours = views.principal_colours(features).flatten(0, 2)
    assert colours.min() == 0 and colours.max() == 1
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([colours[:, channel], hidden[:, channel]]))[0, 1]
        assert abs(correlation) > 0.97, channel
    covariance = torch.cov(colours.mT)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5


def test_equal_features_everywhere_are_one_colour():
    """A black clip has no directions to show; it must not become noise or NaN."""
    assert views.principal_colours(torch.ones(2, 3, 3, 8)).unique().tolist() == [0.0]


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "siglip", "vivit"])
def test_frames_reach_the_steps_that_the_architecture_lets_them_reach(name):
    """LanguageBind: 8 of 16 steps, its window. A ViT: its own step. ViViT: all 16."""
    config = tiny(name)
    reached = views.reach(build(config), random_clip(config)[0]) > 1e-6
    frame = torch.arange(config.num_frames)[:, None]
    step = torch.arange(16)
    expected = {
        "languagebind": frame // 8 == step // 8,
        "vivit": torch.ones(32, 16, dtype=torch.bool),
    }
    assert torch.equal(reached, expected.get(name, frame == step))
    narrow = views.narrow(config)
    small = torch.randn(config.num_frames, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views.reach(narrow, small) > 1e-6, reached)


def test_a_reader_of_features_answers_as_the_model_does(model, short_clip):
    """Swapping features is only fair if unswapped features give the model's own answers."""
    pixels = model.pixels(short_clip)
    clip = views.look_both_ways(model, pixels, [])
    reader = views.reader_of_features(model, list(model.encoders))
    expected = model.answer(pixels, QUESTIONS, max_new_tokens=8)
    found = reader.answer(clip.pooled, QUESTIONS, max_new_tokens=8)
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    torch.testing.assert_close(found[0].weights, expected[0].weights)
    reversed_pixels = {name: frames.flip(0) for name, frames in pixels.items()}
    expected = model.answer(reversed_pixels, QUESTIONS, max_new_tokens=8)
    found = reader.answer(clip.backwards, QUESTIONS, max_new_tokens=8)
    assert [answer.text for answer in found] == [answer.text for answer in expected]


def test_an_encoder_that_is_taken_away_leaves_the_others_mixed(model):
    """The mixing weights of the others keep their ratios, and the model itself keeps all four."""
    clip = views.look_both_ways(model, random_pixels(1), [])
    names = list(model.encoders)
    _, all_weights = views.reader_of_features(model, names).prefill(clip.pooled)
    _, weights = views.reader_of_features(model, names[1:]).prefill(clip.pooled)
    torch.testing.assert_close(weights, all_weights[1:] / all_weights[1:].sum())
    assert list(model.projectors) == names
    assert MERV.pooled_features.__get__(model) == model.pooled_features


def test_the_view_that_matters_is_the_one_an_answer_was_read_from(lab, monkeypatch):
    """A model that reads only ViViT loses every answer with ViViT's view, and none with another's.

    Its answer is the sign of the change over time in ViViT's features: forwards it says one thing,
    and backwards the opposite, whatever the other encoders see.
    """
    vivit = next(e.name for e in TINY.encoders if e.family == "vivit")

    def read_vivit(reader, clips, questions, longest):
        answers = []
        for pooled, asked in zip(clips, questions, strict=True):
            change = (pooled[vivit][-1] - pooled[vivit][0]).sum()
            text = "up" if change > 0 else "down"
            answers.append([type("Reply", (), {"text": text}) for _ in asked])
        return answers

    signs = [1, -1, 1, -1]
    lab.clips = []
    for sign in signs:
        forwards = {e.name: torch.arange(4.0).view(4, 1, 1, 1) * sign for e in TINY.encoders}
        backwards = {name: features.flip(0) for name, features in forwards.items()}
        expected = "up" if sign > 0 else "down"
        asked = [
            Question(f"{len(lab.clips)}a", "clip", "which way?", expected, kind="way"),
            Question(f"{len(lab.clips)}b", "clip", "which?", "never", kind="wrong"),
        ]
        lab.clips.append(views.Asked(forwards, backwards, asked))
    monkeypatch.setattr(MERV, "answer", read_vivit)
    found = views.whose_view_matters(lab.model, lab.clips)
    assert found["right", "way"] == 4 and found["right", "wrong"] == 0
    assert found["turning", "way"] == 4 and found["turning", "wrong"] == 4
    for encoder in TINY.encoders:
        expected = 4 if encoder.name == vivit else 0
        assert found["lost", encoder.label, "way"] == expected
        assert found["lost", encoder.label, "wrong"] == 0
        assert found["turned", encoder.label, "way"] == expected
        assert found["turned", encoder.label, "wrong"] == expected


def test_a_learning_curve_has_a_point_for_each_length_of_training(lab):
    """Other seeds, other mixers and what an older version of the code reached are left out."""
    panels = figures.learning_numbers(lab)["panels"]
    assert panels.keys() == {"action", "colour", "all"}
    assert list(panels["all"]) == ["MERV", "SigLIP"], "in the order of all pictures"
    assert panels["action"] == {"MERV": [(15, 25), (30, 75)], "SigLIP": [(30, 50)]}
    assert panels["all"]["MERV"] == [(15, 62.5), (30, 87.5)]


def test_in_the_world_of_two_kinds_clips_are_sorted_by_their_kind(lab):
    """Grey clips, which are only asked what happens, stand left of all others."""
    worlds = figures.mixing_numbers(lab)["worlds"]
    usual, two_kinds = worlds.values()
    torch.testing.assert_close(usual, views.mixing_of(lab.model, lab.clips))
    torch.testing.assert_close(two_kinds[:, 0], torch.tensor([0.9, 0.9, 0.3, 0.3]))
    lab.claims[figures.TWO_KINDS]["settings"]["encoders"] = ["another"]
    assert len(figures.mixing_numbers(lab)["worlds"]) == 1


def test_mixing_weights_of_clips_are_those_of_the_model(lab):
    """Row i is what MERV.encode returns for clip i."""
    found = views.mixing_of(lab.model, lab.clips)
    for row, seed in zip(found, range(3), strict=True):
        videos = {name: clip[None] for name, clip in random_pixels(seed).items()}
        torch.testing.assert_close(row, lab.model.encode(videos)[1][0])


def test_the_strip_predicts_each_label_from_the_place_before_it(model):
    """Every labelled token is predicted once, by its left neighbour; visual tokens by none."""
    conversation = [{"from": "human", "value": "what moves"}, {"from": "gpt", "value": "red"}]
    turns = render_prompt(conversation, TEMPLATES["base"])
    ids, labels = tokenize(turns, model.tokenizer)
    tokens = views.strip(model, turns)
    n = TINY.num_visual
    assert [token["id"] for token in tokens] == [ids[0], *[None] * n, *ids[1:]]
    labelled = [place for place, token in enumerate(tokens) if token["label"]]
    expected = [place + n for place, label in enumerate(labels) if label != IGNORE]
    assert labelled == expected
    for place, token in enumerate(tokens[:-1]):
        assert token["predicts"] == tokens[place + 1]["label"]
    assert not any(token["label"] for token in tokens[: n + 1])


def test_the_mask_hides_a_question_from_the_others_and_from_its_own_future(model):
    """The prefix is visible to every token of every question, and a question up to itself."""
    lab = figures.Lab(model, None, random_pixels(0), QUESTIONS[:3])
    found = figures.mask_numbers(lab)
    _, lengths = model.prompts(QUESTIONS[:3])
    s = max(lengths)
    assert found["prefix"] == 1 + TINY.num_visual
    for text, visible, length in found["masks"]:
        assert length == lengths[QUESTIONS.index(text)]
        assert visible.shape == (s, found["shown"] + s)
        assert visible[:, : found["shown"]].all()
        own = visible[:length, found["shown"] :]
        assert torch.equal(own, torch.ones(length, s).tril().bool())


def test_attention_of_the_last_token_is_what_the_layer_adds_up(model):
    """One full pass without a cache, and the softmax written out, give the same shares."""
    pixels, question = random_pixels(2), QUESTIONS[1]
    found = views.where_it_looks(model, pixels, question)
    assert found.shape == (len(model.llm.layers), *TINY.grid)
    ids, _ = model.prompts(question)
    visual, _ = model.encode({name: clip[None] for name, clip in pixels.items()})
    embed = model.llm.embed_tokens
    embeds = torch.cat([embed(torch.tensor([[1]])), visual, embed(ids)], dim=1)
    seen = []

    def naive(attention, inputs, output):
        x, rotary, _ = inputs
        q, k = (attention.split_heads(p(x)) for p in (attention.q_proj, attention.k_proj))
        half = attention.head_dim // 2
        turn = torch.complex(rotary.cos[:, :half], rotary.sin[:, half:])
        q, k = (torch.complex(y[..., :half], y[..., half:]) * turn for y in (q, k))
        group = q.shape[1] // k.shape[1]
        shares = []
        for head in range(q.shape[1]):
            scores = (q[0, head, -1] * k[0, head // group].conj()).sum(-1).real
            shares.append((scores / attention.head_dim**0.5).softmax(-1))
        v = attention.split_heads(attention.v_proj(x))[0]
        mixed = torch.cat([shares[h] @ v[h // group] for h in range(len(shares))])
        torch.testing.assert_close(attention.o_proj(mixed), output[0, -1], rtol=1e-3, atol=1e-4)
        seen.append(torch.stack(shares).mean(0)[1 : 1 + TINY.num_visual].view(TINY.grid))

    hooks = [layer.self_attn.register_forward_hook(naive) for layer in model.llm.layers]
    with torch.no_grad():
        model.llm.hidden_states(inputs_embeds=embeds)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, torch.stack(seen), rtol=1e-3, atol=1e-5)


def test_pooling_windows_of_14_to_8_overlap(lab):
    """Each window averages 2 or 3 neighbours, and some patches are in two windows."""
    by_size = {w.shape: w for w in figures.pooling_numbers(lab)["windows"]}
    assert {(2, 4), (8, 16), (8, 14)} <= by_size.keys()
    overlapping = (by_size[8, 14] > 0).sum(0)
    assert overlapping.max() == 2 and (by_size[8, 16] > 0).sum(0).max() == 1
    assert torch.equal(by_size[2, 4], pooling_matrix(4, 2, torch.device("cpu")))


# ----------------------------------------------------------------------------------------- pictures


def test_the_picture_of_the_architecture_has_the_shapes_of_the_code():
    """The committed figure 1, which README.md shows first, is what the code draws today.

    It has the shapes of the 7B model and those of the miniature, which other tests compute.
    """
    drawn, _ = fill("1-architecture", figures.architecture_numbers(None))
    committed = (ROOT / "docs/figures/1-architecture.svg").read_text(encoding="utf-8")
    assert committed == drawn, "python -m lesson figures draws it anew"
    for shape in ("16 × 8 × 8 = 1024 tokens × 4096", "32 frames → 16 × 14 × 14 × 768"):
        assert shape in drawn
    small = MERVS["miniature"]
    for encoder in small.encoders:
        grid = " × ".join(str(side) for side in (*encoder.grid, encoder.hidden_size))
        assert f"{encoder.num_frames} frames → {grid}" in drawn
    assert f"→ {small.num_visual} visual tokens × {small.llm.hidden_size}" in drawn


def test_every_figure_is_an_svg_with_a_title_and_a_caption(lab, tmp_path):
    """All ten are drawn for a model that nobody has seen, and the page shows each with its text."""
    report = figures.write_figures(lab, tmp_path)
    assert len(report) == len(figures.FIGURES) + 1
    assert not any("skipped" in line for line in report)
    page = (tmp_path / "README.md").read_text()
    for name in figures.FIGURES:
        root = xml.etree.ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert root.find("{*}title").text
        style = root.find("{*}style").text
        assert "prefers-color-scheme: dark" in style
        section = page.split(f"({name}.svg)")[1].split("##")[0]
        assert len(section.split()) >= 15, name
        # Nothing is drawn outside the view box, where it would be cut off.
        _, _, width, height = map(float, root.get("viewBox").split())
        for shape in root.iter():
            x, y = float(shape.get("x", 0)), float(shape.get("y", 0))
            right = x + float(shape.get("width", 0))
            bottom = y + float(shape.get("height", 0))
            assert x >= 0 and y >= 0, name
            assert right <= width + 1 and bottom <= height + 1, (name, shape.attrib)


def test_a_model_without_a_run_or_a_benchmark_gets_the_other_figures(lab, tmp_path):
    """A released checkpoint comes without them; figures 5, 6 and 10 are skipped and named."""
    lab.clips, lab.claims = [], {}
    report = figures.write_figures(lab, tmp_path)
    skipped = [line for line in report if line.startswith("skipped")]
    assert [re.search(r"\d+", line)[0] for line in skipped] == ["5", "6", "10"]
    assert len(list(tmp_path.glob("*.svg"))) == len(figures.FIGURES) - 3


def test_a_still_and_a_single_encoder_can_be_drawn(tokenizer, tmp_path):
    """Neither a picture instead of a video nor a model with one encoder is a special case."""
    single = MERV.create(replace(TINY, encoders=TINY.encoders[:1]), tokenizer).eval()
    still = tmp_path / "still.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(still)
    lab = figures.open_lab(single, still, ["what moves"])
    lab.clips = [views.look_both_ways(single, lab.pixels, [Question("1", "a", "what", "red")])]
    report = figures.write_figures(lab, tmp_path)
    assert [line for line in report if "skipped" in line] == [
        "skipped 10-learning: there are no claims"
    ]


@pytest.mark.parametrize("mixer", ["concat_sequence", "concat_channel", "learned", "mean"])
def test_other_mixers_can_be_drawn(tokenizer, mixer, tmp_path, short_clip):
    """A mixer that concatenates has four times as many visual tokens: figure 9 adds them up."""
    other = MERV.create(replace(TINY, mixer=mixer), tokenizer).eval()
    lab = figures.open_lab(other, short_clip, ["what moves"])
    looks = figures.attention_numbers(lab)["looks"]
    assert looks.shape[1:] == TINY.grid
    assert (looks.flatten(1).sum(1) <= 1).all()
    figures.write_figures(lab, tmp_path)


def test_the_command_draws_a_checkpoint_and_a_video(saved, short_clip, tmp_path, capsys):
    """`python -m lesson figures --checkpoint FOLDER --video FILE --data none`."""
    arguments = ["figures", "--checkpoint", str(saved), "--video", str(short_clip)]
    main([*arguments, "--data", "none", "--output", str(tmp_path), "--ask", "what moves"])
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "9-attention.svg").exists()


def test_the_page_of_a_clip_stands_alone(saved, short_clip, tmp_path, capsys):
    """One file without links: frames, grids, mixing weights, the strip, the answers.

    Every image is inside the file, every question has a column and a row of where it looks, and
    every encoder is once taken away and once deceived.
    """
    file = tmp_path / "page.html"
    main(["page", str(saved), str(short_clip), *QUESTIONS[:2], "--output", str(file)])
    page = file.read_text(encoding="utf-8")
    assert "<script src" not in page and "http" not in page and "<link" not in page
    assert 'name="viewport"' in page and "overflow-x" in page
    sources = re.findall(r'<img alt="[^"]+" src="([^"]{,22})', page)
    t = TINY.grid[0]
    assert len(sources) == t * (1 + 2 * len(TINY.encoders) + 2)
    assert set(sources) == {"data:image/png;base64,"}
    for question in QUESTIONS[:2]:
        assert f"<th>{question}</th>" in page
    for encoder in TINY.encoders:
        assert f"<th>without {encoder.label}</th>" in page
        assert f"<th>{encoder.label} deceived</th>" in page


def test_the_page_of_a_single_encoder_takes_nothing_away(tokenizer, short_clip):
    """There would be nothing left to mix; a learned mixer cannot mix fewer either."""
    single = MERV.create(replace(TINY, encoders=TINY.encoders[:1]), tokenizer).eval()
    learned = MERV.create(replace(TINY, mixer="learned"), tokenizer).eval()
    for model in (single, learned):
        lab = figures.open_lab(model, short_clip, ["what moves"])
        other = views.look_both_ways(model, lab.pixels, []).backwards
        answers = figures.page_numbers(lab, other)["answers"]
        assert list(answers) == ["all encoders", *[f"{label} deceived" for label in lab.labels]]


def test_a_question_about_html_cannot_change_the_page(saved, short_clip, tmp_path, capsys):
    """Text of questions and answers is escaped: <b> stays <b>."""
    file = tmp_path / "page.html"
    main(["page", str(saved), str(short_clip), "what <b>moves</b>", "--output", str(file)])
    page = file.read_text(encoding="utf-8")
    assert "what &lt;b&gt;moves&lt;/b&gt;" in page and "<b>" not in page


def test_an_unknown_command_names_those_that_exist(capsys):
    """`python -m lesson figure` explains itself instead of doing nothing."""
    with pytest.raises(SystemExit, match=r"Why:(.|\n)*Fix: .*figures"):
        main(["figure"])


def test_the_committed_pictures_belong_to_their_page():
    """docs/figures/README.md shows every picture of the folder, and no other."""
    folder = ROOT / "docs/figures"
    page = (folder / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(([\w-]+\.svg)\)", page))
    assert shown == {f"{name}.svg" for name in figures.FIGURES}
    assert shown == {file.name for file in folder.glob("*.svg")}


def test_committed_pictures_that_depend_on_no_weights_are_drawn_again():
    """Figure 3 letter by letter; figure 4 with the same empty cells, which random weights show."""
    model = MERV.create(MERVS["miniature"], None)
    frames = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    lab = figures.Lab(model, frames, model.pixels(frames), [])
    committed = ROOT / "docs/figures"
    drawn, _ = fill("3-pooling", figures.pooling_numbers(lab))
    assert (committed / "3-pooling.svg").read_text(encoding="utf-8") == drawn
    drawn, _ = fill("4-reach", figures.reach_numbers(lab))
    empty = re.compile(r"fill-opacity=.(0.00|)")
    stored = (committed / "4-reach.svg").read_text(encoding="utf-8")
    assert empty.findall(stored) == empty.findall(drawn)


def test_the_numbers_in_the_class_are_those_of_the_committed_picture():
    """Every "N of M" in the part about figure 5 is written in a cell of that picture."""
    page = (ROOT / "lesson/README.md").read_text(encoding="utf-8")
    part = page[page.index("**1:00") : page.index("**1:20")]
    quoted = re.findall(r"\d+ of \d+", " ".join(part.split()))
    assert len(quoted) >= 5
    assert set(quoted) <= set(pictures.texts(ROOT / "docs/figures", "5-matters"))


def test_pictures_that_say_something_else_are_noticed(tmp_path):
    """tests/pictures.py, with which .ci/run compares the pictures of a model trained anew."""
    committed = ROOT / "docs/figures"
    assert pictures.differences(committed) == []
    shares = pictures.shares(committed)
    assert pictures.leader(shares["lost", "shape"]) == "siglip"
    assert pictures.leader(shares["turned", "temporal"]) == "vivit"
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    for name, old, new in [
        ("5-matters", "siglip", "other"), ("4-reach", "dinov2", "dino"),
        ("2-views", "step", "time"), ("6-mixing", r"siglip  0\.\d+", "siglip  0.99"),
    ]:  # fmt: skip
        file = tmp_path / f"{name}.svg"
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(old, new, text), encoding="utf-8")
        assert any(name in line for line in pictures.differences(tmp_path)), name
        file.write_text(text, encoding="utf-8")


def test_the_lesson_stays_small():
    """At most 900 lines of Python, exercises and solutions included."""
    files = (ROOT / "lesson").rglob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 900
