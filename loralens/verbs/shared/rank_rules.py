"""Options that choose ranks: the rule, the error that a budget minimises, and the moments of real inputs."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.threads import processor_count
from loralens.errors import OptionError
from loralens.formats.files.container import read_json

# Verbs that combine adapters need none of this for a rule.
if TYPE_CHECKING:
    from loralens.compression.directions import DType, Protection
    from loralens.compression.plan import TruncationPlan
    from loralens.core.stored import Moments


def read_protection(weights: str | PathLike[str] | Mapping[str, float]) -> "Protection":
    """The error that a budget minimises: ``relative``, ``absolute``, or weights by glob, which a JSON file may hold."""
    # The two words win over files of that name; such a file is reached as ./absolute.
    if isinstance(weights, Mapping) or weights in ("absolute", "relative"):
        return weights  # type: ignore[return-value]
    file = Path(weights)
    if not file.exists():
        raise OptionError(f"weights {weights}: no such file", fix="give absolute, relative, or a JSON file")
    return read_json(file, fix='write {"q_proj": 2.0}')


def read_moments(activations: "str | PathLike[str] | Moments | None") -> "Moments | None":
    """The moments of the option ``activations``, which is a file or the moments themselves; None if not given."""
    if activations is None:
        return None
    from loralens.core.stored import Moments
    from loralens.formats.records.results import load_moments

    return activations if isinstance(activations, Moments) else load_moments(activations)


def read_directions(
    adapter: Adapter, *, modules: Sequence[str], dtype: "DType | None", moments: "Moments | None" = None
) -> "TruncationPlan":
    """The directions of the chosen modules, from which any ranks can be made, in one pass over the factors."""
    from loralens.compression.plan import TruncationPlan

    with progress("reading", len(adapter)) as step:
        return TruncationPlan.of(
            adapter, modules=modules, dtype=dtype, moments=moments, bases=True, threads=processor_count(), step=step
        )


def rank_notes(rank: float | None, ranks: Mapping[str, int]) -> list[str]:
    """A note if modules have fewer directions than ``rank``, the number that was asked for; otherwise no note."""
    # Truncation never pads: a rank above the true one would only add zeros to the file.
    narrow = [each for each in ranks.values() if rank and each < rank]
    if not narrow:
        return []
    most = f"{max(narrow)}" if len(set(narrow)) == 1 else f"at most {max(narrow)}"
    return [f"{len(narrow)} of {len(ranks)} modules have {most} directions, not {rank:g}: all of them are kept"]
