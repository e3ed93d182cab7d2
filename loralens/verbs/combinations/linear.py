"""The verb ``scale``: writes an adapter with its update multiplied by a number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loralens.core.adapter import Adapter
from loralens.core.selection import select
from loralens.core.stored import Strength
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.tables.numbers import count
from loralens.tables.table import Column, Keys, Table
from loralens.verbs.batches.batch import BatchResult, in_batches
from loralens.verbs.combinations.combine import CombineResult, combine_sources, read_source
from loralens.verbs.files.convert import COLUMNS, NamedModule
from loralens.verbs.files.output import RoundingCost, Target, Writing, Written, round_factors
from loralens.verbs.shared.adapters import (
    AdapterSource,
    Source,
    find_source,
    sources,
    strength_within,
)
from loralens.verbs.shared.options import (
    Blocks,
    BlockWeights,
    ModuleChoice,
    Reading,
    check_finite,
    numpy_dtype,
    weights_by_module,
)


@in_batches(
    lambda result: {"numbers": {"modules": len(result.adapter), "format": result.format, "bytes": result.size}},
    check=lambda options: _check_factor(
        options.get("by"), BlockWeights(**{name: options.get(name) for name in ("preset", "block_weights")})
    ),
)
@takes_options
def scale(
    adapter: Source,
    by: float | None = None,
    *,
    blocks: BlockWeights,
    jobs: int | None = None,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult | BatchResult:
    """Write an adapter with ΔW multiplied by a number.

    Only the scale changes: the factors keep their bits. (For PEFT, B is halved where that makes α a whole number and
    is exact.) With ``modules`` only these modules change. With ``preset`` or
    ``block_weights`` each block of an image model has its own weight, which ``by`` multiplies.

    Several adapters, or a folder of them, are written into the folder OUT, each under its own name. What exists there
    is skipped, unless ``overwrite`` is given.

    Parameters
    ----------
    adapter : path, Adapter or model, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each; ``output`` is
        then a folder, in which each has its own name.
    by : float, optional
        The factor that multiplies ΔW. [default with weights of blocks: 1]
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process. [default: 1]
    blocks : BlockWeights
        The options ``preset``, ``block_weights``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        ``by`` is not a finite number or nothing is to be changed, a glob pattern matches no module, the model has no
        such preset or block, the output overlaps with the source, or rounding costs too much.
    FormatError
        The file is not an adapter.

    Examples
    --------
    $ loralens scale adapter --by 0.5 -o weaker
    """
    del jobs  # one adapter is one job
    _check_factor(by, blocks)
    factor = 1.0 if by is None else by
    globs = selection.globs
    pairs = [(find_source(adapter)[0], strength_within(globs, factor, elsewhere=1.0))]
    return combine_sources(pairs, blocks=blocks, within=globs, writing=writing, reading=reading)


def _check_factor(by: float | None, blocks: BlockWeights) -> None:
    """Refuse a factor that is not a number, and a call that says nothing about the strength."""
    if by is not None:
        # With an infinite or undefined factor no weight would be a number.
        check_finite("by", by)
    elif not blocks:
        raise OptionError(
            "nothing says how much to scale", fix="give --by a finite number, or --preset, or --block-weights"
        )


@takes_options
def negate(
    adapter: AdapterSource,
    *,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Write an adapter with the sign of ΔW changed.

    Only the scale changes its sign: the factors keep their bits. With ``modules`` only these modules change.

    Parameters
    ----------
    adapter : path, Adapter or model
    selection : ModuleChoice
        The options ``modules``, ``block``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob pattern matches no module, the output overlaps with the source, or rounding costs too much.
    FormatError
        The file is not an adapter.

    Examples
    --------
    $ loralens negate adapter -o negative
    """
    # The sign goes into the scale, where −1 is exact in every dtype.
    strength = strength_within(selection.globs, -1.0, elsewhere=1.0)
    return combine_sources([(adapter, strength)], writing=writing, reading=reading)


