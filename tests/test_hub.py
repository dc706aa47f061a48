"""Loading by hub id with the real client, from a hub on this machine (hub_server.py).

Hugging Face's client reads the environment when it is imported. So worker processes with their own
environments load the models here: one is online, one has HF_HUB_OFFLINE=1, and the hub of the third
does not answer. They share one cache; every test has its own repositories.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unit_scale
from hub_server import Fault, Hub, commit
from safetensors.torch import load_file, save
from torch import nn

from encoders import ENCODERS, EncoderConfig, load_encoder, save_encoder
from llama import load_llama
from support.errors import CheckpointError
from support.weights import FILES
from tests.foreign_files import TINY_LLAMA, llama_of_meta

pytestmark = pytest.mark.slow

SIGLIP = ENCODERS["miniature-siglip"]


# ------------------------------------------------------------------------------- clients of the hub


@dataclass
class Client:
    """A process that loads models; its downloads go to `cache`."""

    pool: ProcessPoolExecutor
    cache: Path

    def load(self, load: Callable, *arguments: object) -> tuple[object, dict[str, np.ndarray]]:
        """Run load(*arguments) in the process: the model's configuration and weights."""
        return self.pool.submit(loaded, load, *arguments).result(timeout=60)

    def folder(self, name: str) -> Path:
        """The folder of the repository "owner/name" in the cache."""
        return self.cache / f"models--{name.replace('/', '--')}"


def loaded(load: Callable, *arguments: object) -> tuple[object, dict[str, np.ndarray]]:
    model = load(*arguments)
    return model.config, {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home) -> Iterator[Client]:
    yield from start(home, HF_ENDPOINT=hub.endpoint)


