"""The verb ``scale``: writes an adapter with its update multiplied by a number."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast, overload

from loralens.core.naming.selection import select
from loralens.core.recipe import Strength
from loralens.errors import OptionError, place
from loralens.verbs.batches.batch import AdapterWork, in_batches, one_adapter
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.inputs.adapters import READING, AdapterSource, Reading, Source, labels, read_where_unknown
from loralens.verbs.inputs.blocks import BlockWeights, weights_by_module
from loralens.verbs.inputs.choices import Blocks, as_globs, check_finite
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


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
