"""The verb ``scale``: writes an adapter with its update multiplied by a number."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast, overload

from loralens.core.selection import select
from loralens.core.stored import Strength
from loralens.errors import OptionError, place
from loralens.verbs.batches.batch import AdapterWork, in_batches, one_adapter
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.combinations.combine import CombineResult, combine_sources
from loralens.verbs.files.output_format import WritingAndReading
from loralens.verbs.shared.adapters import READING, AdapterSource, Reading, Source, labels, read_where_unknown
from loralens.verbs.shared.option_values import Blocks, BlockWeights, as_globs, check_finite, weights_by_module
from loralens.verbs.shared.weighted import strength_within


class ScaleOptions(WritingAndReading, total=False):
    """The options of `scale`, for its two signatures."""

    modules: Sequence[str]
    block: Blocks
    preset: str | None
    block_weights: str | Mapping[str, float] | Sequence[float] | None
    jobs: int | None


def _numbers(result: CombineResult) -> dict[str, Any]:
    """What matters of one adapter among several, as JSON values."""
    return {"modules": len(result.adapter), "format": result.format, "bytes": result.size}


# As of `compress`: the first signature wins, and a path may name a folder with several adapters.
@overload
def scale(  # type: ignore[overload-overlap]
    adapter: AdapterSource, by: float | None = None, **options: Unpack[ScaleOptions]
) -> CombineResult | Any: ...
@overload
def scale(
    adapter: Sequence[AdapterSource], by: float | None = None, **options: Unpack[ScaleOptions]
) -> BatchResult: ...
@in_batches(
    lambda verb: AdapterWork(
        verb,
        _numbers,
        check=lambda options: _check_factor(*map(options.get, ("by", "preset", "block_weights"))),
    )
)
def scale(
    adapter: Source,
    by: float | None = None,
    *,
    modules: Sequence[str] = (),
    block: Blocks = (),
    preset: str | None = None,
    block_weights: str | Mapping[str, float] | Sequence[float] | None = None,
    jobs: int | None = None,
    **options: Unpack[WritingAndReading],
) -> CombineResult | BatchResult:
    """Write an adapter with ΔW multiplied by a number: ΔW' = x·ΔW.

    With ``modules`` only these modules change. The factors keep their bits: only the scale changes. With ``by`` 0 every
    ΔW is zero. With ``preset`` or ``block_weights``, each block of an image model has its own weight, which ``by``
    multiplies.

    Parameters
    ----------
    adapter : path or Adapter, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each; ``output`` is
        then a folder, in which each has its own name.
    by : float, optional
        The factor x, which may be any finite number; 1 if there are weights of blocks.
    modules : sequence of str
        Change only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    preset : str, optional
        The name of weights for the blocks of SD, SDXL or FLUX.1, such as ``OUTALL``; docs/commands/scale.md lists them.
    block_weights : str, mapping or sequence of float, optional
        Weights of blocks: ``"IN04=0,MID=1"``, ``{"IN04": 0, "MID": 1}``, or all of them in their order, as block weight
        tools write them. They come after the preset.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process; 1 by default.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how the file is read (``format``, ``alpha``, ``scale``, ``once``).

    Raises
    ------
    OptionError
        ``by`` is not a finite number or nothing is to be changed, a glob pattern matches no module, the model has no
        such preset or block, the output overlaps with the source, or rounding costs too much.
    FormatError
        The file is not an adapter.
    """
    del jobs  # one adapter is one job
    adapter = one_adapter(adapter)
    _check_factor(by, preset, block_weights)
    factor = 1.0 if by is None else by
    strength = strength_within(as_globs(modules, block), factor, elsewhere=1.0)
    if preset is not None or block_weights is not None:
        reading = cast("Reading", {name: options[name] for name in READING if name in options})  # type: ignore[literal-required]
        blocks = BlockWeights(preset=preset, block_weights=block_weights)
        strength = _strength_of_blocks(adapter, reading, blocks, as_globs(modules, block), factor)
    return combine_sources([(adapter, strength)], **options)


def _check_factor(by: float | None, preset: object, block_weights: object) -> None:
    """Refuse a factor that is not a number, and a call that says nothing about the strength."""
    if by is not None:
        # With an infinite or undefined factor no weight would be a number.
        check_finite("by", by)
    elif preset is None and block_weights is None:
        raise OptionError(
            "nothing says how much to scale", fix="give --by a finite number, or --preset, or --block-weights"
        )


def _strength_of_blocks(
    source: AdapterSource, reading: Reading, blocks: BlockWeights, globs: Sequence[str], factor: float
) -> Strength:
    """The weights of all modules in the shortest form that a recipe has for them."""
    adapter = read_where_unknown(source, reading)
    with place(labels([source])[0]):
        weights = weights_by_module(adapter, blocks) or {}
        chosen = set(select(adapter, globs))
    factors = {name: factor * weight if name in chosen else 1.0 for name, weight in weights.items()}
    ((common, _),) = Counter(factors.values()).most_common(1)
    return Strength(common, {name: weight for name, weight in factors.items() if weight != common})


def negate(
    adapter: AdapterSource,
    *,
    modules: Sequence[str] = (),
    block: Blocks = (),
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Write an adapter with the sign of ΔW changed: ΔW' = −ΔW.

    With ``modules`` only these modules change. The factors keep their bits: only the scale changes its sign.

    Parameters
    ----------
    adapter : path or Adapter
    modules : sequence of str
        Change only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how the file is read (``format``, ``alpha``, ``scale``, ``once``).

    Raises
    ------
    OptionError
        A glob pattern matches no module, the output overlaps with the source, or rounding costs too much.
    FormatError
        The file is not an adapter.
    """
    # The sign goes into the scale, where −1 is exact in every dtype.
    strength = strength_within(as_globs(modules, block), -1.0, elsewhere=1.0)
    return combine_sources([(adapter, strength)], **options)


