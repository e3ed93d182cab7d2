"""The second moments of the inputs of a model's layers, H = E[x xᵀ], in one safetensors file of square matrices.

A matrix (n, n), float32, has the name of the first layer that reads the input; layers that read the same one (q, k and
v) share it. The only metadata key, ``loralens.input_moments``, holds a JSON object with ``version``, ``model``,
``inputs`` (name of a layer → name of its matrix), ``counts`` (positions of each), ``digests`` (SHA-256 of each) and
``source``. The file is as large as the model or larger, so matrices are written and read one at a time.

It is not the file of `loralens.formats.records.moments`, which holds small matrices of an adapter's bottlenecks.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from loralens.core.hashes import sha256_hex
from loralens.core.lazy import Array, LazyArray, without_numbers
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.atomic import atomic_file, check_space
from loralens.formats.files.container import Stored, read_safetensors
from loralens.formats.files.disk import check_room
from loralens.formats.files.location import existing_file
from loralens.formats.files.safetensors_header import header_bytes
from loralens.formats.records.moments import INPUTS_KEY as KEY
from loralens.formats.records.moments import KEY as MOMENTS_KEY

VERSION = 1
AGAIN = "measure them again: loralens calibrate --inputs"
_UNKNOWN = "0" * 64  # stands for a SHA-256 until the matrix is written


@final
@dataclass(frozen=True, slots=True)
class InputMoments:
    """A file of second moments; the matrices are read when they are needed.

    Attributes
    ----------
    inputs : mapping of str to str
        Name of a layer → name of the matrix of its input.
    tensors : mapping of str to LazyArray
    digests : mapping of str to str
        SHA-256 of every matrix.
    source : mapping
        What was measured, as JSON.
    digest : str
        SHA-256 of the record, which has the digests of all matrices in it.
    """

    inputs: Mapping[str, str]
    tensors: Mapping[str, LazyArray]
    digests: Mapping[str, str]
    source: Mapping[str, Any]
    digest: str

    def read(self, name: str) -> Array:
        """The matrix of this name, proven by its SHA-256.

        Raises
        ------
        FormatError
            It was changed since it was written.
        """
        H = self.tensors[name].read()
        if sha256_hex(np.ascontiguousarray(H).data) != self.digests.get(name):
            raise FormatError(f"{name} is not as it was measured", fix=AGAIN)
        return H


def check_input_moments_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where these moments cannot be written, before they are measured.

    Raises
    ------
    OptionError, FormatError
        The suffix is not ``.safetensors``, there is no room, or another kind of file would be lost.
    """
    if path.suffix != ".safetensors":
        raise OptionError(f"{path}: moments are written to .safetensors files", fix="give a file of that suffix")
    check_room(path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise OptionError(f"{path}: exists", fix="choose another target, or give --overwrite")
    if path.exists():
        metadata: Mapping[str, str] | None = None
        with suppress(FormatError):
            metadata = read_safetensors(path).metadata
        # --overwrite must not destroy a model whose name was given by mistake.
        if KEY not in (metadata or {}):
            raise OptionError(f"{path}: exists, and holds no moments of inputs", fix="choose another target")


def write_input_moments(
    path: Path,
    sizes: Mapping[str, int],
    inputs: Mapping[str, str],
    *,
    model: str,
    source: Mapping[str, Any],
    fill: Callable[[Callable[[str, Array, int], None]], None],
) -> None:
    """Write a file of moments, which appears complete or not at all.

    Parameters
    ----------
    path : Path
    sizes : mapping of str to int
        The width n of every matrix, in the order of the file.
    inputs : mapping of str to str
        Name of a layer → name of its matrix.
    model : str
        Its label.
    source : mapping
        What was measured, as JSON.
    fill : callable
        Is called with a function ``put(name, H, positions)`` that writes one matrix, and calls it once for every name,
        in any order.

    Raises
    ------
    FormatError
        There is no room on the disk.
    """
    tensors = {name: without_numbers((n, n), np.float32) for name, n in sizes.items()}
    digests, counts = dict.fromkeys(sizes, _UNKNOWN), dict.fromkeys(sizes, 0)
    check_space(path, sum(tensor.nbytes for tensor in tensors.values()))

    def header() -> bytes:
        record = {
            "version": VERSION,
            "model": model,
            "inputs": dict(inputs),
            # All counts have the same width, so that the header keeps its size when it is written for the second time.
            "counts": {name: f"{counts[name]:020}" for name in sizes},
            "digests": digests,
            "source": dict(source),
        }
        return header_bytes(tensors, {KEY: json.dumps(record, ensure_ascii=True)})

    with atomic_file(path) as stream:
        begin = len(header())
        offsets = {}
        for name, tensor in tensors.items():
            offsets[name], begin = begin, begin + tensor.nbytes
        stream.truncate(begin)

        def put(name: str, H: Array, positions: int) -> None:
            counts[name] = positions
            data = np.ascontiguousarray(H, np.float32).data
            digests[name] = sha256_hex(data)
            stream.seek(offsets[name])
            stream.write(data)

        fill(put)
        # The header comes last, when the digests are known.
        stream.seek(0)
        stream.write(header())


def load_input_moments(path: Path) -> InputMoments:
    """Open a file of second moments of inputs. No matrix is read yet.

    Raises
    ------
    OptionError
        There is no such file, or it holds the moments of an adapter's bottlenecks.
    FormatError
        It holds no moments, or is damaged.
    """
    existing_file(path, fix="check the path, or measure the moments: loralens calibrate --inputs")
    stored = read_safetensors(path)
    if MOMENTS_KEY in (stored.metadata or {}):
        raise OptionError(
            f"{path}: holds the moments of an adapter's bottlenecks, which compress reads",
            fix="give the file of the inputs of the base's layers: loralens calibrate --inputs",
        )
    with place(path):
        return _parse(stored)


def _parse(stored: Stored) -> InputMoments:
    text = (stored.metadata or {}).get(KEY)
    if text is None:
        raise FormatError("holds no moments of inputs", fix="give the file that loralens calibrate --inputs wrote")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its record is not valid JSON ({error})", fix=AGAIN) from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise FormatError("its record is of another version", fix=AGAIN + ", with this loralens")
    inputs, digests, source = (record.get(name) for name in ("inputs", "digests", "source"))
    if not all(isinstance(part, dict) for part in (inputs, digests, source)):
        raise FormatError("its record is not complete", fix=AGAIN)
    assert isinstance(inputs, dict)
    for name, tensor in stored.tensors.items():
        if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.dtype != np.float32:
            raise FormatError(f"{name} {tensor.shape} {tensor.dtype} is not a square float32 matrix", fix=AGAIN)
    missing = [name for name in inputs.values() if name not in stored.tensors]
    if missing:
        raise FormatError(f"the moments of {missing[0]!a:.80} are missing", fix=AGAIN)
    digest = sha256_hex(text.encode("utf-8"))
    return InputMoments(inputs, stored.tensors, digests, source, digest)  # type: ignore[arg-type]
