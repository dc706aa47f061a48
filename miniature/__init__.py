"""The default data and encoders, made from nothing. Read world.py, then specialists.py."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import encoders
from miniature import specialists, world
from support import errors


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def prepare(folder: str | Path = "data/miniature", seed: int = 0) -> Path:
    """The world and encoders-<seed>/, made if missing or by other code; one process at a time."""
    folder = Path(folder)
    code = b"".join(Path(module.__file__).read_bytes() for module in (world, specialists, encoders))
    made_by, digest = folder / "made_by.txt", hashlib.sha256(code).hexdigest()
    if folder.exists() and not made_by.exists():
        why = "it was not made by miniature.prepare, which would replace it."
        raise errors.UserError(f"{folder} is in the way.", why, "remove it, or run elsewhere.")
    if not folder.exists() or made_by.read_text() != digest:
        with new_folder(folder) as partial:
            world.write_world(partial, world.CLIPS)
            (partial / made_by.name).write_text(digest)
    if not (models := folder / f"encoders-{seed}").exists():
        with new_folder(models) as partial:
            specialists.pretrain(partial, seed)
    return folder
