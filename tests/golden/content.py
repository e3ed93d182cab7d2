"""Content: a file as JSON that says where it differs: tensors, metadata, fields and lines apart, beside one digest."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LONGEST = 2_000_000  # bytes of a text that is kept as it is; of longer ones the digest has to do
LARGEST = 2_000_000  # entries of a tensor whose norm is kept too, for comparisons with a tolerance
FLOATS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
HIDDEN = {"style", "script"}  # elements of a page whose text nobody reads

# Values that a clock, a machine or another package decides: only their presence is recorded.
VARYING = {"seconds", "torch", "transformers_version"}
VARIES = "<varies>"
VARYING_TEXT = (  # the same in sentences
    (re.compile(r"[\d,.]+ tokens/s"), "… tokens/s"),
    (re.compile(r"\d+:\d\d(:\d\d)? left"), "… left"),
    (re.compile(r"about [\d,.]+ (s|min|h)\b"), "about … s"),
)

Clean = Callable[[bytes], bytes]  # takes the paths of this run out of bytes


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_record(path: Path, clean: Clean) -> dict[str, Any]:
    """What a file holds; ``sha256`` is that of its bytes without the paths of this run, where nothing in it varies."""
    raw = path.read_bytes()
    data = clean(raw)
    if path.suffix == ".html":
        return {"kind": "page", "lines": page_lines(data.decode())}
    if path.suffix == ".sqlite":  # an index holds the times of files
        return {"kind": VARIES}
    record = _tensors(raw, clean) or _archive(path, raw, clean) or _gguf(path, raw) or _text(data) or {"kind": "bytes"}
    if VARIES not in json.dumps(record):
        record["sha256"] = sha256(data)
    return record


def steady(value: Any) -> Any:
    """JSON without the values that vary from run to run; JSON inside strings becomes part of it."""
    if isinstance(value, dict):
        return {key: VARIES if key in VARYING else steady(part) for key, part in value.items()}
    if isinstance(value, list):
        return [steady(part) for part in value]
    if isinstance(value, str) and value[:1] in ("{", "[") and (inner := parsed(value)) is not None:
        return {"json": steady(inner)}
    return value


def steady_lines(text: str) -> list[str]:
    """Lines without what varies from run to run."""
    for pattern, instead in VARYING_TEXT:
        text = pattern.sub(instead, text)
    return text.splitlines()


def parsed(text: str) -> Any:
    """The JSON of a text, or None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def page_lines(html: str) -> list[str]:
    """What stands on a page, one text a line, labels of its drawings included."""
    reader = _PageText()
    reader.feed(html)
    return reader.lines


class _PageText(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if text and not self.hidden:
            self.lines.append(text)


def _tensors(raw: bytes, clean: Clean) -> dict[str, Any] | None:
    """A safetensors container, whatever its name."""
    length = int.from_bytes(raw[:8], "little")
    if not 2 <= length <= len(raw) - 8 or raw[8:9] != b"{":
        return None
    header = parsed(raw[8 : 8 + length].decode(errors="replace"))
    if not isinstance(header, dict):
        return None
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = _tensor(entry["dtype"], entry["shape"], raw[8 + length + begin : 8 + length + end])
    cleaned = json.loads(clean(json.dumps(metadata).encode()))
    return {"kind": "tensors", "metadata": steady(cleaned), "tensors": tensors}


def _tensor(dtype: str, shape: list[int], data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = {"dtype": dtype, "shape": shape, "sha256": sha256(data)}
    if dtype in FLOATS:
        array = np.frombuffer(data, FLOATS[dtype])
        if 0 < array.size <= LARGEST:
            wide = array.astype(np.float64)
            record |= {"norm": float(np.sqrt(wide @ wide)), "sum": float(wide.sum())}
    return record


def _archive(path: Path, raw: bytes, clean: Clean) -> dict[str, Any] | None:
    """A zip archive, such as torch and NumPy write: every entry by its digest."""
    if raw[:4] != b"PK\x03\x04":
        return None
    with zipfile.ZipFile(path) as archive:
        entries = {name: sha256(clean(archive.read(name))) for name in archive.namelist()}
    return {"kind": "archive", "entries": entries}


def _gguf(path: Path, raw: bytes) -> dict[str, Any] | None:
    if raw[:4] != b"GGUF":
        return None
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {key: str(field.contents()) for key, field in reader.fields.items()}
    tensors = {
        tensor.name: {
            "dtype": tensor.tensor_type.name,
            "shape": [int(size) for size in tensor.shape],
            "sha256": sha256(tensor.data.tobytes()),
        }
        for tensor in reader.tensors
    }
    return {"kind": "gguf", "fields": steady(fields), "tensors": tensors}


def _text(data: bytes) -> dict[str, Any] | None:
    """JSON, JSON lines, or lines."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if len(data) > LONGEST or "\0" in text:
        return None
    if (whole := parsed(text)) is not None:
        return {"kind": "json", "json": steady(whole)}
    lines = text.splitlines()
    rows = [parsed(line) for line in lines]
    if rows and all(isinstance(row, dict) for row in rows):
        return {"kind": "json lines", "lines": [steady(row) for row in rows]}
    return {"kind": "text", "lines": lines}
