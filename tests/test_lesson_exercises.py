"""lesson/: the checks of the eight exercises. `python -m lesson check N` runs those of exercise N.

Every check runs twice in the test suite: on the solution, which must pass, and on the stub, which
must fail with NotImplementedError and its hint.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import tokenize
from encoders import ENCODERS, FAMILIES
from lesson import views
from lesson.__main__ import main
from merv import MERV, MERVS, CrossAttentionMixer, project
from support.released import fold_query
from support.variants import MeanMixer

ROOT = Path(__file__).resolve().parents[1]
STUB = pytest.mark.xfail(raises=NotImplementedError, strict=True)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["solutions", pytest.param("exercises", marks=STUB, id="stub")])
def work(request):
    """The module that is checked: a stub of lesson/exercises, or its solution."""
    number = request.node.name.split("_")[1]
    (file,) = (ROOT / "lesson" / request.param).glob(f"e{number}_*.py")
    torch.manual_seed(int(number))
    return importlib.import_module(f"lesson.{request.param}.{file.stem}")


@pytest.fixture(autouse=True)
def only_known_encoders():
    """Encoders that exercise 8 adds are gone after its checks."""
    before, families = dict(ENCODERS), dict(FAMILIES)
    yield
    for table, entries in ((ENCODERS, before), (FAMILIES, families)):
        table.clear()
        table.update(entries)


# ------------------------------------------------------------------------------ 1. pooling by loops


@pytest.mark.parametrize(("size", "side"), [(4, 2), (16, 8), (14, 8), (5, 3)])
def test_1_loops_pool_as_merv_does(work, size, side):
    """Every window begins at the rounded-down border and ends at the rounded-up one."""
    grid = torch.randn(size, size, 6)
    expected = project(grid[None, None], nn.Identity(), side).view(side, side, 6)
    close(work.pool(grid, side), expected, "Does window i end at ceil((i + 1) * size / side)?")


def close(found, expected, why: str) -> None:
    """Fail with both types or shapes, or with the largest difference and why it may be."""
    kind = type(found).__name__
    assert kind in ("Tensor", "Parameter"), f"your function must return a tensor, not {kind}"
    shape, wanted = tuple(found.shape), tuple(expected.shape)
    assert shape == wanted, f"your result has shape {shape}, not {wanted}"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{why}\n{m}")


# ------------------------------------------------------------------------------------ 2. equation 2


def test_2_tokens_are_mixed_by_equation_2(work):
    """The weights are a softmax over encoders, and the tokens are the weighted sum."""
    x_bend = torch.randn(2, 4, 7, 12)
    mixer = CrossAttentionMixer(12)
    nn.init.normal_(mixer.query, std=5)
    visual, weights = mixed(work, x_bend, mixer.query)
    expected, expected_weights = mixer(x_bend)
    close(weights, expected_weights, "Weights: a softmax over e of Q . mean token / sqrt(d).")
    close(visual, expected, "Tokens: the sum over e of weight times tokens.")


def mixed(work, x_bend, query):
    """The two tensors that `mix` returns."""
    found = work.mix(x_bend, query)
    assert isinstance(found, tuple), "return two tensors: visual tokens, mixing weights"
    return found


def test_2_permuting_encoders_permutes_their_weights(work):
    """Equation 2 knows an encoder only by its tokens, not by its place."""
    x_bend, query, order = torch.randn(2, 4, 7, 12), torch.randn(12), [2, 0, 3, 1]
    visual, weights = mixed(work, x_bend, query)
    same_visual, permuted = mixed(work, x_bend[:, order], query)
    close(permuted, weights[:, order], "An encoder's weight must follow it to its new place.")
    close(same_visual, visual, "The order of encoders must not change the visual tokens.")


# --------------------------------------------------------------------------- 3. a mixer of your own


def test_3_a_mixer_returns_tokens_and_weights_that_sum_to_1(work):
    """This is the interface of support/variants.py."""
    visual, weights = work.Mixer(8, 4)(torch.randn(2, 4, 5, 8))
    assert visual.shape == (2, 5, 8), "visual tokens are (b, n, d)"
    assert weights.shape == (2, 4), "mixing weights are (b, e)"
    close(weights.sum(1), torch.ones(2), "The weights of a clip sum to 1 over its encoders.")


def test_3_a_trained_mixer_trusts_the_encoder_that_knows(work):
    """Sixty steps take its loss below 80 % of what equal mixing weights reach."""
    loss, equal = loss_after_sixty_steps(work.Mixer(8, 4)), loss_after_sixty_steps(MeanMixer(8, 4))
    assert loss < 0.8 * equal, "the weights must depend on channel 0, which tells who knows"


def loss_after_sixty_steps(mixer: nn.Module) -> float:
    """Train a mixer with a classifier that reads it: mean loss of the last ten steps, in nats.

    Each of four encoders says one of four things, in channels 1 to 4. One of them is right, and
    channel 0 of its tokens is 2 instead of 0.
    """
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW([*mixer.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        said = torch.randint(4, (64, 4), generator=generator)
        knows = torch.randint(4, (64,), generator=generator)
        mark = 2 * F.one_hot(knows, 4)[:, :, None]
        key = torch.cat([mark, F.one_hot(said, 4), torch.zeros(64, 4, 3)], dim=2)
        visual, _ = mixer(key[:, :, None].expand(-1, -1, 5, -1))
        right = said.gather(1, knows[:, None])[:, 0]
        loss = F.cross_entropy(head(visual.mean(1)), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


# ----------------------------------------------------------------------------- 4. labels from turns


class Words:
    """A toy tokenizer: a word is one token, and its id is 10 plus its length."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [10 + len(word) for word in text.split()]


