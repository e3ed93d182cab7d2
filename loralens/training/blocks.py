"""The repeated blocks of a model, which checkpointing recomputes and FSDP2 shards one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every outermost list or sequence of two or more modules of one class."""
    repeated: list[nn.Module] = []
    for child in model.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            repeated += members
        else:
            repeated += repeated_blocks(child)
    return repeated


@contextmanager
def recompute_blocks(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Within the block, what the model's blocks compute inside is not kept, but computed again for the gradients.

    Dropout falls on the same entries the second time. A transformers model keeps no keys and values meanwhile: they
    would be added to its cache twice. A model without blocks is left as it is.
    """
    changed = [(block, block.__dict__.get("forward")) for block in repeated_blocks(model)] if on else []
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    for block, _ in changed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if changed and cached:
        config.use_cache = False
    try:
        yield
    finally:
        for block, own in changed:
            del block.forward  # the class has its own
            if own is not None:
                block.forward = own
        if changed and cached:
            config.use_cache = cached
