"""Loading a checkpoint takes as much memory as the model, not as the checkpoint (ledger F11)."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merv
from encoders import load_encoder, save_encoder
from llama import LLAMAS, Llama, LlamaConfig
from merv import FOUR, MERV
from support.released import AUTHORS_ENCODERS

pytestmark = pytest.mark.slow
LLAMA = replace(
    LLAMAS["llama2-7b"],
    vocab_size=32064,
    hidden_size=1024,
    intermediate_size=2752,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
)


def test_loading_peaks_at_the_size_of_the_model(tmp_path, shared_folder):
    """A float32 checkpoint of 660 MB becomes a bfloat16 model of 330 MB.

    Loading allocates at most 1.1 times the model: pages mapped from the file do not count, as the
    system can drop them. A new process loads it, so that nothing else is measured.
    """
    torch.manual_seed(0)
    language = {f"llm.model.{k}": v for k, v in Llama(LLAMA).state_dict().items()}
    language["llm.lm_head.weight"] = language.pop("llm.model.lm_head.weight")
    d, inner = LLAMA.hidden_size, 768
    projectors = {}
    for index in range(4):
        projectors[f"{index}.projector.projector.weight"] = torch.randn(d, 96)
        projectors[f"{index}.projector.projector.bias"] = torch.randn(d)
    attention = torch.nn.MultiheadAttention(inner, 1, kdim=d, vdim=d)
    fusion = {f"attention.{k}": v for k, v in attention.state_dict().items()}
    fusion["Q"] = torch.randn(1, inner)
    parts = {"projectors": projectors, "feature_fusion": fusion, "llm_backbone": language}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": parts}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    settings = {"video_backbone_ids": list(AUTHORS_ENCODERS), "projector_token_length": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model": settings}))
    for name in FOUR:
        save_encoder(load_encoder(f"miniature-{name}"), tmp_path / f"{name}.safetensors")
    tokenizer = str(shared_folder / "data" / "llama2_tokenizer.model")
    code = f"import test_memory; test_memory.measure({str(tmp_path)!r}, {tokenizer!r})"
    found = in_new_process(code)
    assert found["model"] > 300e6
    assert found["peak"] < 1.1 * found["model"], found


def in_new_process(code: str) -> dict:
    """Run a line of Python beside this file in a new process; what it prints, as JSON."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(here)!r}, '.']; {code}"],
        capture_output=True, text=True, timeout=200, cwd=here.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_to_train_stays_in_its_files_until_it_is_sharded(tmp_path):
    """Each of eight processes on a machine used to build the whole 7B in float32: 243 GB.

    MERV.create leaves the weights mapped to their files. Even when all of them have
    been read, a process holds less than 5 % of the model's bytes in memory of its own.
    """
    folder = tmp_path / "llama"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": LLAMA.vocab_size, "num_attention_heads": 8}
    config |= {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = {}
    for name, tensor in Llama(LLAMA).state_dict().items():
        prefix = "" if name.startswith("lm_head") else "model."
        state[prefix + name] = tensor.half()
    save_file(state, folder / "model.safetensors")
    for name in FOUR:
        save_encoder(load_encoder(f"miniature-{name}"), tmp_path / f"{name}.safetensors")
    found = in_new_process(f"import test_memory; test_memory.measure_create({str(tmp_path)!r})")
    assert found["model"] > 300e6
    assert found["own"] < 0.05 * found["model"], found


def measure_create(folder: str) -> None:
    """Create a model to train; print its size and the memory that creating and reading it took."""
    MERV.create(merv.MERVS["miniature"], None)  # libraries allocate memory at their first use
    encoders = []
    for name in FOUR:
        config = merv.ENCODERS[f"miniature-{name}"]
        encoders.append(replace(config, source=f"{folder}/{name}.safetensors"))
    llm = replace(LLAMA, source=f"{folder}/llama")
    config = replace(merv.MERVS["miniature"], encoders=tuple(encoders), llm=llm)
    before = anonymous_memory()
    model = MERV.create(config, None)
    for parameter in model.parameters():
        parameter.data.view(-1)[::512].sum()
    own = anonymous_memory() - before
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"model": size, "own": own}))


def anonymous_memory() -> int:
    """Bytes of memory of this process that are not pages of a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def measure(folder: str, tokenizer: str) -> None:
    """Load in bfloat16; print the size of the model and the peak of allocated memory, in bytes."""
    use_small_model(LLAMA)
    MERV.create(merv.MERVS["miniature"], None)  # libraries allocate memory at their first use
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    sources = {name: Path(folder) / f"{name}.safetensors" for name in FOUR}
    model = MERV.from_pretrained(folder, torch.bfloat16, tokenizer=tokenizer, sources=sources)
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"model": size, "peak": peak - before}))


def use_small_model(llama: LlamaConfig) -> None:
    """Replace the released encoders and LLaMA by small ones under the same names."""
    merv.LLAMAS["llama2-7b"] = llama
    for name in FOUR:
        merv.ENCODERS[name] = replace(merv.ENCODERS[f"miniature-{name}"], name=name)
