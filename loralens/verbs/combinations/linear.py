"""The verb ``scale``: writes an adapter with its update multiplied by a number."""

from collections import Counter
from collections.abc import Sequence

from loralens.core.selection import select
from loralens.core.stored import Strength
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.verbs.batches.batch import AdapterWork, in_batches
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.combinations.combine import CombineResult, combine_sources
from loralens.verbs.files.target import Writing
from loralens.verbs.shared.adapters import AdapterSource, Source, find_source, labels, read_where_unknown
from loralens.verbs.shared.option_values import check_finite, weights_by_module
from loralens.verbs.shared.options import BlockWeights, ModuleChoice, Reading
from loralens.verbs.shared.weighted import strength_within


@in_batches(
    lambda verb: AdapterWork(
        verb,
        lambda result: {"numbers": {"modules": len(result.adapter), "format": result.format, "bytes": result.size}},
        check=lambda options: _check_factor(
            options.get("by"), BlockWeights(**{name: options.get(name) for name in ("preset", "block_weights")})
        ),
    )
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

    With ``modules`` only these modules change. The factors keep their bits: only the scale changes. With ``by`` 0 every
    ΔW is zero. With ``preset`` or ``block_weights``, each block of an image model has its own weight, which ``by``
    multiplies.

    Several ADAPTERs, or a folder that has some in it, are written into the folder OUT, each under its own name. What
    exists there is skipped, unless ``overwrite`` is given.

    Parameters
    ----------
    adapter : path or Adapter, or a list of them
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
    adapter, factor = find_source(adapter), 1.0 if by is None else by
    strength = strength_within(selection.globs, factor, elsewhere=1.0)
    if blocks:
        strength = _strength_of_blocks(adapter, reading, blocks, selection.globs, factor)
    return combine_sources([(adapter, strength)], writing=writing, reading=reading)


def _check_factor(by: float | None, blocks: BlockWeights) -> None:
    """Refuse a factor that is not a number, and a call that says nothing about the strength."""
    if by is not None:
        # With an infinite or undefined factor no weight would be a number.
        check_finite("by", by)
    elif not blocks:
        raise OptionError(
            "nothing says how much to scale", fix="give --by a finite number, or --preset, or --block-weights"
        )


def _strength_of_blocks(
    source: AdapterSource, reading: Reading, blocks: BlockWeights, globs: Sequence[str], factor: float
) -> Strength:
    """The weights of all modules in the shortest form that a recipe has for them."""
    adapter = read_where_unknown(source, reading)
    with place(labels([source])[0]):
        weights = weights_by_module(adapter, blocks.preset, blocks.block_weights) or {}
        chosen = set(select(adapter, globs))
    factors = {name: factor * weight if name in chosen else 1.0 for name, weight in weights.items()}
    ((common, _),) = Counter(factors.values()).most_common(1)
    return Strength(common, {name: weight for name, weight in factors.items() if weight != common})


@takes_options
def negate(
    adapter: AdapterSource,
    *,
    selection: ModuleChoice,
    writing: Writing,
    reading: Reading,
) -> CombineResult:
    """Write an adapter with the sign of ΔW changed.

    With ``modules`` only these modules change. The factors keep their bits: only the scale changes its sign.

    Parameters
    ----------
    adapter : path or Adapter
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

    With ``modules`` B is subtracted only in these modules. What is equal in both becomes exact zeros.

    Parameters
    ----------
    first : path or Adapter
        A and B.
    second : path or Adapter
        A and B.
    take : path or Adapter, optional
        The adapter whose heads and biases are written where both have some; 'none' leaves them out.

        The adapter whose heads and biases are written if both have some: its path, its name, ``"1"`` or ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
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
        The adapters are of different image models or have no module in common, both have heads and ``take`` is missing,
        or DoRA lacks its base.
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

    With ``modules`` only these modules are interpolated, and the others are those of A. The number t may lie outside
    [0, 1]. For the arc instead of the line: loralens combine --method slerp.

    Parameters
    ----------
    first : path or Adapter
        A and B.
    second : path or Adapter
        A and B.
    at : float
        The place on the line between the adapters: 0 is A, 1 is B.

        The number t: 0 is A and 1 is B. It may lie outside [0, 1], where the line goes on beyond the adapters.
    take : path or Adapter, optional
        The adapter whose heads and biases are written where both have some; 'none' leaves them out.

        The adapter whose heads and biases are written if both have some: its path, its name, ``"1"`` or ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
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
        The adapters are of different image models or have no module in common, both have heads and ``take`` is missing,
        or DoRA lacks its base.
    ShapeError
        A module has two shapes, so the adapters belong to two base models.

    Notes
    -----
    ``combine(…, method="slerp")`` follows the arc between the adapters instead of the line.

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