def start(home: Path, **environment: str) -> Iterator[Client]:
    environment |= {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
        "OMP_NUM_THREADS": "1",
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(loaded, load_encoder, SIGLIP).result(timeout=60)  # starts the process
        yield Client(pool, home / "hub")


@pytest.fixture(scope="module")
def offline(hub, home) -> Iterator[Client]:
    yield from start(home, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def out_of_reach(home) -> Iterator[Client]:
    """HF_HUB_OFFLINE is not set, but no server listens."""
    yield from start(home, HF_ENDPOINT="http://127.0.0.1:9")


# ------------------------------------------------------------------------------- download and cache


def test_an_encoder_from_the_hub_is_the_one_in_the_local_file(hub, online, tmp_path):
    """Its metadata is requested once, the file downloaded once and stored under its commit."""
    files = {"model.safetensors": encoder_file(tmp_path)}
    hub.publish("owner/first", files)
    config, weights = online.load(load_encoder, SIGLIP, "owner/first")
    assert config == SIGLIP
    assert_same(weights, tensors_of(load_encoder(SIGLIP, tmp_path)))
    (head, path, _), (get, large, _) = hub.asked("owner/first")
    assert (head, path) == ("HEAD", "/owner/first/resolve/main/model.safetensors")
    assert (get, large[:5]) == ("GET", "/cdn/")
    kept = online.folder("owner/first") / "snapshots" / commit(files) / "model.safetensors"
    assert kept.read_bytes() == files["model.safetensors"]


def encoder_file(
    folder: Path, config: EncoderConfig = SIGLIP, seed: int = 0, file: str = "model.safetensors"
) -> bytes:
    """Write a checkpoint with all blocks, in the released format, as `file`; return its bytes."""
    encoder = unit_scale(load_encoder(replace(config, num_layers=config.released_layers)), seed)
    save_encoder(encoder, folder / "model.safetensors")
    if file.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    return (folder / file).read_bytes()


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def tensors_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in model.state_dict().items()}


def test_the_second_load_requests_only_metadata(hub, online, tmp_path):
    hub.publish("owner/twice", {"model.safetensors": encoder_file(tmp_path)})
    _, first = online.load(load_encoder, SIGLIP, "owner/twice")
    before = len(hub.asked("owner/twice"))
    _, second = online.load(load_encoder, SIGLIP, "owner/twice")
    assert_same(first, second)
    assert [method for method, *_ in hub.asked("owner/twice")[before:]] == ["HEAD"]


def test_a_new_commit_on_main_is_downloaded(hub, online, tmp_path):
    """The cached files of a branch are not used once the branch has a new commit."""
    hub.publish("owner/moves", {"model.safetensors": encoder_file(tmp_path, seed=1)})
    _, old = online.load(load_encoder, SIGLIP, "owner/moves")
    hub.publish("owner/moves", {"model.safetensors": encoder_file(tmp_path, seed=2)})
    _, new = online.load(load_encoder, SIGLIP, "owner/moves")
    assert_same(new, tensors_of(load_encoder(SIGLIP, tmp_path)))
    assert not np.array_equal(old["position_embedding"], new["position_embedding"])


def test_a_pinned_revision_gives_the_bytes_of_that_revision(hub, online, tmp_path):
    """A revision is a tag, "owner/name@v1", or a full commit; "owner/name" alone is main."""
    (tmp_path / "main").mkdir()
    (tmp_path / "v1").mkdir()
    old = {"model.safetensors": encoder_file(tmp_path / "v1", seed=1)}
    hub.publish("owner/pinned", {"model.safetensors": encoder_file(tmp_path / "main", seed=2)})
    hub.publish("owner/pinned", old, "v1")
    for source, folder in [
        ("owner/pinned", "main"),
        ("owner/pinned@v1", "v1"),
        (f"owner/pinned@{commit(old)}", "v1"),
        ("owner/pinned@main", "main"),
    ]:
        _, weights = online.load(load_encoder, SIGLIP, source)
        assert_same(weights, tensors_of(load_encoder(SIGLIP, tmp_path / folder)))


@pytest.mark.parametrize(
    "kind", ["siglip", "dinov2", "vivit", "languagebind", "llama", "llama of Meta"]
)
def test_downloaded_models_load_offline(kind, hub, online, offline, tmp_path):
    """HF_HUB_OFFLINE=1 sends no request, whatever the files are called: ViViT and LanguageBind are
    released as pytorch_model.bin, LLaMA as an index and shards.

    Our error message recommends `hf download`, which does not record the files that a repository
    lacks, so the test removes those records.
    """
    files, how = as_the_hub_has_it(kind, tmp_path)
    name = f"owner/off-{kind.replace(' ', '-')}"
    hub.publish(name, files)
    config, before = online.load(*how, name)
    shutil.rmtree(online.folder(name) / ".no_exist", ignore_errors=True)
    asked = len(hub.requests)
    again, after = offline.load(*how, name)
    assert_same(after, before)
    assert again == config
    assert len(hub.requests) == asked


def as_the_hub_has_it(kind: str, folder: Path) -> tuple[dict[str, bytes], tuple]:
    """The files of a repository like the released one, and the call that loads it."""
    if kind == "llama":
        return sharded_llama(), (load_llama,)
    if kind == "llama of Meta":
        return llama_of_meta(scaled_llama()), (load_llama,)
    config = ENCODERS[f"miniature-{kind}"]
    file = "model.safetensors" if kind in ("siglip", "dinov2") else "pytorch_model.bin"
    files = {file: encoder_file(folder, config, file=file)}
    if kind == "languagebind":
        files["config.json"] = b'{"vision_config": {"hidden_act": "quick_gelu"}}'
    return files, (load_encoder, config)


def sharded_llama(seed: int = 0) -> dict[str, bytes]:
    """The files of a repository such as meta-llama/Llama-2-7b-hf: config, index and two shards."""
    model = scaled_llama(seed)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": x
        for name, x in model.state_dict().items()
    }
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(tensors)}
    config = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": where}).encode(),
        **{s: save({n: x for n, x in tensors.items() if where[n] == s}) for s in shards},
    }


def scaled_llama(seed: int = 0) -> nn.Module:
    return unit_scale(load_llama(TINY_LLAMA), seed)


