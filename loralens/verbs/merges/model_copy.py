"""Writing a changed copy of a model in its own container: safetensors or GGUF."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count
from loralens.formats.files.atomic import was_killed
from loralens.formats.models.model_files import ModelFiles
from loralens.formats.models.model_writer import Change, CopyOptions, Fill, copy_bytes, write_model

if TYPE_CHECKING:
    from loralens.formats.models.gguf_writer import NewTypes


def copy_model(
    label: str,
    files: ModelFiles,
    target: Path | None,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    copies: Mapping[str, LazyArray] | None = None,
    dtype: str | None = None,
    types: "NewTypes | None" = None,
    dropped: Collection[str] = (),
    homes: Mapping[str, str] | None = None,
    headers: Mapping[str, bytes] | None = None,
    **options: Unpack[CopyOptions],
) -> None:
    """Write a changed copy of a model; without a target, compute all its tensors and write none of them.

    The parameters are those of `write_model`. ``label`` is the text beside the progress bar. ``copies`` are the
    unchanged tensors that have to be read even without a target. ``dtype`` is NumPy's name of the dtype of a copy in
    floats. Only the writer of GGUF needs ``dtype`` and ``types``. For safetensors ``changes`` says which dtypes are
    written, and ``dropped``, ``homes`` and ``headers`` are only for it.
    """
    if target is None:

        def compute(key: str) -> None:
            for rows in fill(key):
                if step:
                    step(rows.nbytes)

        unchanged = copies or {}
        with progress(label, copy_bytes(unchanged, changes)) as step:
            in_threads(compute, [*changes, *unchanged], processor_count())
        return
    options["threads"] = processor_count()
    if not files.gguf:
        with progress(label, copy_bytes(files.tensors, changes)) as options["step"]:
            write_model(
                files, target, changes=changes, fill=fill, dropped=dropped, homes=homes, headers=headers, **options
            )
        return
    # What reads and writes GGUF takes 15 ms to import, and few bases are GGUF.
    from loralens.formats.files.gguf_file import TYPES
    from loralens.formats.models.gguf_writer import StoredChange, gguf_copy_bytes, write_gguf_copy

    as_floats, weights = np.dtype(dtype) if dtype else None, files.gguf.weights
    # The model may have no tensor for a change, such as a head that was tied.
    added = {
        key: StoredChange(TYPES[change.dtype], change.shape) for key, change in changes.items() if key not in weights
    }
    total, stored = gguf_copy_bytes(files.gguf, dtype=as_floats, types=types, added=added), changes.keys() - added
    with progress(label, total) as options["step"]:
        write_gguf_copy(files, target, changes=stored, fill=fill, dtype=as_floats, types=types, added=added, **options)


def warn_if_killed(model: Path) -> None:
    """Warn of a model beside which a killed merge left its unfinished copy: the records may be those of that merge."""
    if was_killed(model):
        warn(
            f"{model}: a run that was to replace it was killed, so its records may be those of that run",
            "repeat that merge with --overwrite",
        )
