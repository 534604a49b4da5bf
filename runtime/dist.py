"""The processes of a run, as started by torchrun, and their devices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError

T = TypeVar("T")
#: How long a rank waits for the others: long, because rank 0 may be downloading a model. When a
#: rank fails, torchrun ends all of them at once.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process within its group; with ``size`` 1 no method communicates."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; returns ``tensor``. Float64 stays float64."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def broadcast_object(self, obj: T) -> T:
        """The ``obj`` of rank 0, on every rank."""
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch: int) -> int:
        """The batch per process of a ``batch`` over all processes, rounded up."""
        return -(-batch // self.size)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of ``items``: every ``size``-th, starting at ``rank``."""
        return items[self.rank :: self.size]


def environment() -> tuple[int, int]:
    """The rank and the number of processes set by torchrun; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the processes started by torchrun (one process without it) and choose the device.

    ``device`` is as in :func:`choose_device`; under torchrun ``cuda`` means one GPU per process.

    Raises:
        UserError: a device that does not exist, or fewer GPUs than processes.
    """
    rank, size = environment()
    exact_float32()
    if size == 1:
        yield World(rank=0, size=1, device=choose_device(device))
        return
    chosen = _device_of_rank(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield World(rank=rank, size=size, device=chosen)
    finally:
        dist.destroy_process_group()


def exact_float32() -> None:
    """Keep products and convolutions of float32 in float32 on GPUs, without TF32's 10-bit mantissa.

    PyTorch allows TF32 in convolutions, which changes images in the third digit and so makes
    figures depend on the GPU.  These two flags are those that all supported versions read: setting
    ``fp32_precision`` (from 2.9 on) makes reading ``allow_tf32``, which other libraries do, an
    error.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def choose_device(name: str | None = None) -> torch.device:
    """The device ``name``, or the best available one: CUDA, then MPS, then the CPU.

    Raises:
        UserError: an unknown name, or a device that this machine does not have.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown: use cuda, cuda:1, mps or cpu") from None
    count = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }.get(device.type)
    if count is None:
        raise UserError(f"device '{name}' is not supported: use cuda, cuda:1, mps or cpu")
    if (device.index or 0) >= count:
        raise UserError(
            f"device '{name}' does not exist, this machine has {count} of that kind: "
            "use --device cpu, or leave --device out"
        )
    return device


def _device_of_rank(name: str | None, local_rank: int) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.type == "mps" or device.index is not None:
        raise UserError(
            f"device '{name}' cannot be shared by the processes of torchrun: "
            "use --device cuda or cpu, or start a single process"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} on this machine has no GPU, there are {count}: "
            f"start torchrun with --nproc_per_node={count}, or use --device cpu"
        )
    return torch.device("cuda", local_rank)
