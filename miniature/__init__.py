"""The default data and encoders, made from nothing: a few minutes on two cores.

Read world.py for what the clips show, specialists.py for how the encoders learn.
"""

import hashlib
import shutil
import time
from pathlib import Path

import encoders
from miniature import specialists, world


def prepare(folder: str | Path = "data/miniature", seed: int = 0) -> Path:
    """The folder with the world and encoders/NAME.safetensors, made first if this code has not yet.

    Until it is complete it carries another name. Not for two processes at once: rank 0 goes first.
    """
    digest = hashlib.sha256()  # of all that decides what is made
    for module in (world, specialists, encoders):
        digest.update(Path(module.__file__).read_bytes())
    folder = Path(folder)
    made_by, partial = folder / "made_by.txt", folder.with_name(folder.name + ".partial")
    if made_by.exists() and made_by.read_text() == digest.hexdigest():
        return folder
    if folder.exists() and not made_by.exists():
        why = "it was not made by miniature.prepare, which would replace it."
        raise encoders.UserError(f"{folder} is in the way.", why, "remove it, or run elsewhere.")
    start = time.time()
    print(f"Making {folder}: a video world, then four encoders.", flush=True)
    shutil.rmtree(partial, ignore_errors=True)
    world.write_world(world.World(), partial)
    specialists.pretrain(partial / f"encoders-{seed}")
    (partial / made_by.name).write_text(digest.hexdigest())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder} is ready after {time.time() - start:.0f} s.", flush=True)
    return folder