@takes_options
def subtract(
    first: AdapterSource,
    second: AdapterSource,
    *,
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    force: bool = False,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Write the difference A − B of two adapters, exactly.

    With ``modules`` B is subtracted in these modules alone. Where A and B are equal, the result is exactly 0.

    Parameters
    ----------
    first, second : path or Adapter
        A and B.
    take : path or Adapter, optional
        The adapter whose modules_to_save and biases are written, if both have some; 'none' leaves them out.

        Its path, its name, ``"1"`` or ``"2"``, or the object that was given.
    drop_dead : bool
        Leave out modules whose update is zero.
    force : bool
        Combine adapters of different image models too.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob pattern matches no module, the output overlaps with a source, or no module is left.
    FormatError
        A file is not an adapter.
    MismatchError
        The adapters are of different image models or have no module in common, both have modules_to_save and
        ``take`` is missing, or DoRA lacks its base.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.

    Notes
    -----
    The result has rank r_A + r_B or less.

    Examples
    --------
    $ loralens subtract adapter other -o difference
    """
    # B has weight 0 in modules that were not chosen, so they stay those of A.
    pairs = [(first, Strength()), (second, strength_within(selection.globs, -1.0, elsewhere=0.0))]
    return combine_sources(pairs, take=take, drop_dead=drop_dead, force=force, writing=writing, reading=reading)


@takes_options
def interpolate(
    first: AdapterSource,
    second: AdapterSource,
    at: float,
    *,
    take: AdapterSource | None = None,
    force: bool = False,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Write (1 − t)·A + t·B of two adapters, exactly.

    With ``modules`` only these modules are interpolated, and the others stay as in A. The number t may lie outside
    [0, 1]. The method slerp of `loralens.combine` follows the arc instead of the line.

    Parameters
    ----------
    first, second : path or Adapter
        A and B.
    at : float
        The number t: 0 is A, 1 is B, and 0.5 lies halfway.

        It may lie outside [0, 1], where the line goes on beyond the adapters.
    take : path or Adapter, optional
        The adapter whose modules_to_save and biases are written, if both have some; 'none' leaves them out.

        Its path, its name, ``"1"`` or ``"2"``, or the object that was given.
    force : bool
        Combine adapters of different image models too.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        ``at`` is not a finite number, a glob pattern matches no module, or the output overlaps with a source.
    FormatError
        A file is not an adapter.
    MismatchError
        The adapters are of different image models or have no module in common, both have modules_to_save and
        ``take`` is missing, or DoRA lacks its base.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.

    Examples
    --------
    $ loralens interpolate adapter other --at 0.5 -o between
    """
    # No limit to [0, 1]: beyond B the line exaggerates the difference of B from A.
    check_finite("at", at)
    chosen = selection.globs
    # Outside of the chosen modules the result is A: weight 1 for A, and 0 for B.
    pairs = [
        (first, strength_within(chosen, 1 - at, elsewhere=1.0)),
        (second, strength_within(chosen, at, elsewhere=0.0)),
    ]
    return combine_sources(pairs, take=take, force=force, writing=writing, reading=reading)


@dataclass(frozen=True, slots=True, repr=False)
class DropResult(Written):
    """An adapter without some of its modules.

    Attributes
    ----------
    source : str
        The path of the adapter, or the name of an object in messages.
    before, adapter : Adapter
        The whole adapter, and the remaining one as it is written.
    format : str
        The dialect of the result.
    rounding : RoundingCost
        The error that rounding adds to the remaining modules.
    """

    source: str
    before: Adapter
    adapter: Adapter
    format: str
    rounding: RoundingCost
    target: Target

    @property
    def dropped(self) -> list[str]:
        """The names of the dropped modules, in natural order."""
        return [name for name in self.before if name not in self.adapter]

    def listing(self) -> list[Table[NamedModule]]:
        """All modules, also the dropped ones. On a terminal the sentence with the counts is enough."""
        dropped: Column[NamedModule] = Column("dropped", lambda row: row[0] not in self.adapter, "dropped")
        title = f"{self.source}: {len(self.dropped)} of {len(self.before)} modules dropped"
        return [Table(title, (*COLUMNS, dropped), list(self.before.items()))]

    def conclusion(self) -> list[str]:
        """How many modules were dropped, and how many are left."""
        dropped = f"{self.source} without {len(self.dropped)} of its {count(len(self.before), 'module')}"
        return [self.target.conclusion(f"{dropped}; {len(self.adapter)} left ({self.format})")]

    def sentences(self) -> list[str]:
        """The error of rounding."""
        return [str(self.rounding)] if self.rounding.worst else []

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "source",
            Column("target", "target.written"),
            "format",
            Column("dropped", lambda result: sorted(result.dropped), type=list[str]),
            Column("left", "adapter.len", type=int),
            "rounding",
        )


