"""PEFT's expert stacks (``target_parameters``): one pair of 2-D tensors for all experts of a 3-D base parameter.

A has E·r rows, expert by expert (row = e·r + j); B has r·E columns, rank by rank (column = j·E + e): checked against
PEFT 0.21.2. Old Unsloth wrote B expert by expert instead (column = e·r + j); newer builds say which in
``lora_B_layout`` (unsloth-zoo pull requests 1232 and 1269).

Up to PEFT 0.18 the second dimension of the base parameter (E, in, out) is that of the inputs, whatever the model does
with it; from 0.19 on the third (E, out, in), but in models that say ``is_transposed``. Where the two are equal only the
version in the configuration tells; 0.17 and earlier wrote none.

Several parameters of one module nest: each further one lies under one more ``base_layer``, the last registered
outermost. The order of registration is not in the file; for the names below it is known.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import Layout, LowRank, Origin
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.dialects.peft.keys import depth, module_path

REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")
GROUPED = "grouped_by_expert"
SWAPPED = (0, 19)  # PEFT's version from which on (E, out, in) is the rule


def parameter(path: str, pairs: Mapping[str, Any], config: PeftConfig) -> str | None:
    """The base parameter that a stored pair adapts, by its dotted name; None where it adapts a module's weight.

    ``target_parameters`` holds paths or their ends; an end may be the parameter's own name alone, which then fits
    every module that ``target_modules`` does not name.
    """
    module = module_path(path)
    targets = config.parameters
    if not targets or config.targets(module):
        return None
    names = [name for name in (_inside(module, target) for target in targets) if name]
    names = names or [target for target in targets if "." not in target]
    if not names:
        return None
    depths = sorted(depth(other) for other in pairs if module_path(other) == module)
    if len(names) != len(depths):
        raise FormatError(
            f"target_parameters names {len(names)} parameters here and the file holds {len(depths)} pairs",
            fix="correct target_parameters in adapter_config.json",
        )
    if len(names) > 1 and not set(names) <= set(REGISTERED):
        raise FormatError(
            f"which of {', '.join(names)} is the outer one depends on the model's code, and the file does not say",
            fix="train or save one parameter at a time, or report the model so that its order can be added",
        )
    outermost_first = sorted(names, key=registered, reverse=True)
    return f"{module}.{outermost_first[depths.index(depth(path))]}"


def registered(name: str) -> int:
    """The place of a parameter among those of its module, in the order in which models define them."""
    return REGISTERED.index(name) if name in REGISTERED else 0


def _inside(module: str, target: str) -> str | None:
    """The parameter's own name, where ``target`` (a path or the end of one) lies directly in ``module``."""
    owner, _, name = target.rpartition(".")
    return name if owner and (module == owner or module.endswith(f".{owner}")) else None


def modules(
    name: str, B: LazyArray, A: LazyArray, *, config: PeftConfig, origin: Origin, recent: Recent
) -> Iterator[tuple[str, LowRank]]:
    """One module an expert, ``name[e]``; one plain module for a 2-D parameter."""
    scaling = config.scaling(name)
    rank = config.rank(name)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        raise ShapeError(
            f"lora_A {A.shape} and lora_B {B.shape} are no stack of experts of rank {rank}",
            fix="correct r or rank_pattern in adapter_config.json, or save the adapter again",
        )
    count = A.shape[0] // rank
    if count == 1:
        plain = name.removesuffix(".weight")
        layout = Layout("linear" if plain != name else "parameter")
        yield plain, LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)
        return
    shared = Origin(origin.format, origin.tensors, share=count)
    layout = Layout("experts", transposed=_are_transposed(config))
    cached_B = recent.keep(B)
    for e in range(count):
        one_B = cached_B.map(_columns(e, count, rank, config), shape=(B.shape[0], rank))
        one_A = A.rows(e * rank, (e + 1) * rank)
        yield (
            f"{name}[{e}]",
            LowRank(one_B, one_A, scaling.value, scaling=scaling, layout=layout, origin=shared),
        )


def _are_transposed(config: PeftConfig) -> bool:
    """Whether the version of PEFT that saved the adapter takes every stack as (E, in, out)."""
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.fields.get("peft_version")))
    return version is None or (int(version[1]), int(version[2])) < SWAPPED


def _columns(e: int, count: int, rank: int, config: PeftConfig) -> Callable[[Array], Array]:
    grouped = config.fields.get("lora_B_layout") == GROUPED
    part = slice(e * rank, (e + 1) * rank) if grouped else slice(e, None, count)
    return lambda array: array[:, part]