def test_a_model_that_was_never_downloaded_is_an_error_offline(hub, offline, tmp_path):
    hub.publish("owner/never", {"model.safetensors": encoder_file(tmp_path)})
    with pytest.raises(CheckpointError) as error:
        offline.load(load_encoder, SIGLIP, "owner/never")
    assert "Cannot download model.safetensors or " in str(error.value)
    assert " of owner/never.\nWhy: LocalEntryNotFoundError: " in str(error.value)
    assert "cannot find the requested files in the local cache" in str(error.value)
    assert "Fix: connect to the internet, or run `hf download owner/never` while" in str(
        error.value
    )
    assert hub.asked("owner/never") == []


def test_a_pinned_revision_loads_offline_and_does_not_replace_main(hub, online, offline, tmp_path):
    files = {"model.safetensors": encoder_file(tmp_path, seed=1)}
    hub.publish("owner/kept", {"model.safetensors": encoder_file(tmp_path, seed=2)})
    hub.publish("owner/kept", files, "v1")
    _, before = online.load(load_encoder, SIGLIP, "owner/kept@v1")
    _, after = offline.load(load_encoder, SIGLIP, "owner/kept@v1")
    assert_same(after, before)
    with pytest.raises(CheckpointError, match="cannot find the requested files in the local cache"):
        offline.load(load_encoder, SIGLIP, "owner/kept")


def test_cached_files_load_when_the_hub_does_not_answer(hub, online, out_of_reach, tmp_path):
    """Without HF_HUB_OFFLINE: the connection fails and the cache is used."""
    hub.publish("owner/refused", {"model.safetensors": encoder_file(tmp_path)})
    _, before = online.load(load_encoder, SIGLIP, "owner/refused")
    _, after = out_of_reach.load(load_encoder, SIGLIP, "owner/refused")
    assert_same(after, before)


# -------------------------------------------------------------------------------- errors of the hub


def test_a_gated_repository_is_explained(hub, online):
    """The message says where to accept the licence, and with which command to log in."""
    gated = hub.publish("owner/gated", {"model.safetensors": b""})
    gated.refusal = (401, {"X-Error-Code": "GatedRepo"})
    message = explanation(online, load_encoder, SIGLIP, "owner/gated")
    assert message.startswith("Cannot download model.safetensors or ")
    assert " of owner/gated.\nWhy: GatedRepoError: " in message
    assert "Cannot access gated repo for url " in message
    assert message.endswith(
        "\nFix: accept its licence at huggingface.co/owner/gated, then run `hf auth login`."
    )


def explanation(client: Client, *arguments: object) -> str:
    with pytest.raises(CheckpointError) as error:
        client.load(*arguments)
    return str(error.value)


def test_a_repository_that_does_not_exist_is_explained(online):
    message = explanation(online, load_encoder, SIGLIP, "owner/nobody")
    assert " of owner/nobody.\nWhy: RepositoryNotFoundError: " in message
    assert "Repository Not Found for url: " in message
    assert "\nFix: check the name (a local path must exist), the connection and `hf auth" in message


def test_a_revision_that_does_not_exist_is_explained(hub, online):
    hub.publish("owner/revisions", {"model.safetensors": b""})
    message = explanation(online, load_encoder, SIGLIP, "owner/revisions@v7")
    assert " of owner/revisions@v7.\nWhy: RevisionNotFoundError: " in message
    assert "Revision Not Found for url: " in message and "/resolve/v7/" in message
    assert "\nFix: " in message


def test_a_token_that_has_expired_is_explained(hub, online):
    """The hub then rejects requests for public repositories too; its words are passed on."""
    expired = hub.publish("owner/expired", {"model.safetensors": b""})
    words = "Invalid credentials in Authorization header"
    expired.refusal = (401, {"X-Error-Message": words})
    message = explanation(online, load_encoder, SIGLIP, "owner/expired")
    assert "owner/expired" in message
    assert words in message


