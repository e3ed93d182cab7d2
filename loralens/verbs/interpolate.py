"""The verb ``interpolate``: writes a point on the line between two adapters."""

from collections.abc import Sequence
from typing import Unpack

from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import as_globs, check_finite
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
    take: AdapterSource | None = None,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Write (1 − t)·A + t·B of two adapters, exactly.

    With ``modules`` only these modules are interpolated, and the others are those of A. The number t may lie outside
    [0, 1]. For the arc instead of the line: ``combine(…, method="slerp")``.

    Parameters
    ----------
    first, second : path or Adapter
    at : float
        0 is the first adapter, 1 the second.
    modules : sequence of str
        Interpolate only modules whose name or kind matches one of these glob patterns.
    take : path or Adapter, optional
        The adapter whose heads and biases are written where both have some: a path, a name, ``"1"``, ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how files are read (``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``).

    Raises
    ------
    OptionError
        ``at`` is no finite number; a glob that matches nothing; an output that is where a source is.
    FormatError
        A file that is no adapter.
    MismatchError
        No module in common; heads in both and no ``take``; DoRA without its base.
    ShapeError
        A module of two shapes: two base models.
    """
    check_finite("at", at)
    chosen = as_globs(modules)
    pairs = [
        (first, strength_within(chosen, 1 - at, elsewhere=1.0)),
        (second, strength_within(chosen, at, elsewhere=0.0)),
    ]
    return combine_sources(pairs, take=take, **options)
