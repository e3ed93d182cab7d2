"""The repeated blocks of a model, which checkpointing recomputes and FSDP2 shards one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# Modules that only hold others: they are never called, so that nothing could be recomputed or gathered for a call.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ``ModuleList``s and ``Sequential``s that are stacks of blocks.

    A stack has two or more members of one class. The ``ModuleList`` with the most parameters is a stack whatever its
    members are, as long as they are called: the blocks of hybrid models, such as Jamba, have several classes.
    """
    return _blocks_in(model, _largest_list(model))


def _blocks_in(model: nn.Module, largest: nn.Module | None) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for child in model.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        # Otherwise one class, since a Sequential of different layers is no stack of blocks. A single member saves
        # nothing.
        alike = len({type(member) for member in members}) == 1 or child is largest
        if len(members) > 1 and alike and not any(isinstance(member, CONTAINERS) for member in members):
            # The members are not searched: a block that is recomputed inside a recomputed block would run three times.
            blocks += members
        else:
            blocks += _blocks_in(child, largest)
    return blocks


def _largest_list(model: nn.Module) -> nn.Module | None:
    """The list with the most parameters among those whose members are called; of nested ones the outermost."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and not any(isinstance(member, CONTAINERS) for member in module)
    ]
    # The first of equals: modules() names a list before those inside it.
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=None)


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
