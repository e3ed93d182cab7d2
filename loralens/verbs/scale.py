"""The verb ``scale``: writes an adapter with its update multiplied by a number."""

from collections.abc import Sequence
from typing import Unpack

from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import as_globs, check_finite
from loralens.verbs.inputs.weighted import strength_within
from loralens.verbs.outputs.combine_result import CombineResult
from loralens.verbs.outputs.combine_run import combine_sources
from loralens.verbs.outputs.writing import WritingAndReading


def scale(
    adapter: AdapterSource, by: float, *, modules: Sequence[str] = (), **options: Unpack[WritingAndReading]
) -> CombineResult:
    """Write an adapter with ΔW multiplied by a number: ΔW' = x·ΔW.

    With ``modules`` only these modules change. The factors keep their bits: only the scale changes. With ``by`` 0 every
    ΔW is zero.

    Parameters
    ----------
    adapter : path or Adapter
    by : float
        The factor x, which may be any finite number.
    modules : sequence of str
        Change only modules whose name or kind matches one of these glob patterns.
    **options : Writing and Reading
        How the result is written (``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``)
        and how the file is read (``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``).

    Raises
    ------
    OptionError
        ``by`` is not a finite number, a glob pattern matches no module, the output overlaps with the source, or
        rounding costs too much.
    FormatError
        The file is not an adapter.
    """
    # With an infinite or undefined factor no weight would be a number.
    check_finite("by", by)
    strength = strength_within(as_globs(modules), by, elsewhere=1.0)
    return combine_sources([(adapter, strength)], **options)
