"""The undo file of a merge: what it holds, how large it is, and writing it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.formats.records.undo import undo_size, write_undo
from loralens.merging.matrix import matrix_blocks
from loralens.merging.record import TensorRecord, hash_rows
from loralens.merging.undo.layout import layout_version, pack_record, text_digest
from loralens.merging.undo.patch import Keep
from loralens.verbs.inputs.merge_inputs import MergeInputs

# A hash that is not known in a dry run, which copies nothing. It is as long as every other one.
NO_HASH: Final = "0" * 64


@final
class UndoContent:
    """Collects what restores the base, tensor by tensor.

    Parameters
    ----------
    inputs : MergeInputs
    adapters : list of dict
        The adapters as JSON objects.
    keep : callable
        Stores parts of the patches (see `PatchWriter`).
    """

    def __init__(self, inputs: MergeInputs, adapters: list[dict[str, Any]], keep: Keep) -> None:
        self.keep = keep
        self._inputs, self._adapters = inputs, adapters
        self._arrays: dict[str, LazyArray] = {}
        self._entries: dict[str, Any] = {}

    def take(self, key: str, record: TensorRecord) -> None:
        """Add the record of one stored tensor, with its patch."""
        arrays, self._entries[key] = pack_record(record)
        self._arrays |= arrays

    def write(self, path: Path, digests: Mapping[str, str]) -> None:
        """Write the undo file; ``digests`` has the SHA-256 of every tensor that was copied."""
        tensors = self._inputs.files.tensors
        dropped = {key: hash_rows(matrix_blocks(tensors[key])) for key in self._inputs.plan.dropped}
        write_undo(self._all_arrays(), self._content(digests, dropped), path)

    def size(self) -> int:
        """The bytes of the undo file that a dry run does not write."""
        dropped = self._inputs.plan.dropped
        copied = self._inputs.files.stored.keys() - self._entries.keys() - set(dropped)
        content = self._content(dict.fromkeys(copied, NO_HASH), dict.fromkeys(dropped, NO_HASH))
        return undo_size(self._all_arrays(), content)

    def _all_arrays(self) -> dict[str, LazyArray]:
        """The arrays of all tensors, sorted, so that equal merges give equal bytes."""
        tensors = self._inputs.files.tensors
        # A tensor that the merged model does not have cannot be restored by a patch.
        dropped = {f"{key}#whole": tensors[key] for key in self._inputs.plan.dropped}
        return dict(sorted({**self._arrays, **dropped}.items()))

    def _content(self, digests: Mapping[str, str], dropped: Mapping[str, str]) -> dict[str, Any]:
        """The JSON object of the undo file; the arguments are the hashes of copied and of dropped tensors."""
        originals = self._inputs.originals()
        return {
            "version": layout_version(self._entries),
            "adapters": self._adapters,
            "tensors": dict(sorted(self._entries.items())),
            "copies": dict(sorted(digests.items())),
            **originals,
            **({"whole": dropped} if dropped else {}),
            # The tensors have hashes of their own; this one is of the texts and headers.
            "digest": text_digest(originals["headers"], originals["texts"]),
        }


def count_only(data: bytes) -> LazyArray:
    """An array as large as ``data``, which is not stored: a dry run needs only the size of a patch."""

    def read() -> Array:
        raise AssertionError("the bytes of this patch were only counted")

    return LazyArray(read, shape=(len(data),), dtype=np.uint8)
