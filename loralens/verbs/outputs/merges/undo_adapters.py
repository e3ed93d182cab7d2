"""The adapters that an undo file needs: proven to be those that were merged, and planned on the merged model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.errors import MismatchError
from loralens.formats.records.merged import CertifiedAdapter
from loralens.verbs.inputs.merge_inputs import MergeInputs, WeightedAdapter, plan_merge_inputs
from loralens.verbs.outputs.merges.certified import difference_of_adapters

# The roles of tensors that a merge puts in place of those of the base, which an undo file holds whole.
REPLACING = ("saved", "bias", "embedding", "tokens")


def plan_undo_adapters(
    merged: Path,
    file: Path,
    adapters: Sequence[WeightedAdapter],
    merged_in: Sequence[CertifiedAdapter],
    *,
    named: str,
) -> MergeInputs:
    """The plan of what was added to the codes of a merged model.

    Parameters
    ----------
    merged, file : Path
        The merged model and its undo file.
    adapters : sequence of WeightedAdapter
        The adapters that were given.
    merged_in : sequence of CertifiedAdapter
        The adapters that the undo file names.
    named : str
        Their paths at the merge, for messages.

    Raises
    ------
    MismatchError
        They are not the ones that were merged, or do not fit the model.
    FormatError
        A file cannot be read.
    """
    waiting = [(CertifiedAdapter(fingerprint(term.adapter), term.weight), term) for term in adapters]
    ordered: list[WeightedAdapter] = []
    # In the order of the merge, since sums of many ranks have other last bits in another order.
    for wanted in merged_in:
        index = next((i for i, (record, _) in enumerate(waiting) if record == wanted), None)
        if index is not None:
            ordered.append(waiting.pop(index)[1])
    if waiting or len(ordered) < len(merged_in) or not ordered:
        requested = [CertifiedAdapter(fingerprint(term.adapter), term.weight) for term in adapters]
        way = f"give what was merged, {named}, with the same --modules and options of reading"
        what, fix = difference_of_adapters(adapters, requested, merged_in, otherwise=way)
        raise MismatchError(f"{file}: it says that {what}", fix=fix)
    needed = [replace(term, adapter=_without_replacements(term.adapter)) for term in ordered]
    return plan_merge_inputs(needed, merged, allow_missing=True, untie=False, bits="keep", decoded=True)


def _without_replacements(adapter: Adapter) -> Adapter:
    """The adapter without heads and embeddings, which are restored without it and may not fit the merged model."""
    return replace(adapter, extra={key: extra for key, extra in adapter.extra.items() if extra.role not in REPLACING})
