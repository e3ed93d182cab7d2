"""PEFT's expert stacks (``target_parameters``): one pair of 2-D tensors for all experts of a 3-D parameter.

A has E·r rows, expert by expert (row = e·r + j). B has r·E columns, rank by rank (column = j·E + e). This was checked
against PEFT 0.21.2. Old versions of Unsloth wrote B expert by expert (column = e·r + j); newer ones name the order in
``lora_B_layout`` (unsloth-zoo pull requests 1232 and 1269).

Up to PEFT 0.18, the second dimension of the parameter, (E, in, out), is that of the inputs, whatever the model does
with it. Since 0.19 it is the third, (E, out, in), except in models with ``is_transposed``. If both dimensions are
equal, only the version in the configuration tells; PEFT 0.17 and earlier wrote none.

Several parameters of one module are nested: each further one is under one more ``base_layer``, and the one registered
last is the outermost. The file does not contain the order of registration, but it is known for the names below.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import Layout, LowRank, Origin
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.dialects.peft.keys import depth, module_path

# The order in which the models of transformers define these parameters.
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")
# Unsloth's name for B expert by expert
GROUPED = "grouped_by_expert"
SWAPPED = (0, 19)  # the first version of PEFT in which (E, out, in) is the rule


def parameter_path(path: str, pairs: Mapping[str, Any], config: PeftConfig) -> str | None:
    """The path of the parameter that a stored pair adapts; None if it adapts the weight of a module.

    ``target_parameters`` holds paths or ends of paths. An end may be only the parameter's own name, which then fits
    every module that is not in ``target_modules``.
    """
    module = module_path(path)
    targets = config.parameters
    if not targets or config.targets(module):
        return None
    names = [name for name in (_inside(module, target) for target in targets) if name]
    # A path that fits is more specific than a bare name.
    names = names or [target for target in targets if "." not in target]
    if not names:
        return None
    # The depth of a pair is its place in the order, so the names must be as many as the depths.
    depths = sorted(depth(other) for other in pairs if module_path(other) == module)
    if len(names) != len(depths):
        what = f"target_parameters names {len(names)} parameters here and the file holds {len(depths)} pairs"
        raise FormatError(what, fix="correct target_parameters in adapter_config.json")
    if len(names) > 1 and not set(names) <= set(REGISTERED):
        raise FormatError(
            f"which of {', '.join(names)} is the outer one depends on the model's code, and the file does not say",
            fix="train or save one parameter at a time, or report the model so that its order can be added",
        )
    outermost_first = sorted(names, key=registration_order, reverse=True)
    return f"{module}.{outermost_first[depths.index(depth(path))]}"


def registration_order(name: str) -> int:
    """The position of a parameter among those of its module, in the order in which models register them."""
    return REGISTERED.index(name) if name in REGISTERED else 0


def _inside(module: str, target: str) -> str | None:
    """The parameter's own name if ``target`` (a path or the end of one) is a parameter of ``module``."""
    owner, _, name = target.rpartition(".")
    return name if owner and (module == owner or module.endswith(f".{owner}")) else None


def expert_modules(
    name: str, B: LazyArray, A: LazyArray, *, config: PeftConfig, origin: Origin, recent: Recent
) -> Iterator[tuple[str, LowRank]]:
    """The modules of a stored pair: ``name[e]`` for each expert, or one module for a 2-D parameter."""
    scaling = config.scaling(name)
    rank = config.rank(name)
    # The number of experts is not stored: it follows from r and the rows of A.
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        what = f"lora_A {A.shape} and lora_B {B.shape} are not a stack of experts of rank {rank}"
        raise ShapeError(what, fix="correct r or rank_pattern in adapter_config.json, or save the adapter again")
    count = A.shape[0] // rank
    # a parameter of two axes, which is not a stack
    if count == 1:
        plain = name.removesuffix(".weight")
        layout = Layout("linear" if plain != name else "parameter")
        yield plain, LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)
        return
    shared = replace(origin, share=count)
    layout = Layout("experts", transposed=_are_transposed(config))
    # Every expert needs some columns of B, which are scattered over the whole tensor.
    cached_B = recent.keep(B)
    for e in range(count):
        # The columns of one expert are read when they are needed, from the copy of B in memory.
        B_e = cached_B.map(_columns(e, count, rank, config), shape=(B.shape[0], rank))
        A_e = A.rows(e * rank, (e + 1) * rank)
        yield f"{name}[{e}]", LowRank(B_e, A_e, scaling.value, scaling=scaling, layout=layout, origin=shared)


def _are_transposed(config: PeftConfig) -> bool:
    """Whether the PEFT that saved the adapter treats every stack as (E, in, out)."""
    # Only two parts of the version count; development versions have more.
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.fields.get("peft_version")))
    return version is None or (int(version[1]), int(version[2])) < SWAPPED


def _columns(e: int, count: int, rank: int, config: PeftConfig) -> Callable[[Array], Array]:
    grouped = config.fields.get("lora_B_layout") == GROUPED
    part = slice(e * rank, (e + 1) * rank) if grouped else slice(e, None, count)
    return lambda array: array[:, part]
