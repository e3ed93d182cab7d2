"""Writing PEFT: unchanged modules as they were read, others anew, and a configuration that fits them.

AdaLoRA, LoHa and LoKr become plain LoRA: pairs, and a configuration of type LORA with the same targets.

PEFT finds rank and α of a module by the first key of ``rank_pattern`` or ``alpha_pattern`` that matches, and up to 0.14
only a literal path matches. So patterns are written with full literal paths, the longest first. Characters are escaped
only in a path that has special ones other than dots.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank, ScaleFormula, Scaling, scale_of
from loralens.core.names import is_expert_alone, natural_key
from loralens.core.structured import Update
from loralens.core.together import NORMS
from loralens.errors import FormatError, ShapeError, place
from loralens.formats.dialects.pairs import (
    Fields,
    Modules,
    Stacks,
    check_all_dora,
    group_by_pair,
    is_as_read,
    most_common,
    pack_pair,
    stack_factors,
    translate_extras,
)
from loralens.formats.dialects.peft.config import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    OUT_PROJ,
    PREFIX,
    Endings,
    PeftConfig,
    canonical_key,
    is_pair,
)
from loralens.formats.dialects.peft.reader import GROUPED, NAME, SWAPPED, lora_fields, read, registration_order
from loralens.formats.files.container import Stored

# Paths that are regular expressions as they are, if a dot may match any letter.
_PLAIN = re.compile(r"^[\w.-]+$")

# roles of extras that a DoRA adapter has
DORA = ("magnitude", "norms")
PARAMETERS = ("experts", "parameter")  # kinds of layout for which PEFT wraps the parameter and not the module

Terms = dict[str, tuple[int, float]]  # path in the configuration → r and α


def write(adapter: Adapter) -> Stored:
    """The adapter as PEFT stores it.

    Raises
    ------
    ShapeError
        The experts of a stack have different ranks, or PEFT has no layout for a changed module.
    FormatError
        PEFT would change the base weight differently for the changed adapter, or the file would be read differently.
    """
    stacks = _fold_attentions(_halve(adapter, group_by_pair(adapter)))
    changed = not all(is_as_read(modules.values(), NAME) for modules in stacks.values())
    # The configuration comes first: it says how the stacks are laid out.
    config = _config(adapter, stacks)
    tensors: dict[str, LazyArray] = {}
    for name, modules in stacks.items():
        with place(name):
            tensors.update(_tensors(name, modules, stacks, grouped=(config or {}).get("lora_B_layout") == GROUPED))
    tensors.update(_extras(adapter))
    # PEFT passes over factors without the prefix; a file of such factors has its heads without the prefix too.
    bare = any(is_pair(key) and not key.startswith(PREFIX) for key in tensors)
    if bare:
        tensors = {f"{PREFIX}{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    if changed:  # old keys may have other forms than new ones, and one file should not mix them
        tensors = {canonical_key(key): tensor for key, tensor in tensors.items()}
    metadata = adapter.metadata if adapter.format == NAME else {"format": "pt"}
    stored = Stored(dict(sorted(tensors.items())), metadata, config)
    # A file that would be read as another adapter is refused.
    for name in sorted(set(adapter) ^ set(read(stored)), key=natural_key):
        what = "could not be read back" if name in adapter else "would appear"
        raise FormatError(f"{name} {what} in a PEFT file", fix="keep whole stacks and nn.MultiheadAttention layers")
    return stored


def _tensors(name: str, modules: Modules, stacks: Stacks, *, grouped: bool) -> Mapping[str, LazyArray]:
    first = next(iter(modules.values()))
    if is_as_read(modules.values(), NAME):
        assert first.origin
        return first.origin.tensors
    kind = first.layout.kind
    if kind == "experts":
        stacked_B, stacked_A = stack_factors(modules, "PEFT")
        count, out, rank = stacked_B.shape
        # A is stored expert by expert. Columns of B are ordered by expert and then by rank, or the other way round.
        axes = (1, 0, 2) if grouped else (1, 2, 0)
        B = stacked_B.map(lambda array: array.transpose(axes).reshape(out, -1), shape=(out, count * rank))
        A = stacked_A.reshape(count * rank, stacked_A.shape[2])
    else:
        B, A = pack_pair(first)
    if kind == "embedding":
        return {f"{PREFIX}{name}.lora_embedding_B": B, f"{PREFIX}{name}.lora_embedding_A": A}
    attention = _attention(name, stacks)
    # The two pairs of an attention have keys of their own: the attention itself, and out_proj under a base_layer.
    if attention:
        name = f"{attention}.{OUT_PROJ}" if name.endswith(".out_proj") else attention
    elif kind in PARAMETERS:
        name = _stored_path(name, stacks)
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def _attention(name: str, stacks: Stacks) -> str | None:
    """The nn.MultiheadAttention that a module belongs to; PEFT adapts both its projections with one r and one α."""
    if not name.endswith((".in_proj_weight", ".out_proj")):
        return None
    parent = name.rpartition(".")[0]
    return parent if {f"{parent}.in_proj_weight", f"{parent}.out_proj"} <= stacks.keys() else None


def _extras(adapter: Adapter) -> dict[str, LazyArray]:
    """The extras: unchanged in PEFT's own dialect, those of others under PEFT's keys."""
    if adapter.format == NAME:
        tensors = {key: extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}
        for key, extra in adapter.extra.items():
            module = adapter.modules.get(extra.module)
            # The B of a changed module of KaSA contains its diagonal already, so the written diagonal has ones only.
            if extra.role == "diagonal" and module is not None and not module.origin:
                tensors[key] = LazyArray.of(np.ones(module.rank, extra.tensor.dtype))
        return tensors
    translated = translate_companions(adapter, "PEFT")
    # PEFT makes magnitudes for all modules from the base, and would find none in the file.
    check_all_dora(adapter, "PEFT")
    return {f"{PREFIX}{key}": tensor for key, tensor in translated.items()}


def translate_companions(adapter: Adapter, title: str) -> dict[str, LazyArray]:
    """The magnitudes of DoRA and the biases of B of another dialect, under the module's name and PEFT's leaf.

    Raises
    ------
    FormatError, ShapeError
        ``title`` cannot hold extras of other roles, two of them would have one key, or one does not fit its module.
    """

    def translate(extra: Extra, module: Update, out: int) -> tuple[str, LazyArray]:
        if extra.role == "lora_bias":
            return f"{extra.module}.lora_B.bias", extra.tensor.reshape(out)
        # The shapes of PEFT's parameters for convolutions and linear layers.
        shape = (1, out, *(1 for _ in module.layout.kernel)) if module.layout.kernel else (out,)
        return f"{extra.module}.lora_magnitude_vector", extra.tensor.reshape(*shape)

    return translate_extras(adapter, ("magnitude", "lora_bias"), title, translate)


def _is_parameter(modules: Modules) -> bool:
    """Whether PEFT wraps the parameter that a group of modules adapts, and not its module."""
    return next(iter(modules.values())).layout.kind in PARAMETERS


def _stored_path(name: str, stacks: Stacks) -> str:
    """The stored path of a stack, with one ``base_layer`` for each parameter of its module that is registered later."""
    module, _, parameter = name.rpartition(".")
    siblings = [other for other in stacks if other.rpartition(".")[0] == module and _is_parameter(stacks[other])]
    # The outermost parameter has the shortest path.
    order = sorted((other.rpartition(".")[2] for other in siblings), key=registration_order, reverse=True)
    return ".".join([module, *["base_layer"] * order.index(parameter)])


def _config(adapter: Adapter, stacks: Stacks) -> Fields | None:
    """The old configuration if it still describes the adapter, otherwise one that does."""
    old = lora_fields(adapter.config) if adapter.format == NAME and adapter.config is not None else None
    unsaid = all(
        module.scaling.formula == "unknown" and _stated_scale(name, module, stacks)[0] == 1
        for name, modules in stacks.items()
        for module in modules.values()
    )
    if old is None and adapter.format == NAME and unsaid:
        return None
    if old is None:
        return _update_fields(_new_config(adapter), stacks)
    if old.get("use_dora") and len(adapter) and not any(extra.role in DORA for extra in adapter.extra.values()):
        old = {**old, "use_dora": False}  # the magnitudes were left out, and PEFT would make new ones from the base
    if old.get("peft_type") is None:
        old = {"peft_type": "LORA", **old}  # PEFT does not load a configuration without it
    config = PeftConfig(old)
    # PEFT then takes the `target_modules` of the kind of model, and servers refuse the file.
    untargeted = old.get("target_modules") is None and old.get("target_parameters") is None
    if old is adapter.config and _still_true(config, stacks) and not adapter.narrowed and not untargeted:
        return old
    config.check_base_unchanged()
    return _update_fields(old, stacks, exact=adapter.narrowed or untargeted)


def _still_true(config: PeftConfig, stacks: Stacks) -> bool:
    new = []
    for name, modules in stacks.items():
        path = _path(name, config, stacks)
        # What PEFT would use, against what the module has now.
        rank, scale = config.rank(path), config.scaling(path).value
        for module in modules.values():
            configured_rank = module.scaling.rank if module.origin else _width(module)
            if rank != configured_rank or scale != _stated_scale(name, module, stacks)[0]:
                return False
            if not module.origin:
                new.append(path)
    return not config.unmatched_modules(new)


def _path(name: str, config: PeftConfig, stacks: Stacks) -> str:
    """The path by which PEFT looks up r and α of a module or parameter."""
    return _attention(name, stacks) or config.path(name)


def _stated_scale(name: str, module: Update, stacks: Stacks) -> tuple[float, Scaling]:
    """The scale of a module in the file, which is half of its own if PEFT adds the update twice."""
    twice = name.endswith(".out_proj") and _attention(name, stacks)
    return (module.scale / 2, module.scaling.once()) if twice else (module.scale, module.scaling)


def _fold_attentions(stacks: Stacks) -> Stacks:
    """Give each out_proj of an nn.MultiheadAttention the scale that PEFT uses for it, and fold the ratio into its B.

    PEFT up to 0.21.2 adds this update twice, so the scale that PEFT uses is twice that of the attention's own pair.
    """
    new_stacks = dict(stacks)
    for name, modules in stacks.items():
        attention = _attention(name, stacks) if name.endswith(".out_proj") else None
        if attention is None:
            continue
        ((inner, module),) = modules.items()
        (owner,) = stacks[f"{attention}.in_proj_weight"].values()
        scale = 2 * owner.scale
        # A scale of 0 cannot be reached by a factor, and only a pair has a B to fold into.
        if not scale or scale == module.scale or not isinstance(module, LowRank):
            continue
        B, A = module.factors
        folded = B.map(partial(np.multiply, np.asarray(module.scale / scale, B.dtype)), shape=B.shape)
        new_stacks[name] = {inner: LowRank(folded, A, scale, scaling=owner.scaling.doubled(), layout=module.layout)}
    return new_stacks


def _halve(adapter: Adapter, stacks: Stacks) -> Stacks:
    """Double a new α that is no whole number until it is one, and halve B as often, where both are exact.

    Some programs read α as a whole number: 10.5 becomes 21. An α that was read stays, and so does one such as 11.2.
    """
    fields = adapter.config if adapter.format == NAME and adapter.config is not None else _new_config(adapter)
    formula: ScaleFormula = "alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r"
    # Modules of one rank and one scale keep one α in common. PEFT joins experts that are modules of their own, at one
    # scale, so the scale of these stays.
    groups: dict[tuple[int, float], list[str]] = {}
    for name, modules in stacks.items():
        if is_expert_alone(name):
            continue
        first = next(iter(modules.values()))
        groups.setdefault((_width(first), _stated_scale(name, first, stacks)[0]), []).append(name)
    new_stacks = dict(stacks)
    for (rank, scale), names in groups.items():
        members = [module for name in names for module in stacks[name].values()]
        alphas = [module.scaling.alpha_for(scale, rank, formula) for module in members]
        powers = [2**k for k in range(11) if scale_of(np.rint(2**k * alphas[0]), rank, formula) == 2**k * scale]
        was_read = any(alpha == module.scaling.alpha for alpha, module in zip(alphas, members, strict=True))
        if not was_read and powers and powers[0] > 1 and all(_divides(module, powers[0]) for module in members):
            for name in names:
                new_stacks[name] = {inner: _divided(one, powers[0]) for inner, one in stacks[name].items()}
    return new_stacks


def _divides(module: Update, power: int) -> bool:
    """Whether B divided by a power of two has all its bits; a small number of float16 may lose its last ones."""
    # Fused projections are stored block by block only as they were read.
    if not isinstance(module, LowRank) or module.layout.kind == "merged":
        return False
    factor = np.asarray(power, module.dtype)
    return np.array_equal(module.B / factor * factor, module.B)


def _divided(module: Update, power: int) -> LowRank:
    """The same update with a larger scale and a smaller B."""
    B, A = module.factors
    smaller = B.map(partial(np.multiply, np.asarray(1 / power, B.dtype)), shape=B.shape)
    return LowRank(smaller, A, power * module.scale, layout=module.layout)


def _width(module: Update) -> int:
    """The r of a module in the configuration; for fused projections that were read, the rank of one slice."""
    # A changed module is written as one pair of the full rank.
    fused = module.layout.kind == "merged" and module.origin is not None
    return module.rank // module.layout.groups if fused else module.rank


def _update_fields(fields: Fields, stacks: Stacks, *, exact: bool = False) -> dict[str, Any]:
    """``fields`` with ranks, alphas and `target_modules` that fit the modules; all other fields are unchanged.

    With ``exact``, every module is named as a target, because the old targets would make PEFT adapt removed modules.
    """
    terms = _terms(PeftConfig(fields), stacks)
    updated = {**fields, **rank_fields(terms)}
    # Targets that fit are kept, because people write them as short names.
    if exact or PeftConfig(updated).unmatched_modules(terms):
        updated.update(_targets(stacks, terms))
    return updated


def _terms(config: PeftConfig, stacks: Stacks) -> Terms:
    terms: Terms = {}
    for name, modules in stacks.items():
        path = _path(name, config, stacks)
        for module in modules.values():
            rank = _width(module)
            scale, scaling = _stated_scale(name, module, stacks)
            rank_and_alpha = rank, scaling.alpha_for(scale, rank, config.formula)
            # All experts of a stack, and both projections of an attention, share one entry.
            if terms.setdefault(path, rank_and_alpha) != rank_and_alpha:
                what = f"{path}: its parts differ in rank or scale, but PEFT holds one for all of them"
                raise ShapeError(what, fix="give them one rank (--uniform)")
    return terms


def _targets(stacks: Stacks, terms: Terms) -> dict[str, Any]:
    """``target_modules`` and ``target_parameters`` with the full path of every module, and nothing else."""
    parameters = [p for p in terms if (_is_parameter(stacks[p]) if p in stacks else p.endswith(".weight"))]
    modules = [path for path in terms if path not in set(parameters)]
    return {"target_modules": modules, "target_parameters": parameters or None}


def _new_config(adapter: Adapter) -> dict[str, Any]:
    """A configuration for an adapter of another dialect, with the fields of an earlier PEFT configuration if any."""
    # One module without rsLoRA is enough to write plain alphas.
    rslora = bool(len(adapter)) and all(m.scaling.formula == "alpha/sqrt(r)" for m in adapter.modules.values())
    stacks = [m.layout for m in adapter.modules.values() if m.layout.kind == "experts"]
    upright = bool(stacks) and not any(layout.transposed for layout in stacks)
    return {
        # The reader takes the orientation of stacks from the version.
        **({"peft_version": ".".join(map(str, (*SWAPPED, 0)))} if upright else {}),
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": any(m.layout.transposed for m in adapter.modules.values() if m.layout.kind == "linear"),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": any(extra.role == "magnitude" for extra in adapter.extra.values()),
        "lora_bias": any(extra.role == "lora_bias" for extra in adapter.extra.values()),
        **adapter.peft_fields,
    }


def rank_fields(terms: Terms) -> dict[str, Any]:
    """The fields with the ranks and alphas of these modules: the most common ones, and patterns for the others."""
    rank = most_common((r for r, _ in terms.values()), DEFAULT_RANK)
    alpha = most_common((a for _, a in terms.values()), DEFAULT_ALPHA)
    return {
        "r": rank,
        "lora_alpha": _integer_if_whole(alpha),
        "rank_pattern": _literal_pattern({path: r for path, (r, _) in terms.items()}, rank),
        "alpha_pattern": _literal_pattern({path: _integer_if_whole(a) for path, (_, a) in terms.items()}, alpha),
    }


def _integer_if_whole(alpha: float) -> float | int:
    """The number as an int if it is whole, because α is usually written so."""
    # Above 2⁵³ not every whole number is a float64.
    return int(alpha) if float(alpha).is_integer() and abs(alpha) < 2**53 else alpha


def _literal_pattern(values: Fields, default: Any) -> dict[str, Any]:
    """The full paths whose values differ from the default, and all other paths that their keys match; longest first."""
    odd = Endings(path for path, value in values.items() if value != default)
    paths = [path for path in values if odd.cover(path)]
    paths.sort(key=lambda path: (-len(path), natural_key(path)))
    return {(path if _PLAIN.match(path) else re.escape(path)): values[path] for path in paths}
