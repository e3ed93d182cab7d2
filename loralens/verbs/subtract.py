"""The verb ``subtract``: writes the difference of two adapters."""

from collections.abc import Sequence
from typing import Unpack

from loralens.core.recipe import Strength
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import as_globs
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


def subtract(
    first: AdapterSource,
    second: AdapterSource,
    *,
    modules: Sequence[str] = (),
    take: AdapterSource | None = None,
    drop_dead: bool = False,
    **options: Unpack[WritingAndReading],
) -> CombineResult:
    """Write the difference A − B of two adapters, exactly.

    With ``modules`` B is subtracted only in these modules. What is equal in both becomes exact zeros.

    Parameters
    ----------
    first, second : path or Adapter
    modules : sequence of str
        Subtract only in modules whose name or kind matches one of these glob patterns.
    take : path or Adapter, optional
        The adapter whose heads and biases are written where both have some: a path, a name, ``"1"``, ``"2"``, or the
        object that was given; ``"none"`` leaves them out.
    drop_dead : bool
        Leave out modules whose update is zero.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how files are read (``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``).

    Raises
    ------
    OptionError
        A glob that matches nothing; an output that is where a source is; nothing left.
    FormatError
        A file that is no adapter.
    MismatchError
        No module in common; heads in both and no ``take``; DoRA without its base.
    ShapeError
        A module of two shapes: two base models.
    """
    pairs = [(first, Strength()), (second, strength_within(as_globs(modules), -1.0, elsewhere=0.0))]
    return combine_sources(pairs, take=take, drop_dead=drop_dead, **options)
