"""The undo file of a merge: what it holds, how large it is, and writing it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.formats.records.undo import undo_size, write_undo
from loralens.merging.matrix import matrix_blocks
from loralens.merging.record import TensorRecord, hash_rows
from loralens.merging.undo.layout import layout_version, pack_arrays, pack_entry, text_digest
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
        self._records: dict[str, TensorRecord] = {}

    def take(self, key: str, record: TensorRecord) -> None:
        """Add the record of one stored tensor, with its patch."""
        self._records[key] = record

    def write(self, path: Path, digests: Mapping[str, str]) -> None:
        """Write the undo file; ``digests`` has the SHA-256 of every tensor that was copied."""
        tensors = self._inputs.files.tensors
        dropped = {
            key: hash_rows(matrix_blocks(tensors[key]), tensors[key].nbytes) for key in self._inputs.plan.dropped
        }
        write_undo(self._arrays, lambda: self._content(digests, dropped), path)

    def size(self) -> int:
        """The bytes of the undo file that a dry run does not write."""
        dropped = self._inputs.plan.dropped
        copied = self._inputs.files.stored.keys() - self._records.keys() - set(dropped)
        content = dict.fromkeys(copied, NO_HASH), dict.fromkeys(dropped, NO_HASH)
        return undo_size(self._arrays, lambda: self._content(*content))

    def _arrays(self) -> Iterator[tuple[str, LazyArray]]:
        """The arrays of all tensors in the order of their names, so that equal merges give equal bytes.

        Each name is made when its turn comes: they hold the key of a tensor several times, and take more memory than
        the adapter if keys are long.
        """
        # A tensor that the merged model does not have cannot be restored by a patch.
        dropped, tensors = set(self._inputs.plan.dropped), self._inputs.files.tensors
        keys = self._records.keys() | dropped
        # With the letter that follows it in a name, a key has the place of its names, unless that letter is in a key.
        groups = [[key] for key in sorted(keys, key=lambda key: f"{key}#")]
        if any("#" in key for key in keys):
            groups = [list(keys)]
        for group in groups:
            named = {f"{key}#whole": tensors[key] for key in group if key in dropped}
            for key in group:
                if key in self._records:
                    named |= {f"{key}{end}": array for end, array in pack_arrays(self._records[key]).items()}
            yield from sorted(named.items())

    def _content(self, digests: Mapping[str, str], dropped: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """The fields of the undo file; the arguments are the hashes of copied and of dropped tensors."""
        originals = self._inputs.originals()
        yield "version", layout_version(self._records.values())
        yield "adapters", self._adapters
        yield "tensors", ((key, pack_entry(self._records[key])) for key in sorted(self._records))
        yield "copies", dict(sorted(digests.items()))
        for name, value in originals.items():
            yield name, iter(value.items()) if isinstance(value, dict) else value
        if dropped:
            yield "whole", dropped
        # The tensors have hashes of their own; this one is of the texts and headers.
        yield "digest", text_digest(originals["headers"], originals["texts"])


def count_only(data: bytes) -> LazyArray:
    """An array as large as ``data``, which is not stored: a dry run needs only the size of a patch."""

    def read() -> Array:
        raise AssertionError("the bytes of this patch were only counted")

    return LazyArray(read, shape=(len(data),), dtype=np.uint8)
