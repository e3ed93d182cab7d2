"""The repeated blocks of a model, which checkpointing recomputes and FSDP2 shards one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every outermost ``ModuleList`` or ``Sequential`` of two or more modules of one class."""
    repeated: list[nn.Module] = []
    for child in model.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        # One class, since a Sequential of different layers is no stack of blocks, and a single member saves nothing.
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            # The members are not searched: a block that is recomputed inside a recomputed block would run three times.
            repeated += members
        else:
            repeated += repeated_blocks(child)
    return repeated


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
