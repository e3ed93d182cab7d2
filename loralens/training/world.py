"""The processes that train together under torch.distributed, or the single process that trains alone."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import nn

from loralens.errors import OptionError
from loralens.training.blocks import repeated_blocks

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class World:
    """One process among those that train together.

    Attributes
    ----------
    rank, size : int
        The number of this process from 0 on, and how many there are.
    shard : bool
        Whether the model lies in shards over all of them (FSDP2) instead of being whole in each (DDP).
    """

    rank: int = 0
    size: int = 1
    shard: bool = False

    @classmethod
    def current(cls, *, shard: bool = False) -> "World":
        """The world that torch.distributed has been initialised with, or this process alone.

        Raises
        ------
        OptionError
            Shards are wanted, and there is no process group to lay them over.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), shard)
        if shard:
            raise OptionError(
                "one process cannot hold a model in shards", fix="start it by torchrun --nproc-per-node N -m …"
            )
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training. With shards it is changed in place, block by block."""
        if self.shard:
            from torch.distributed.fsdp import fully_shard

            for block in repeated_blocks(model):
                fully_shard(block)
            fully_shard(model)
            return model
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        parallel = nn.parallel.DistributedDataParallel
        parameters = signature(parallel.__init__).parameters  # buffers are the same everywhere, and stay so
        still: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
        }
        return parallel(model, device_ids=[device] if device.type == "cuda" else None, **still)

    def gathering(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around one batch of a step: gradients go from process to process with the last batch alone."""
        if self.shard:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sums of these numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(list(numbers), dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        sums: list[float] = summed.tolist()
        return sums

    def mean(self, number: float, device: torch.device) -> float:
        """The mean of a number over all processes, the same in each."""
        return number if self.size == 1 else self.total([number], device)[0] / self.size

    def settle(self, model: nn.Module) -> None:
        """After a forward pass without a backward one, put what lies in shards back into them."""
        if self.shard:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in every process: the others may not see the disk that it reads from.

        Where that fails, the others end too, and leave the message to the main one.
        """
        if self.size == 1:
            return make()
        holder: list[Any] = [None]
        try:
            holder = [(make(),)] if self.main else [None]
        finally:
            dist.broadcast_object_list(holder, src=0)
        if holder[0] is None:
            # The message is printed once, by the main process.
            raise SystemExit(1)
        result: T = holder[0][0]
        return result


@contextmanager
def join_processes(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, brought together for the block: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield World.current()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with warnings.catch_warnings():  # shards: of outputs that somebody might write into, which nobody here does
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield World.current()
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this process, where torchrun started several on one machine: ``cuda`` becomes ``cuda:1`` …"""
    own = os.environ.get("LOCAL_RANK")
    return (
        torch.device("cuda", int(own)) if own is not None and device.type == "cuda" and device.index is None else device
    )
