"""Every module imports where torch imports: on a Mac, on Windows, in a bare installation."""

import subprocess
import sys

from density import ROOT, product_files

WITHOUT = """
import sys, types
sys.path.insert(0, {root!r})
sys.modules["resource"] = None  # Windows has no such module
sys.modules["tensorboard"] = None  # optional
import torch
torch.ops.mkldnn = types.SimpleNamespace()  # macOS wheels have no oneDNN operators
torch.distributed.is_nccl_available = lambda: False
import importlib
for name in {names!r}:
    importlib.import_module(name)
from support.runs import peak_memory
assert peak_memory(torch.device("cpu")) is None
"""


def test_every_module_imports_without_what_other_platforms_lack():
    """Without `resource`, oneDNN's operators, NCCL and TensorBoard."""
    names = []
    for file in product_files():
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            names.append(name)
    code = WITHOUT.format(root=str(ROOT), names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
