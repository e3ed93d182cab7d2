"""The state from which a training run continues, and the record of the training in the metadata of an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.json_depth import parse_json
from loralens.core.lazy import Array

RECORD = "loralens_training"  # key of the metadata


@final
@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The state of a training run between two steps.

    Attributes
    ----------
    step : int
        Number of steps that are done.
    tensors : mapping of str to array
        Trained tensors, the state of the optimiser, and the best tensors so far, in their own dtypes.
    record : mapping
        All other values of the state, as JSON.
    run : mapping
        The identity of the run, as JSON (see `loralens.training.state.run_identity`).
    """

    step: int
    tensors: Mapping[str, Array]
    record: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)


def record_of(adapter: Adapter) -> Mapping[str, Any] | None:
    """The record of a training by loralens in the metadata of an adapter; None if there is none, or it is not JSON.

    ``A0`` is a digest of the initial factors A of all modules, and ``A0_of`` has a digest for each module. Equal
    digests mean equal numbers. See `loralens.training.injection.Injection` for the other fields.
    """
    try:
        record = parse_json((adapter.metadata or {}).get(RECORD, "null"))
    # Metadata of a file may hold anything.
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def same_start(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters were trained from the same A₀ according to their records; False without a record."""
    starts = [(record_of(adapter) or {}).get("A0") for adapter in (first, second)]
    # Two adapters without a digest agree in nothing that is known.
    return starts[0] is not None and starts[0] == starts[1]
