"""The processes that train together under torch.distributed, and the blocks of a model that they shard."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from loralens.errors import OptionError

# Modules that only hold others: they are never called, so that nothing could be recomputed or gathered for a call.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ``ModuleList``s and ``Sequential``s that are stacks of blocks.

    A stack has two or more members of one class. The ``ModuleList`` with the most parameters is a stack whatever its
    members are, as long as they are called: the blocks of hybrid models, such as Jamba, have several classes.
    """

    def called_members(module: nn.Module) -> list[nn.Module]:
        """The members of a list, if it has several that are called."""
        members = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        return members if len(members) > 1 and not any(isinstance(each, CONTAINERS) for each in members) else []

    def blocks_in(module: nn.Module) -> list[nn.Module]:
        members = called_members(module)
        # Otherwise one class, since a Sequential of different layers is no stack of blocks.
        if members and (module is largest or len({type(each) for each in members}) == 1):
            # The members are not searched: a block that is recomputed inside a recomputed block would run three times.
            return members
        return [block for child in module.children() for block in blocks_in(child)]

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and called_members(module)]
    # The first of equals: modules() names a list before those inside it.
    largest = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=None)
    return [block for child in model.children() for block in blocks_in(child)]


@contextmanager
def recompute_blocks(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Within the context, compute the activations inside the model's blocks again in the backward pass.

    Dropout drops the same entries the second time. A transformers model does not use its cache of keys and values in
    the meantime. A model without blocks is left as it is.
    """
    changed = [(block, block.__dict__.get("forward")) for block in repeated_blocks(model)] if on else []
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    for block, _ in changed:
        # Reentrant checkpointing needs inputs with gradients, and the inputs of the first block have none.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if changed and cached:
        # A second forward pass would append its keys and values to the cache again.
        config.use_cache = False
    try:
        yield
    finally:
        for block, own in changed:
            del block.forward  # which uncovers the method of the class
            if own is not None:  # set on the object before, for example by accelerate
                block.forward = own
        if changed and cached:
            config.use_cache = cached


T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class World:
    """One process of those that train together.

    Attributes
    ----------
    rank, size : int
        The number of this process, counted from 0, and the number of processes.
    shard : bool
        Whether the model is divided among all processes (FSDP2) instead of being whole in each (DDP).
    """

    rank: int = 0
    size: int = 1
    shard: bool = False

    @classmethod
    def current(cls, *, shard: bool = False) -> "World":
        """The processes that torch.distributed has been initialised with, or this process alone.

        Raises
        ------
        OptionError
            ``shard`` is True, but there is no process group.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), shard)
        if shard:
            raise OptionError(
                "a model cannot be sharded in a single process", fix="start it by torchrun --nproc-per-node N -m …"
            )
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process is the first, which alone writes files and messages."""
        return self.rank == 0

    @property
    def parallel(self) -> bool:
        """Whether DDP joins the gradients of several processes."""
        return self.size > 1 and not self.shard

    def wrap(self, model: nn.Module, device: torch.device, *, narrow: torch.dtype | None = None) -> nn.Module:
        """The model as it is called in training. With ``shard`` it is changed in place, block by block.

        Parameters
        ----------
        model : nn.Module
        device : torch.device
            The device on which the model is trained. A model that is sharded may be on the CPU: only one of its blocks
            at a time is moved to the device as a whole.
        narrow : torch.dtype, optional
            The dtype in which shards are gathered, if it is not their own.
        """
        if self.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            # Named, since torch would take a GPU wherever the machine has one.
            mesh = init_device_mesh(device.type, (self.size,))
            policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None)
            # Blocks first: what is left for the model itself is then gathered as one more unit.
            for block in repeated_blocks(model):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            return model
        if self.size == 1:
            return model
        parallel = nn.parallel.DistributedDataParallel
        # Buffers are equal in all processes and do not change, so that synchronising them would be lost time. Newer
        # releases of torch have another name for the option, and warn of the old one.
        parameters = signature(parallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return parallel(model, device_ids=[device] if device.type == "cuda" else None, **options)

    def gathering(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """The context of one batch of a step, in which processes exchange gradients only with the ``last`` batch."""
        if self.shard:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sums of these numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        # float64: the sum of losses of many tokens has more digits than float32.
        summed = torch.tensor(list(numbers), dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        sums: list[float] = summed.tolist()
        return sums

    def mean(self, number: float, device: torch.device) -> float:
        """The mean of a number over all processes, which is the same in each."""
        return number if self.size == 1 else self.total([number], device)[0] / self.size

    def settle(self, model: nn.Module) -> None:
        """Shard the model again after a forward pass that no backward pass follows."""
        if self.shard:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def from_main(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in the main process, for every process: the others may not see the same disk.

        If ``make`` fails, the other processes end without a message.
        """
        if self.size == 1:
            return make()
        holder: list[Any] = [None]
        try:
            holder = [(make(),)] if self.main else [None]
        finally:
            # This happens after an error too, since the other processes wait for it.
            # By the CPU, where the processes can: a state is larger than what a GPU should hold for it.
            on_cpu = torch.device("cpu") if "cpu:gloo" in str(dist.get_backend_config()) else None
            dist.broadcast_object_list(holder, src=0, device=on_cpu)
        if holder[0] is None:
            # The message is printed once, by the main process.
            raise SystemExit(1)
        result: T = holder[0][0]  # in a tuple, since the result may be None
        return result


@contextmanager
def join_processes(device: torch.device) -> Iterator[World]:
    """Within the context, the processes that torchrun started are one group: NCCL on GPUs, gloo on CPUs."""
    # Kernels and collectives without a device of their own are those of this GPU.
    chosen = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # A program that has made a process group itself keeps it.
    if "RANK" not in os.environ or dist.is_initialized():
        with chosen:
            yield World.current()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with chosen, warnings.catch_warnings():
            # FSDP2 warns of code that writes into the outputs of its modules, which no code here does.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield World.current()
    finally:
        dist.destroy_process_group()


def exact_sums(count: int, device: torch.device) -> torch.Tensor:
    """Zeros in float64, in which losses are summed: on the device, or on the CPU for a GPU without float64."""
    return torch.zeros(count, dtype=torch.float64, device="cpu" if device.type == "mps" else device)


def local_device(device: torch.device) -> torch.device:
    """The device of this process, if torchrun started several on one machine: ``cuda`` becomes ``cuda:1`` …"""
    own = os.environ.get("LOCAL_RANK")
    # A device with a number is the user's choice.
    if own is None or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(own))