TURNS = [("In: what is it Out:", False), ("a cat", True), ("In: where Out:", False), ("up", True)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_4_labels_cover_answers_and_the_token_that_ends_them(work, count):
    """A prompt has no labels, whether an answer follows or not."""
    ids, labels = work.ids_and_labels(TURNS[:count], Words())
    expected_ids, expected_labels = tokenize(TURNS[:count], Words())
    assert list(ids) == expected_ids, "ids: bos_id first, eos_id after each answer"
    assert list(labels) == expected_labels, "labels: -100 but for answers and their eos_id"


# ---------------------------------------------------------------- 5. blind to the direction of time


def test_5_a_blind_vivit_cannot_tell_a_clip_from_its_reverse(work):
    """Positions and kernels both tell the direction, so changing one of them is not enough."""
    vivit = views.narrow(ENCODERS["vivit"])
    clip = torch.randn(vivit.config.num_frames, 3, 8, 8)
    before, reverse = mean_features(vivit, clip, clip.flip(0))
    assert (before - reverse).abs().max() > 1e-3, "an untouched ViViT tells them apart"
    work.blind(vivit)
    after, reverse = mean_features(vivit, clip, clip.flip(0))
    spread = vivit.position_embedding[:, 1:].unflatten(1, vivit.config.grid).std(1).max()
    hint = "positions still differ over time" if spread > 1e-6 else "look at the kernels"
    close(after, reverse, f"It still tells forwards from backwards: {hint}.")


def mean_features(vivit, *clips) -> list[torch.Tensor]:
    return [views.features_of(vivit, clip).mean((0, 1, 2)) for clip in clips]


def test_5_a_blind_vivit_still_sees(work):
    """Setting everything to zero would be blind to time, and to all else."""
    vivit = views.narrow(ENCODERS["vivit"])
    clips = torch.randn(2, vivit.config.num_frames, 3, 8, 8)
    work.blind(vivit)
    one, other = mean_features(vivit, *clips)
    assert (one - other).abs().max() > 1e-3, "two clips look the same: too much was removed"
    left, right = views.features_of(vivit, clips[0]).mean(0)[0]
    assert (left - right).abs().max() > 1e-3, "places look the same: keep positions in space"


def test_5_positions_alone_change_nothing_for_a_single_tubelet():
    """Within two frames only the kernel can tell: why averaging it matters most in the miniature.

    A tubelet holds the motion between its frames, so a clip of one tubelet has no use for
    positions in time.
    """
    config = replace(ENCODERS["vivit"], num_frames=2)
    vivit = views.narrow(config)
    clip = torch.randn(2, 3, 8, 8)
    forwards, backwards = mean_features(vivit, clip, clip.flip(0))
    assert (forwards - backwards).abs().max() > 1e-3
    kernel = vivit.patch_embedding.weight.data
    kernel[:] = kernel.mean(2, keepdim=True)
    forwards, backwards = mean_features(vivit, clip, clip.flip(0))
    torch.testing.assert_close(forwards, backwards, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- 6. which time steps change


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit", "siglip"])
@pytest.mark.parametrize("window", [None, 4])
def test_6_the_steps_that_change_are_the_measured_ones(work, name, window):
    """Frames 0, 8 and the last one are changed, in the released sizes and with other windows."""
    config = ENCODERS[name]
    if window and config.temporal_window:
        config = replace(config, temporal_window=window)
    reached = views.reach(views.narrow(config), torch.randn(config.num_frames, 3, 8, 8))
    for frame in (0, 8, config.num_frames - 1):
        measured = (reached[frame] > 1e-6).nonzero().flatten().tolist()
        found = sorted(work.changed_steps(config, frame))
        assert found == measured, f"{name}, frame {frame} of {config.num_frames}: measured"


# ------------------------------------------------------------------------ 7. fold the fusion module


def test_7_one_query_gives_the_mixing_weights_of_the_whole_module(work):
    """Equation 2 with the folded query equals the authors' attention, value by value."""
    theirs = nn.MultiheadAttention(6, 1, kdim=8, vdim=8, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    query, keys = torch.randn(1, 6).double(), 3 * torch.randn(4, 8).double()
    _, expected = theirs(query, keys, keys)
    bias = theirs.in_proj_bias[:6]
    folded = work.fold(query[0], theirs.q_proj_weight, bias, theirs.k_proj_weight)
    assert folded.shape == (8,), "the query has the width of a key"
    mixer = CrossAttentionMixer(8)
    mixer.query = nn.Parameter(folded.detach())
    weights = mixer.mixing_weights(keys[None, :, None])
    close(weights, expected.float(), "Is the bias in? Is the factor sqrt(d / d_inner)?")


def test_7_the_folded_query_is_the_one_that_released_weights_get(work):
    """support.released.fold_query does the same with the names of the authors' file."""
    with torch.no_grad():
        fusion = nn.ParameterDict({"Q": torch.randn(1, 6)})
        fusion.attention = nn.MultiheadAttention(6, 1, kdim=8, vdim=8)
        state = {name: tensor.double() for name, tensor in fusion.state_dict().items()}
    q_weight, k_weight = state["attention.q_proj_weight"], state["attention.k_proj_weight"]
    folded = work.fold(state["Q"][0], q_weight, state["attention.in_proj_bias"][:6], k_weight)
    close(folded, fold_query(state), "Compare with support.released.fold_query.")


# ------------------------------------------------------------------------------- 8. a fifth encoder


def test_8_a_fifth_encoder_joins_the_other_four(work):
    """It needs an entry of ENCODERS and, if no family fits, a class; MERV takes the rest."""
    work = importlib.reload(work)  # its entry may have been removed after another check
    if work.NAME is None:
        raise NotImplementedError("add an entry to encoders.ENCODERS and set NAME to its key")
    assert work.NAME in ENCODERS, "there is no such entry in encoders.ENCODERS"
    four = MERVS["miniature"]  # its encoders have 4 time steps
    model = MERV.create(replace(four, encoders=(*four.encoders, ENCODERS[work.NAME])), None)
    frames = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    videos = {name: clip[None] for name, clip in model.pixels(frames).items()}
    visual, weights = model.encode(videos)
    assert weights.shape == (1, 5) and visual.shape[1] == four.num_visual
    features = model.encoders[work.NAME](videos[work.NAME])
    other = model.encoders[work.NAME](1 - videos[work.NAME])
    assert (features - other).abs().max() > 1e-3, "it says the same about every clip"


# -------------------------------------------------------------------------------------- the command


def test_the_command_says_what_is_not_done_and_why():
    """`python -m lesson check 2` runs the checks on the stub: they fail, with the stub's hint."""
    command = [sys.executable, "-m", "lesson", "check", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "one key for each encoder" in done.stdout
    assert "test_2_permuting_encoders_permutes_their_weights" in done.stdout
    assert "[solutions]" not in done.stdout and "2 failed" in done.stdout


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, r"must return a tensor, not NoneType"),
        (torch.zeros(4, 6), r"has shape \(4, 6\), not \(2, 2, 6\)"),
        (torch.ones(2, 2, 6), r"Is it 0\?"),
    ],
)
def test_a_wrong_result_is_named_before_a_reason_is_guessed(found, said):
    """A forgotten `return` once printed the whole expected tensor, under a hint about windows."""
    with pytest.raises(AssertionError, match=said) as failure:
        close(found, torch.zeros(2, 2, 6), "Is it 0?")
    assert "tensor(" not in str(failure.value)
    assert ("Is it 0?" in str(failure.value)) == ("Is it" in said)


@pytest.mark.parametrize("number", ["0", "9", "two", "1 or True"])
def test_an_exercise_that_does_not_exist_is_named(number):
    """The message lists those that exist; nothing else is run."""
    with pytest.raises(SystemExit, match=r"no exercise(.|\n)*e1_pooling"):
        main(["check", number])


def test_every_exercise_has_a_solution_of_the_same_name_and_at_most_50_lines():
    """And there are eight, each with a check of its number."""
    checks = Path(__file__).read_text(encoding="utf-8")
    stubs = sorted((ROOT / "lesson/exercises").glob("e*.py"))
    solutions = sorted((ROOT / "lesson/solutions").glob("e*.py"))
    assert [stub.name for stub in stubs] == [solution.name for solution in solutions]
    assert len(stubs) == 8
    for number, file in enumerate(stubs, start=1):
        assert file.name.startswith(f"e{number}_") and f"def test_{number}_" in checks
    for file in stubs + solutions:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 50
