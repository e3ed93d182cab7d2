"""The verb ``interpolate``: writes a point on the line between two adapters."""

from collections.abc import Sequence
from typing import Unpack

from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import Blocks, as_globs, check_finite
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


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
