"""Several processes at one training, launched by torchrun: which of them this is, and how they tell each other.

Without torchrun there is one rank, and nothing here does anything. torch.distributed calls a process a rank: rank 0 writes
the run's folder, all of them train.
"""
import contextlib
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.cache import UserError

# How long a rank waits for another: as long as it may take to compute the features of millions of clips. One that died is
# noticed at once, by its closed connections and by torchrun.
PATIENCE = timedelta(days=1)


class Ranks:
    """The processes of a training. rank: this one's number; size: how many there are; device: this one's, once they met."""

    def __init__(self):
        self.rank, self.size, self.device, self.store = 0, 1, None, None
        if dist.is_torchelastic_launched():
            self.store, self.rank, self.size = next(dist.rendezvous("env://"))

    def meet(self, device: torch.device) -> None:
        """Meet the other ranks. Raises UserError where torch cannot train with several on `device`."""
        self.device = device
        if not self.store:
            return
        if device.type == "cuda":
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():  # seen by all ranks: none waits for the others
                raise UserError(f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: there are {torch.cuda.device_count()} "
                                f"GPUs here; launch as many processes, or train with --device cpu")
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        elif device.type != "cpu":
            raise UserError(f"--device {device.type}: several processes train on cpu or cuda; name one of them")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self.store, rank=self.rank,
                                world_size=self.size, timeout=PATIENCE)

    def leave(self) -> None:
        """Part from the other ranks when all have come here."""
        self.wait()
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # through gloo, whatever the device; a dead rank is an error, not a wait

    @contextlib.contextmanager
    def rank_0_first(self):
        """Let rank 0 do what is inside, then the others."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def agree(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size > 1:
            if self.rank == 0:
                self.store.set("text", text)
            self.wait()
            text = self.store.get("text").decode()
            self.wait()
        return text

    def may_speak(self) -> bool:
        """Whether this rank is the first to ask: of an error that several ranks meet, one tells."""
        if self.store:
            with contextlib.suppress(RuntimeError):  # the store is torchrun's own and outlives the ranks, but not torchrun
                return self.store.add("spoken", 1) == 1
        return True

    def together(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with gradients averaged over the ranks at each backward pass; each keeps batch statistics of its own."""
        return DistributedDataParallel(model, broadcast_buffers=False) if self.size > 1 else model

    def take_statistics(self, model: torch.nn.Module) -> None:
        """Give the model rank 0's running batch statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def collect(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (N, columns) in their places, on each rank: rows[i] of this one belongs at positions[i]."""
        total = torch.tensor(len(rows))
        if self.size > 1:
            dist.all_reduce(total)
        everyone = torch.zeros(total, rows.shape[1], dtype=rows.dtype)
        everyone[positions] = rows
        if self.size > 1:
            dist.all_reduce(everyone)  # one rank has a row, the others zeros: exact
        return everyone


def end(status: int) -> NoReturn:
    """End this process. Under torchrun at once: gloo's threads now and then abort an interpreter that takes itself down."""
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def launcher() -> str:
    """How this process was launched: python, or torchrun with its numbers of processes and machines."""
    if not dist.is_torchelastic_launched():
        return "python"
    machines = int(os.environ["GROUP_WORLD_SIZE"])
    return (f"torchrun {'--standalone' if machines == 1 else f'--nnodes={machines} ...'} "
            f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}")
