"""The verb ``negate``: writes an adapter with the sign of its update changed."""

from collections.abc import Sequence
from typing import Unpack

from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import Blocks, as_globs
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


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
