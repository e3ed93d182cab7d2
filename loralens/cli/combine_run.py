"""A recipe followed: adapters read, combined, truncated, written; and what there is to report."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.cli import compress_rule, options, target
from loralens.cli.bases import warn_of_base, warn_of_bases
from loralens.cli.compress_form import Form
from loralens.cli.progress import progress
from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.arithmetic.combine import Combination
    from loralens.cli.combine_report import Report
    from loralens.cli.rounding import Rounding
    from loralens.core.adapter import Adapter
    from loralens.core.recipe import Recipe
    from loralens.core.structured import Update
    from loralens.core.threads import Step
    from loralens.core.weights import Weight
    from loralens.formats.files.container import Files, Stored


def follow(recipe: "Recipe", given: Mapping[str, Any]) -> None:
    """Combine as the recipe says, write the result, and say what came of each adapter."""
    output: Path | None = given["output"]
    target.require(output, dry_run=given["dry_run"])
    looks = _looks(recipe)
    adapters = [load(one.path, given) for one in recipe.adapters]
    if len(adapters) > 1:
        warn_of_bases([one.path for one in recipe.adapters], adapters)
        for one, adapter in zip(recipe.adapters, adapters, strict=True):
            _check_known(one.path, adapter)
    form = Form.of(adapters[0], to=given["to"], base=given["base"])
    if output:
        for one in recipe.adapters:
            form.check(one.path, output, overwrite=given["overwrite"])
    weights = _weights(recipe, adapters, given["base"])
    with progress(recipe.method, looks * _count(recipe, adapters)) as step:
        found, ranks, adapter, exact = _combined(recipe, adapters, form, given["dtype"], weights, step)
    adapter, cost = _rounded(adapter, exact, form, given["dtype"], allow_loss=given["allow_loss"])
    for note in (*found.notes, *compress_rule.rank_notes(recipe.truncate.get("rank"), ranks)):
        say(f"note: {note}", err=True)
    stored, files = _stored(adapter, recipe, form)
    report = _report(recipe, adapters, found, ranks, adapter, form, cost, stored, files)
    if output and not given["dry_run"]:
        from loralens.formats.files.writing import write_files

        write_files(stored, output, files=files, overwrite=given["overwrite"])
    report.say(None if given["dry_run"] else output, output, as_json=given["as_json"])


def _looks(recipe: "Recipe") -> int:
    """How often the method looks at every module; what it cannot be told is refused before anything is read."""
    from loralens.arithmetic.method import method_named
    from loralens.arithmetic.methods import METHODS

    row = method_named(recipe.method, METHODS)
    row.settings(recipe.options, recipe.space)  # type: ignore[arg-type]
    return 2 if row.looks else 1


def _count(recipe: "Recipe", adapters: "list[Adapter]") -> int:
    """How many modules there are to combine."""
    from loralens.core.names import select
    from loralens.core.together import names_together

    return len(select(names_together(adapters, [one.path for one in recipe.adapters]), recipe.modules))


def _weights(recipe: "Recipe", adapters: "list[Adapter]", base: str | None) -> "Mapping[str, Weight] | None":
    """The base weights, where DoRA's magnitudes need them; None where nothing does.

    Raises
    ------
    MismatchError
        The factors of a DoRA adapter are to be cut, and the base is not there.
    """
    from loralens.core.carried import magnitudes

    bent = [one.path for one, adapter in zip(recipe.adapters, adapters, strict=True) if magnitudes(adapter)]
    alone = len(adapters) == 1 and recipe.adapters[0].strength.plain and not recipe.options
    if not bent or (alone and not recipe.truncate):
        return None
    if base is None:
        if alone:
            from loralens.errors import MismatchError

            raise MismatchError(
                f"{bent[0]} is a DoRA adapter: its magnitudes belong to its factors as they are",
                fix="give --base, or cut it with loralens compress",
            )
        return None
    found = [options.base_weights(base, adapter.modules).modules for adapter in adapters]
    return {name: weight for one in reversed(found) for name, weight in one.items()}


def load(path: str, given: Mapping[str, Any]) -> "Adapter":
    """The adapter at ``path``, what the reader found said on stderr."""
    reading = {name: given[name] for name in options.READING}
    adapter = options.load_if_unknown(path, {**reading, "base": given["base"]})
    if given["base"]:
        warn_of_base(path, adapter, given["base"])
    options.warn(path, adapter, but={options.DORA} if given["base"] else ())  # whole changes are measured then
    return adapter


def _check_known(path: str, adapter: "Adapter") -> None:
    """Refuse to add up what is not known: a strength, an order of rows."""
    from loralens.errors import place

    with place(path):
        target.check_known(adapter, "a sum")


def _combined(
    recipe: "Recipe",
    adapters: "list[Adapter]",
    form: Form,
    dtype: str | None,
    weights: "Mapping[str, Weight] | None",
    step: "Step | None",
) -> "tuple[Combination, dict[str, int], Adapter, Mapping[str, Update]]":
    """The combination, the ranks it is cut to, what is left of it then, and its new factors before they are rounded."""
    import numpy as np

    from loralens.arithmetic.combine import combine_adapters
    from loralens.core.vector import with_modules

    wanted = options.dtype_of(dtype)
    cut, threads = bool(recipe.truncate), os.cpu_count() or 1
    found = combine_adapters(
        [(adapter, one.strength) for adapter, one in zip(adapters, recipe.adapters, strict=True)],
        method=recipe.method,
        seed=recipe.seed,
        space=recipe.space,  # type: ignore[arg-type]
        modules=recipe.modules,
        take=_taken(recipe),
        dtype=None if cut else wanted,  # what is cut is rounded once, afterwards
        drop_dead=recipe.drop_dead,
        width=int(recipe.truncate.get("rank", 0)),
        labels=[one.path for one in recipe.adapters],
        weights=weights,
        threads=threads,
        step=step,
        **recipe.options,
    )
    if cut:
        ranks, at = _cut(found, recipe, form, wanted or _common_dtype(adapters))
        adapter = with_modules(found.adapter, at(wanted or _common_dtype(adapters)))
        return found, ranks, found.magnified(adapter), at(np.dtype(np.float64))
    exact = {name: lift.at(dtype=np.float64) for name, lift in found.lifts.items() if name in found.adapter}
    return found, {}, _one_rank(found.adapter) if recipe.uniform else found.adapter, exact


def _rounded(
    adapter: "Adapter", exact: "Mapping[str, Update]", form: Form, dtype: str | None, *, allow_loss: bool
) -> "tuple[Adapter, Rounding | None]":
    """The adapter, in few bits where the dialect has them, and what rounding costs its new factors.

    None where nobody asked for a dtype or few bits, and float16 is not among the dtypes: the error of the others
    follows from their digits, and float16 also has numbers that are too small for it.
    """
    import numpy as np

    from loralens.cli.rounding import Rounding, quantised

    narrow = dtype or form.bits or any(module.dtype == np.float16 for module in adapter.modules.values())
    if not narrow:
        return adapter, None
    before = replace(adapter, modules={**adapter.modules, **exact})
    after = quantised(adapter, form.bits) if form.bits else adapter
    allowed = allow_loss or form.bits is not None
    return after, Rounding.between(before, after.modules, allow_loss=allowed, dtype=dtype)


def _one_rank(adapter: "Adapter") -> "Adapter":
    """All modules as wide as the widest, by zeros."""
    from loralens.core.together import widened

    rank = max(module.rank for module in adapter.modules.values())
    return adapter.map(lambda module: widened(module, rank))


def _cut(
    found: "Combination", recipe: "Recipe", form: Form, dtype: Any
) -> "tuple[dict[str, int], Callable[[Any], Mapping[str, Update]]]":
    """The ranks that the rule gives, as compress chooses them, and the modules at these ranks, in any dtype."""
    import numpy as np

    from loralens.compression.directions import Directions, directions, narrowed, truncated
    from loralens.compression.plan import Plan, kept_whole
    from loralens.core.ranks import Rule

    def of(name: str, module: Any) -> "Directions":
        if name not in found.lifts:
            return directions(module)
        s = found.lifts[name].s  # new factors are singular vectors already
        return Directions(s, np.eye(module.rank, s.size), np.eye(s.size, module.rank))

    own = {name: of(name, module) for name, module in found.adapter.items() if not kept_whole(module)}
    plan = Plan(found.adapter, own, dtype)
    ((rule, value),) = recipe.truncate.items()

    def size(adapter: "Adapter") -> int:
        from loralens.formats.dialects.sizes import stored_size

        return stored_size(*_stored(adapter, recipe, form))

    chosen = plan.ranks(
        Rule(rule, value),  # type: ignore[arg-type]
        one_rank=recipe.uniform,
        drop_dead=recipe.drop_dead,
        size=size,
    )

    def cut(name: str, module: Any, dtype: Any) -> Any:
        rank = chosen.get(name, module.rank)
        if name in found.lifts:
            return found.lifts[name].at(rank, dtype)
        return narrowed(module, dtype) if rank == module.rank else truncated(module, own[name].head(rank), dtype)

    def at(dtype: Any) -> "Mapping[str, Update]":
        return {name: cut(name, module, dtype) for name, module in found.adapter.items() if chosen.get(name, 1)}

    return chosen, at


def _common_dtype(adapters: "list[Adapter]") -> Any:
    """The dtype of all factors where they have one, else float32."""
    import numpy as np

    found = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _taken(recipe: "Recipe") -> Any:
    """The place of the adapter whose full tensors stand."""
    if recipe.take in (None, "none"):
        return recipe.take
    paths = [one.path for one in recipe.adapters]
    hits = [t for t, path in enumerate(paths) if recipe.take in (path, Path(path).name, str(t + 1))]
    if not hits:
        from loralens.errors import OptionError

        raise OptionError(f"--take {recipe.take}: no such adapter here", fix=f"give {', '.join(paths)}, or none")
    return hits[0]


def _stored(adapter: "Adapter", recipe: "Recipe", form: Form) -> "tuple[Stored, Files]":
    """What is written: the adapter, with the recipe in the metadata where there is any."""
    from loralens.formats import stored_as
    from loralens.formats.records.recipes import stamped

    stored, files = stored_as(adapter, form.name, **form.given)
    return (stamped(stored, recipe) if files.weights.endswith(".safetensors") else stored), files


def _report(
    recipe: "Recipe",
    adapters: "list[Adapter]",
    found: "Combination",
    ranks: Mapping[str, int],
    adapter: "Adapter",
    form: Form,
    cost: "Rounding | None",
    stored: "Stored",
    files: "Files",
) -> "Report":
    from loralens.cli.combine_report import Report
    from loralens.core.together import together
    from loralens.formats.dialects.sizes import stored_size

    rows = together(adapters, [one.path for one in recipe.adapters])
    nominal = {name: [module.rank if module else 0 for module in rows[name]] for name in found.modules}
    recipe = replace(recipe, space=found.recipe.space)
    return Report(recipe, found, dict(ranks), nominal, adapter, form.name, stored_size(stored, files), cost)
