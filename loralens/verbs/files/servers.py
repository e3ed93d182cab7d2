"""An adapter as a server takes it: names, one rank, one whole α, and nothing that the server would ignore."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np

from loralens.analysis.clients import CLIENTS, PARALLEL, Client, check, incomplete_groups
from loralens.choices import Server, TargetFormat
from loralens.compression.loss import total_error
from loralens.compression.truncation_plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank, Scaling
from loralens.core.matching import Shape
from loralens.core.structured import Structured, Update
from loralens.core.together import FIELDS, NOBODY
from loralens.errors import FormatError, MismatchError
from loralens.tables.numbers import count

# Fields of the old configuration that a server or PEFT still needs.
KEPT = ("base_model_name_or_path", "lora_dropout", "revision", *FIELDS)


def fit_to_server(
    adapter: Adapter, server: Server, *, rank: int | None, shapes: Mapping[str, Shape]
) -> tuple[Adapter, float, list[str]]:
    """The adapter with pairs of one rank and one whole α, the relative error of ‖ΔW‖, and notes for the user.

    Parameters
    ----------
    adapter : Adapter
    server : str
    rank : int, optional
        The largest rank. [default: that of the server]
    shapes : mapping of str to tuple of int
        The shapes of the tensors of the base, if it is known.

    Raises
    ------
    FormatError
        A module is no pair, and no rank is given.
    MismatchError
        SGLang needs a module of which no shape is known.
    """
    client, notes = CLIENTS[server], []
    if renamed := {name: name.removeprefix(PARALLEL) for name in adapter if name.startswith(PARALLEL)}:
        notes.append(f"left the names of wrappers out of {count(len(renamed), 'module')}")
        adapter = adapter.renamed(renamed)
    if rank is None and any(isinstance(module, Structured) for module in adapter.modules.values()):
        what = f"holds modules that are not pairs B·A, and {client.title} takes pairs alone"
        raise FormatError(what, fix="give the rank of the pairs: --rank 16")
    width, cut, error = _widest(adapter, client, rank), adapter, 0.0
    wide = [name for name, module in adapter.items() if module.rank > width or isinstance(module, Structured)]
    if wide:
        # A matrix has at most min(out, in) directions.
        chosen = {name: min(width, *adapter[name].shape) for name in wide}
        plan = TruncationPlan.of(adapter)
        cut, error = plan.at(chosen), total_error(plan.losses(chosen))
    if server == "sglang":
        missing = incomplete_groups(cut)
        added = {name: _zeros(_shape(name, missing[name], cut, shapes), width) for name in sorted(missing)}
        if added:
            notes.append(f"added {count(len(added), 'module')} of zeros, which SGLang joins with others")
            cut = replace(cut, modules={**cut.modules, **added})
    ranks = {module.rank for module in cut.modules.values()}
    if len(ranks) > 1:
        notes.append(f"padded ranks {min(ranks)} to {max(ranks)} with zeros to rank {width}, which changes nothing")
    scales = {module.scale for module in cut.modules.values() if module.scale}
    # One scale stays as it is where its α is a whole number; else α = r, and every B is multiplied by its own scale.
    common = scales.pop() if len(scales) == 1 else 1.0
    common = common if (common * width).is_integer() else 1.0
    if any(module.scale not in (0, common) for module in cut.modules.values()):
        notes.append(f"multiplied B by the scales of the modules, so that α is {width} for all of them")
    config = {**adapter.peft_fields, **{name: value for name, value in (adapter.config or {}).items() if name in KEPT}}
    if not adapter.extra:
        claimed = {name: config[name] for name, nobody in NOBODY.items() if config.get(name) not in (None, nobody)}
        if claimed:
            # The user may have lost a file, or may have left these tensors out on purpose.
            said = " and ".join(f"{name} {value!a:.60}" for name, value in claimed.items())
            notes.append(f"left {said} out of the configuration, since the file has no such tensors")
        config |= NOBODY
    return (
        replace(
            cut.map(partial(_uniform, rank=width, scale=common)),
            format="peft",
            config=None,
            peft_fields=config,
            findings=(),
        ),
        error,
        notes,
    )


def target_of(server: Server) -> TargetFormat:
    """The dialect that a server takes."""
    return cast("TargetFormat", CLIENTS[server].target)


def check_taken(adapter: Adapter, server: Server) -> None:
    """Refuse what the server would still refuse or ignore of the file that was made for it.

    Raises
    ------
    FormatError
        The message is that of the rule.
    """
    for finding in check(adapter, server):
        if finding.level == "error":
            fix = finding.fix.replace("loralens convert … ", "give ")
            raise FormatError(f"{CLIENTS[server].title} cannot take all of it: {finding.text}", fix=fix)


def _widest(adapter: Adapter, client: Client, rank: int | None) -> int:
    most = min(rank or client.most_rank or 2**31, client.most_rank or 2**31)
    if rank and any(isinstance(module, Structured) for module in adapter.modules.values()):
        return most
    return max(1, min(most, max((module.rank for module in adapter.modules.values()), default=1)))


def _uniform(module: Update, *, rank: int, scale: float) -> LowRank:
    """The pair with zeros up to a rank, and with the scale of the file in place of its own."""
    assert isinstance(module, LowRank)
    B, A = (factor.read() for factor in module.factors)
    ratio = module.scale / scale
    if ratio != 1:
        # In the dtype of B if that is exact, so for a power of two; otherwise rounded once, to float32.
        exact = abs(np.frexp(ratio)[0]) == 0.5 and B.dtype != np.float16
        B = (B.astype(np.float64) * ratio).astype(B.dtype if exact else np.float32)
    more = rank - module.rank
    if more:
        B = np.concatenate([B, np.zeros((len(B), more), B.dtype)], axis=1)
        A = np.concatenate([A, np.zeros((more, *A.shape[1:]), A.dtype)])
    scaling = Scaling("alpha/r", scale * rank, rank, "adapter_config.json")
    return LowRank(LazyArray.of(B), LazyArray.of(A), scale, scaling=scaling, layout=module.layout)


def _zeros(shape: Shape, rank: int) -> LowRank:
    out, in_ = shape
    return LowRank(np.zeros((out, rank), np.float32), np.zeros((rank, in_), np.float32))


def _shape(name: str, sibling: str, adapter: Adapter, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of a module that the adapter lacks: in the base, in another layer, or of ``up`` beside ``gate``."""
    if shape := shapes.get(f"{name}.weight"):
        return shape
    last = name.rpartition(".")[2]
    if last == "gate_proj":
        return adapter[sibling].shape
    same = next((module.shape for other, module in adapter.items() if other.endswith(f".{last}")), None)
    # k and v have one shape.
    twin = {"k_proj": "v_proj", "v_proj": "k_proj"}.get(last)
    same = same or next(
        (module.shape for other, module in adapter.items() if twin and other.endswith(f".{twin}")), None
    )
    if same is None:
        raise MismatchError(f"SGLang needs {name}, whose shape no module tells", fix="give --base DIR")
    return same
