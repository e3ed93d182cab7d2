"""Writing a changed copy of a model in its own container: safetensors or GGUF."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count
from loralens.formats.files.atomic import was_killed
from loralens.formats.models.model_files import ModelFiles
from loralens.formats.models.model_writer import Change, CopyOptions, Fill, copy_bytes, write_model

# What reads and writes GGUF takes 15 ms to import, and few bases are GGUF.
if TYPE_CHECKING:
    from loralens.formats.models.gguf_base import GgufModel
    from loralens.formats.models.gguf_writer import NewTypes


def bytes_of_copy(
    files: ModelFiles, changes: Mapping[str, Change], dtype: str | None = None, types: "NewTypes | None" = None
) -> int:
    """The bytes of all tensors of a copy."""
    if files.gguf:
        from loralens.formats.models.gguf_writer import gguf_copy_bytes

        return gguf_copy_bytes(files.gguf, changes, _types(files.gguf, dtype, types))
    return copy_bytes(files.tensors, changes)


def write_copy(
    files: ModelFiles,
    target: Path,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    options: CopyOptions,
    dtype: str | None = None,
    types: "NewTypes | None" = None,
) -> None:
    """Write a changed copy of a model; the parameters are those of `write_model`.

    ``dtype`` is NumPy's name of the dtype of a copy in floats. Only the writer of GGUF needs ``dtype`` and ``types``.
    For safetensors ``changes`` says which dtypes are written.
    """
    if files.gguf:
        from loralens.formats.models.gguf_writer import write_gguf_copy

        new = _types(files.gguf, dtype, types)
        write_gguf_copy(files, target, changes=changes, fill=fill, types=new, options=options)
    else:
        write_model(files, target, changes=changes, fill=fill, options=options)


def _types(model: "GgufModel", dtype: str | None, types: "NewTypes | None") -> "NewTypes | None":
    from loralens.formats.models.gguf_writer import float_types

    return float_types(model, np.dtype(dtype)) if dtype else types


def warn_if_killed(model: Path) -> None:
    """Warn of a model beside which a killed merge left its unfinished copy: the records may be those of that merge."""
    if was_killed(model):
        warn(
            f"{model}: a run that was to replace it was killed, so its records may be those of that run",
            "repeat that merge with --overwrite",
        )


def rehearse(
    label: str, fill: Fill, changes: Mapping[str, Change], *, copies: Mapping[str, LazyArray] | None = None
) -> None:
    """Compute all tensors as `write_model` would, and write none of them.

    Parameters
    ----------
    label : str
        The text beside the progress bar.
    fill : callable
        Gives the rows of a tensor by its key. It is called in several threads, each for one tensor.
    changes : mapping of str to Change
    copies : mapping of str to LazyArray, optional
        Unchanged tensors that have to be read too.
    """
    unchanged = copies or {}

    def compute(key: str) -> None:
        for rows in fill(key):
            if step:
                step(rows.nbytes)

    with progress(label, copy_bytes(unchanged, changes)) as step:
        in_threads(compute, [*changes, *unchanged], processor_count())
