"""The default data and encoders, made from nothing: a few minutes on two cores.

Read world.py for what the clips show, specialists.py for how the encoders learn.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import encoders
from miniature import specialists, world


def prepare(folder: str | Path = "data/miniature", seed: int = 0) -> Path:
    """The folder with the world and encoders-<seed>/NAME.safetensors, made where they are not yet.

    What older code made is replaced. Not for two processes at once: rank 0 goes first.
    """
    folder = Path(folder)
    make(folder, (world,), partial(world.write_world, world.World()))
    train = partial(specialists.pretrain, seed=seed)
    make(folder / f"encoders-{seed}", (world, specialists, encoders), train)
    return folder


def make(folder: Path, modules: tuple, write: Callable[[Path], None]) -> None:
    """`write(folder)`, unless these modules, as they now are, have. Renamed when it is complete."""
    code = b"".join(Path(module.__file__).read_bytes() for module in modules)
    digest, made_by = hashlib.sha256(code).hexdigest(), folder / "made_by.txt"
    if made_by.exists() and made_by.read_text() == digest:
        return
    if folder.exists() and not made_by.exists():
        why = "it was not made by miniature.prepare, which would replace it."
        raise encoders.UserError(f"{folder} is in the way.", why, "remove it, or run elsewhere.")
    start, incomplete = time.time(), folder.with_name(folder.name + ".partial")
    shutil.rmtree(incomplete, ignore_errors=True)
    write(incomplete)
    (incomplete / made_by.name).write_text(digest)
    shutil.rmtree(folder, ignore_errors=True)
    incomplete.rename(folder)
    print(f"{folder} is ready after {time.time() - start:.0f} s.", flush=True)
