"""The default data and encoders, made from nothing. Read world.py, then specialists.py."""

from pathlib import Path

import encoders
from miniature import specialists, world
from support import dataset_writer, drawing, errors
from support.dataset_writer import digest_files
from support.files import lock, new_folder, writing

# If one of these changes, the folder is made again.
MAKERS = (world, drawing, dataset_writer, specialists, encoders)


def prepare(folder: str | Path = "data/miniature", seed: int = 0, device: str = "cpu") -> Path:
    """Make the world and encoders-<seed>/ where they are missing.

    A folder that other code has made is replaced. One that this function has not made at all is
    an error, because replacing it would delete somebody's files. UserError also if another process
    is making the same, or if the disk is full. device: where the encoders are pre-trained.
    """
    folder = Path(folder)
    made_by = folder / "made_by.txt"
    in_work = folder.with_name(f"{folder.name}.lock")
    digest = digest_files(module.__file__ for module in MAKERS)
    if folder.exists() and not made_by.exists():
        why = "it was not made by miniature.prepare, which would replace it."
        raise errors.UserError(f"{folder} is in the way.", why, "remove it, or run elsewhere.")
    if not folder.exists() or made_by.read_text() != digest:
        with lock(in_work, folder), writing(folder), new_folder(folder) as partial:
            world.write_world(partial, world.CLIPS)
            (partial / made_by.name).write_text(digest)
    models = folder / f"encoders-{seed}"
    if not models.exists():
        with lock(in_work, folder), writing(models), new_folder(models) as partial:
            specialists.pretrain(partial, seed, device)
    return folder