@pytest.mark.parametrize("name", ["./weights", "owner/a--b"])
def test_a_name_that_no_repository_can_have_is_explained(name, online):
    """It is most likely a misspelled path: the message has it, a reason and a fix."""
    message = explanation(online, load_encoder, SIGLIP, name)
    assert name in message
    assert "\nWhy: " in message
    assert "\nFix: " in message


def test_a_repository_without_weights_is_explained(hub, online):
    """Each file name of the released formats is tried, and the message lists them all."""
    hub.publish("owner/empty", {"README.md": b"weights follow"})
    assert explanation(online, load_encoder, SIGLIP, "owner/empty") == (
        f"Found no {' or '.join(FILES)} at owner/empty.\n"
        "Why: a source is a file, or a folder or hub id (owner/name) that has one of these files.\n"
        "Fix: check the path or the name, and that the download or copy is complete."
    )
    assert [path.rpartition("/")[2] for _, path, _ in hub.asked("owner/empty")] == [*FILES]


# ---------------------------------------------------------------------------- interrupted downloads


def test_an_interrupted_download_resumes_where_it_stopped(hub, online, tmp_path):
    """The client writes 10 MB at a time, so a 13 MB file cut off after 11 MB resumes at 10 MB."""
    config = replace(SIGLIP, hidden_size=512, released_layers=1, num_layers=1)
    content = encoder_file(tmp_path, config)
    assert len(content) > 12_000_000
    hub.publish("owner/cut", {"model.safetensors": content}).fault = Fault(11_000_000, times=1)
    _, weights = online.load(load_encoder, config, "owner/cut")
    assert_same(weights, tensors_of(load_encoder(config, tmp_path)))
    downloads = [wanted for method, _, wanted in hub.asked("owner/cut") if method == "GET"]
    assert downloads == [None, "bytes=10485760-"]


@pytest.mark.parametrize(
    ("times", "honest"), [(6, True), (1, False)], ids=["cut off every time", "too short"]
)
def test_a_download_that_never_completes_is_explained(times, honest, hub, online, tmp_path):
    """It is cut off at each of the client's 6 attempts, or the answer claims to be complete but is
    shorter than the hub says the file is."""
    name = f"owner/broken-{times}"
    broken = hub.publish(name, {"model.safetensors": encoder_file(tmp_path)})
    broken.fault = Fault(100_000, times, honest)
    message = explanation(online, load_encoder, SIGLIP, name)
    assert "model.safetensors" in message
    assert name in message
    assert "\nWhy: " in message
    assert "\nFix: " in message


def test_a_download_that_fails_leaves_nothing_and_the_next_one_works(hub, online, tmp_path):
    """A partial file under the final name would be taken for a complete one by the next run."""
    heals = hub.publish("owner/heals", {"model.safetensors": encoder_file(tmp_path)})
    heals.fault = Fault(100_000, times=1, honest=False)
    with pytest.raises((CheckpointError, OSError)):  # the test above checks the message
        online.load(load_encoder, SIGLIP, "owner/heals")
    assert left_over(online, "owner/heals") == []
    _, weights = online.load(load_encoder, SIGLIP, "owner/heals")
    assert_same(weights, tensors_of(load_encoder(SIGLIP, tmp_path)))


def left_over(client: Client, name: str) -> list[Path]:
    """Complete and partial files of a repository in the cache, without its references."""
    files = [path for path in client.folder(name).rglob("*") if path.is_file()]
    return [path for path in files if "refs" not in path.parts]


# -------------------------------------------------------------------------- models of several files


def test_a_sharded_llama_loads_by_its_hub_id(hub, online):
    """It has config.json, an index and two shards, and no model.safetensors."""
    hub.publish("owner/sharded", sharded_llama())
    config, weights = online.load(load_llama, "owner/sharded")
    assert config == replace(TINY_LLAMA, name="sharded", source="owner/sharded")
    assert_same(weights, tensors_of(scaled_llama()))


