"""Training as others see it: the state that a run goes on from, and the record that it leaves with its adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array

RECORD = "loralens_training"  # key of the metadata


@final
@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A run between two steps.

    Attributes
    ----------
    step : int
        How many steps are done.
    tensors : mapping of str to array
        What is trained, what its optimiser remembers, and the best so far, in their own dtypes.
    record : mapping
        The rest, as JSON holds it.
    run : mapping
        What the run is that it belongs to, as JSON holds it: see `loralens.training.state.run_identity`.
    """

    step: int
    tensors: Mapping[str, Array]
    record: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)


def record_of(adapter: Adapter) -> Mapping[str, Any] | None:
    """What the metadata says about how an adapter was trained by loralens; None where it says nothing, or no JSON.

    ``A0`` is one digest of the first factors of all modules, ``A0_of`` has one for each; equal digests: the same
    numbers. See `loralens.training.injection.Injection` for the rest.
    """
    try:
        record = json.loads((adapter.metadata or {}).get(RECORD, "null"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def same_start(first: Adapter, second: Adapter) -> bool:
    """Whether the records of two adapters name one A₀; false where one of them has no record."""
    starts = [(record_of(adapter) or {}).get("A0") for adapter in (first, second)]
    return starts[0] is not None and starts[0] == starts[1]
