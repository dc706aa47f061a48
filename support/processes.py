"""Several processes: those of a training run, their grid of shards, and others that share work."""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, get_worker_info

from support.cli import pick_device, require_card
from support.errors import UserError


def join_processes(device: str) -> torch.device:
    """Join the process group that torchrun describes, or be a group of one; return our device."""
    end_with_torchrun()
    place = pick_device(device)
    require_card(place)
    backend = "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    rank, world = 0, 1
    if "RANK" not in os.environ:
        store = store_of_one()
    else:
        patience = timedelta(minutes=30)  # torch's default
        # WHY less: torchrun opens its store before it starts us. If there is none, it has ended.
        connect = patience
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            connect = timedelta(minutes=1)
        store, rank, world = next(dist.rendezvous("env://", timeout=connect))
        store.set_timeout(patience)
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", world)):  # one machine
        # WHY: torchrun's store outlives a restart (--max-restarts), and with it the addresses of
        # dead processes, for which gloo would wait half an hour.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return place


def store_of_one() -> dist.Store:
    """What a group of one process keeps its addresses in; on Windows a file, elsewhere memory."""
    if hasattr(dist, "HashStore"):
        return dist.HashStore()
    return dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)


def end_with_torchrun() -> None:
    """End this process within a second of the torchrun that started it, even if that is killed.

    WHY: it would run on beside the next start of the same command, or wait half an hour for
    processes that have ended. A process that plain `python` started outlives its shell, as usual.
    Windows does not tell a process that its parent has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    first = Path("/proc/1/cmdline")  # of a container this may be torchrun
    if parent == 1 and not (first.exists() and b"torch" in first.read_bytes()):
        os._exit(1)  # torchrun ended while we were importing

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_mesh(device: str, replicas: int) -> DeviceMesh:
    """Processes as a grid (replicas, shards): each row of it holds the parameters once."""
    world = dist.get_world_size()
    if world % replicas:
        what = f"{world} processes cannot hold {replicas} replicas."
        raise UserError(what, "each takes equally many.", f"choose a divisor of {world}.")
    if replicas == 1:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    sizes = (replicas, world // replicas)
    return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))


def patient_group() -> dist.ProcessGroup:
    """All processes, as a group whose members wait two days for each other instead of 30 minutes.

    For work of which some processes have much more than others. Create it before the work.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


def wait_for_all(patient: dist.ProcessGroup) -> None:
    """Wait until every process of a `patient_group` is here; the group ends with it."""
    dist.barrier(patient)
    dist.destroy_process_group(patient)


@contextmanager
def cores_left_to(workers: int) -> Iterator[None]:
    """Compute on the CPU with that many threads fewer, at least one.

    WHY: the threads of an operation wait for each other, so one that must share its core with a
    worker of a DataLoader delays all. On two busy cores, eval.py is twice as fast with one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_on_all_cores(work: Callable, items: Sequence) -> Iterator:
    """work(item) for each item, in order; `work` must be a function that pickle can name.

    WHY spawn: torch must not fork. WHY not for few items: starting the processes takes seconds.
    """
    if len(items) < 500:
        yield from map(work, items)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=end_with_parent) as pool:
        yield from pool.map(work, items, chunksize=50)


class LoadAhead:
    """A DataLoader whose workers say so if a batch does not fit into shared memory.

    WHY: torch moves a batch there in a background thread of the worker. If that fails, as in a
    container with 64 MB of /dev/shm, the batch is lost and the main process waits for ever.
    """

    def __init__(self, dataset: Sequence, workers: int, collate: Callable, **how):
        collate = partial(collate_in_shared_memory, collate)
        how |= {"num_workers": workers, "worker_init_fn": begin_worker}
        self.loader = DataLoader(dataset, collate_fn=collate, **how)
        # WHY: Python ends workers that are left at its exit by SIGTERM, and waits for them.
        atexit.register(kill_workers)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        try:
            batches = iter(self.loader)
        except OSError as error:  # the queues between processes lie in shared memory, too
            raise no_shared_memory(error) from error
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def collate_in_shared_memory(collate: Callable, items: list) -> Any:
    """collate(items), whose tensors a worker moves to shared memory; a UserError if it cannot."""
    batch = collate(items)
    if get_worker_info() is None:  # we are the main process
        return batch
    fields = vars(batch) if is_dataclass(batch) else batch
    try:
        tree_map_only(Tensor, Tensor.share_memory_, fields)
    except RuntimeError as error:
        return no_shared_memory(error)
    return batch


def no_shared_memory(error: Exception) -> UserError:
    """The error to show if shared memory is full."""
    what = f"A batch cannot be written to shared memory: {str(error).splitlines()[0]}"
    why = "data loader processes pass batches through /dev/shm, 48 MB for each clip."
    fix = "give a container more of it (docker run --shm-size 8g), or use --workers 0."
    return UserError(what, why, fix)


def kill_workers() -> None:
    """Kill the processes that `multiprocessing` has started here and that still run."""
    if hasattr(signal, "SIGCHLD"):  # torch answers each death with an exception in this process
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in active_children():
        worker.kill()


def begin_worker(worker: int) -> None:
    """Let a worker ignore SIGTERM, but end with the main process.

    WHY: SLURM sends SIGTERM to all processes of a job, and the main process saves before it ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process, which `multiprocessing` has started, when its parent ends or is killed.

    WHY: torch's workers look for their parent only every 5 s, not while they load a batch, and
    never if it was killed before they first looked. Those of a ProcessPoolExecutor never look.
    """

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_common_folder(file) -> None:
    """UserError if some process does not see this file, which rank 0 has just written."""
    seen = torch.tensor(int(file.is_file()))
    dist.all_reduce(seen)
    missing = dist.get_world_size() - int(seen)
    if missing:
        what = f"{missing} processes do not see {file}."
        why = "every process reads and writes its share of each save in the run's folder."
        raise UserError(what, why, "start all nodes in one folder on a shared file system.")