def test_a_llama_as_meta_ships_it_loads_by_its_hub_id(hub, online):
    """It has params.json and two consolidated.*.pth, as meta-llama/Llama-2-13b; both are read."""
    hub.publish("owner/meta", llama_of_meta(scaled_llama()))
    config, weights = online.load(load_llama, "owner/meta")
    assert (config.name, config.source) == ("meta", "owner/meta")
    assert (config.intermediate_size, config.vocab_size) == (256, 97)
    assert_same(weights, tensors_of(scaled_llama()))


def test_only_one_of_two_formats_is_downloaded(hub, online):
    """Of a repository in both Hugging Face's and Meta's format we read one: 13 GB instead of 26."""
    hub.publish("owner/both", sharded_llama(seed=1) | llama_of_meta(scaled_llama(seed=2)))
    _, weights = online.load(load_llama, "owner/both")
    assert_same(weights, tensors_of(scaled_llama(seed=1)))
    assert len([1 for method, path, _ in hub.asked("owner/both") if "/cdn/" in path]) == 2


def test_all_shards_come_from_the_requested_revision(hub, online):
    hub.publish("owner/revised", sharded_llama(seed=1))
    hub.publish("owner/revised", sharded_llama(seed=2), "v1")
    _, weights = online.load(load_llama, "owner/revised@v1")
    assert_same(weights, tensors_of(unit_scale(load_llama(TINY_LLAMA), seed=2)))


def test_a_missing_shard_is_named(hub, online):
    files = sharded_llama()
    del files["model-00002-of-00002.safetensors"]
    hub.publish("owner/lacking", files)
    message = explanation(online, load_llama, "owner/lacking")
    assert "Found no model-00002-of-00002.safetensors at owner/lacking." in message


@pytest.mark.parametrize("source", ["lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5@v1"])
def test_a_known_model_keeps_its_prompt_template_when_its_revision_is_pinned(source, hub, online):
    """With the prompts of base LLaMA, Vicuna would give worse answers and no error."""
    hub.publish("lmsys/vicuna-7b-v1.5", sharded_llama())
    hub.publish("lmsys/vicuna-7b-v1.5", sharded_llama(), "v1")
    config, _ = online.load(load_llama, source)
    assert config.template == "vicuna"


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_languagebinds_config_is_read_beside_its_pytorch_bin(revision, hub, online, tmp_path):
    """It states the activation: quick_gelu on main, gelu in v1."""
    config = ENCODERS["miniature-languagebind"]
    weights = {"pytorch_model.bin": encoder_file(tmp_path, config, file="pytorch_model.bin")}
    for name, activation in (("main", "quick_gelu"), ("v1", "gelu")):
        vision_config = {"vision_config": {"hidden_act": activation}}
        hub.publish(
            "owner/bind", weights | {"config.json": json.dumps(vision_config).encode()}, name
        )
    found, weights = online.load(load_encoder, config, f"owner/bind{revision}")
    assert found.activation == ("gelu" if revision else "quick_gelu")
    assert found.temporal_window == 4
    assert_same(weights, tensors_of(load_encoder(config, tmp_path)))


def test_languagebind_without_a_config_has_the_released_activation(hub, online, tmp_path):
    config = ENCODERS["miniature-languagebind"]
    content = encoder_file(tmp_path, config, file="pytorch_model.bin")
    hub.publish("owner/bare", {"pytorch_model.bin": content})
    found, _ = online.load(load_encoder, config, "owner/bare")
    assert found.activation == "gelu"


@pytest.mark.parametrize(
    "content", [{"vision_config": [7]}, {"vision_config": {"hidden_act": "relu"}},
                {"vision_config": {"hidden_act": ["gelu"]}}]
)  # fmt: skip
def test_a_foreign_config_beside_languagebind_is_named(tmp_path, content):
    """These were an AttributeError, a KeyError and a TypeError."""
    config = ENCODERS["miniature-languagebind"]
    encoder_file(tmp_path, config, file="pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config.json: (vision_config|hidden_act) is"):
        load_encoder(config, tmp_path)