@takes_options
def drop(
    adapter: AdapterSource,
    modules: str | Sequence[str] = (),
    *,
    blocks: BlockWeights,
    block: Blocks = (),
    writing: Writing,
    reading: Reading,
) -> DropResult:
    """Write an adapter without the modules that match a glob pattern, to see what they contribute.

    The other modules keep their stored bits. A magnitude of DoRA or a bias on B goes with its module, and
    modules_to_save stay. With ``preset`` or ``block_weights`` the blocks of an image model with the weight 0 are left
    out.

    Parameters
    ----------
    adapter : path, Adapter or model
    modules : str or sequence of str
        Leave out the modules whose name or kind matches this glob pattern, or has it as whole parts.
    block : int, str or sequence of them
        Leave out these blocks: 3, 4-8, or IN04 of an image model; with ``modules``, what both choose.
    blocks : BlockWeights
        The options ``preset``, ``block_weights``.
    writing : Writing
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob pattern matches no module, nothing or everything would be dropped, a weight of a block is neither 0 nor
        1, the output overlaps with the source, or rounding
        costs too much.
    FormatError
        The file is not an adapter.

    Examples
    --------
    $ loralens drop adapter -m v_proj -o without-v
    """
    writing.check()
    original, label = find_source(*sources([[adapter]]))
    # As in the other verbs that combine: --alpha only counts if the file does not state its own.
    before = read_source(original, label, reading, writing.base)
    form = writing.form(before)
    # The target is checked before the work, as in the other verbs.
    form.check_target(writing, original)
    with place(label):
        gone = _to_drop(before, ModuleChoice(modules=modules, block=block).globs, blocks)
        # No reader accepts an adapter without modules.
        if len(gone) == len(before):
            raise OptionError("nothing would be left", fix="give a glob that some modules do not match")
    # A weight that was saved in full replaces that of the base, whatever else was trained in the module.
    extra = {key: each for key, each in before.extra.items() if each.module not in gone or each.role == "saved"}
    remaining = replace(before.without(gone), extra=extra)
    new = round_factors(remaining, numpy_dtype(writing.dtype))
    with place(label):
        cost = RoundingCost.between(remaining, new.modules, allow_loss=writing.allow_loss, dtype=writing.dtype)
    writing.write(*form.encode(new))
    return DropResult(label, before, new, form.name, cost, writing)


def _to_drop(adapter: Adapter, globs: Sequence[str], blocks: BlockWeights) -> set[str]:
    """The modules that are left out."""
    weights = weights_by_module(adapter, blocks.preset, blocks.block_weights)
    if weights is None and not globs:
        raise OptionError(
            "nothing says what to drop", fix="give --modules GLOB, --block, --preset NAME or --block-weights"
        )
    weights = weights or {}
    between = sorted(set(weights.values()) - {0.0, 1.0})
    if between:
        what = f"a block has the weight {between[0]:g}, and drop leaves a block out (0) or keeps it (1)"
        raise OptionError(what, fix="use loralens scale for other weights")
    named = set(select(adapter, globs)) if globs else set()
    return named | {name for name, weight in weights.items() if weight == 0}