def subtract(
    first: AdapterSource,
    second: AdapterSource,
    *,
    modules: Sequence[str] = (),
    block: Blocks = (),
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    force: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Write the difference ΔW_A − ΔW_B of two adapters, exactly.

    The result has rank r_A + r_B or less. Modules that are equal in both become exact zeros. With ``modules`` B is
    subtracted only in these modules.

    Parameters
    ----------
    first, second : path or Adapter
        A and B.
    modules : sequence of str
        Subtract only in modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    take : path or Adapter, optional
        The adapter whose heads and biases are written if both have some: its path, its name, ``"1"`` or ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
    drop_dead : bool
        Leave out modules whose update is zero.
    force : bool
        Combine adapters of different image models too, such as SDXL and SD 1.5, which share a text encoder.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how files are read (``format``, ``alpha``, ``scale``, ``once``).

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
    """
    # B has weight 0 in modules that were not chosen, so they stay those of A.
    pairs = [(first, Strength()), (second, strength_within(as_globs(modules, block), -1.0, elsewhere=0.0))]
    return combine_sources(pairs, take=take, drop_dead=drop_dead, force=force, **options)


def interpolate(
    first: AdapterSource,
    second: AdapterSource,
    at: float,
    *,
    modules: Sequence[str] = (),
    block: Blocks = (),
    take: AdapterSource | None = None,
    force: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Write (1 − t)·ΔW_A + t·ΔW_B of two adapters, exactly.

    With ``modules`` only these modules are interpolated, and the others are those of A. ``combine(…, method="slerp")``
    follows the arc between the adapters instead of the line.

    Parameters
    ----------
    first, second : path or Adapter
        A and B.
    at : float
        The number t: 0 is A and 1 is B. It may lie outside [0, 1], where the line goes on beyond the adapters.
    modules : sequence of str
        Interpolate only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    take : path or Adapter, optional
        The adapter whose heads and biases are written if both have some: its path, its name, ``"1"`` or ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
    force : bool
        Combine adapters of different image models too, such as SDXL and SD 1.5, which share a text encoder.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how files are read (``format``, ``alpha``, ``scale``, ``once``).

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
    """
    # No limit to [0, 1]: beyond B the line exaggerates the difference of B from A.
    check_finite("at", at)
    chosen = as_globs(modules, block)
    # Outside of the chosen modules the result is A: weight 1 for A, and 0 for B.
    pairs = [
        (first, strength_within(chosen, 1 - at, elsewhere=1.0)),
        (second, strength_within(chosen, at, elsewhere=0.0)),
    ]
    return combine_sources(pairs, take=take, force=force, **options)
