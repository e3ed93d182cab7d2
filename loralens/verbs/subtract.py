"""The verb ``subtract``: writes the difference of two adapters."""

from collections.abc import Sequence
from typing import Unpack

from loralens.core.recipe import Strength
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import Blocks, as_globs
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


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
