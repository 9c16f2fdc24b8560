"""Several processes at one training, launched by torchrun: torch.distributed's calls, which do nothing for one process.

torch.distributed calls a process a rank: rank 0 writes the run's folder, all of them train.
"""
import contextlib
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError

TIMEOUT = timedelta(days=1)  # features of millions of clips take hours; a rank that dies is noticed at once
store = None  # torchrun's key-value store, which all ranks see


def init() -> None:
    """Join the other processes where torchrun launched this one."""
    global store
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device: torch.device) -> torch.device:
    """This process's device: of several processes on CUDA, each has a GPU. Raises UserError if there are too few."""
    if world_size() == 1 or device.type == "cpu":
        return device
    local_rank, local_size, gpus = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.type != "cuda" or local_size > gpus:
        raise UserError(f"--device {device.type}: {local_size} processes need as many CUDA devices, here are {gpus}; launch as "
                        f"many processes (--nproc-per-node), or train with --device cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def barrier() -> None:
    """Return when all ranks have come here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # through gloo, whatever the device: a dead rank is an error, not a wait


@contextlib.contextmanager
def main_process_first():
    """Let rank 0 do what is inside, then the others."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def parallel(model: torch.nn.Module) -> DistributedDataParallel:
    """The model with gradients that are averaged over the ranks, always summed in the same order.

    There are no unused parameters, but looking for them keeps the first order of the gradients. Otherwise torch would change the
    order after the first step, and so after the first one of a resumed training: its last bits would be others.
    """
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)


def broadcast(value: str | torch.Tensor) -> str | torch.Tensor:
    """Rank 0's text or tensor, on every rank; a tensor is overwritten."""
    values = [value]
    if world_size() > 1 and isinstance(value, torch.Tensor):
        dist.broadcast(value, 0)
    elif world_size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def all_gather(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """All ranks' rows (N, columns) in their places, on each rank: rows[i] of this one belongs at positions[i]."""
    if world_size() == 1:
        return rows
    total = torch.tensor(len(rows))
    dist.all_reduce(total)
    gathered = torch.zeros(total, rows.shape[1], dtype=rows.dtype)
    gathered[positions] = rows
    dist.all_reduce(gathered)  # one rank has a row, the others zeros: exact
    return gathered


def claim_message() -> bool:
    """True for the first rank that calls it, False for the others: one of them prints an error that several meet."""
    with contextlib.suppress(RuntimeError):  # the store is torchrun's own and outlives the ranks, but not torchrun
        return not store or store.add("asked", 1) == 1
    return True


def launcher() -> str:
    """How to launch this program again: with python, or with torchrun and its numbers of processes and machines."""
    if not dist.is_torchelastic_launched():
        return "python"
    machines = int(os.environ["GROUP_WORLD_SIZE"])
    where = "--standalone" if machines == 1 else f"--nnodes={machines} ..."
    return f"torchrun {where} --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"


def end(status: int) -> NoReturn:
    """End this process. Under torchrun at once: gloo's threads now and then abort an interpreter that shuts down."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
