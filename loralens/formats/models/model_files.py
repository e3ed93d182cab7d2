"""The files of a base model: its shards, their indices, and the files beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from loralens.core.lazy import LazyArray
from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import Stored, read_safetensors
from loralens.formats.files.shards import weight_files
from loralens.formats.files.walking import folders
from loralens.formats.models.model_location import gguf_paths

if TYPE_CHECKING:
    from loralens.formats.models.gguf_base import GgufModel

CONFIG = "config.json"
# Endings of files that hold weights, also in forms that are not read here, and of their indices.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz",
           ".bin.index.json", ".safetensors.index.json")  # fmt: skip
LEFT_OUT = (".git", ".cache", ".locks")  # folders that a download leaves beside a model


@final
@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of a model with weights: safetensors, or GGUF.

    Attributes
    ----------
    name : str
        Its path within the model's folder, with ``/``.
    prefix : str
        For a component of a pipeline its name and a dot, else empty. The keys of the model begin with this prefix.
    header : bytes
        Its length and JSON as they are in the file, because every writer has its own order of fields and its spaces.
    offsets : mapping of str to int
        The position of the numbers of each key, counted from the end of the header.
    """

    name: str
    prefix: str
    stored: Stored
    header: bytes
    offsets: Mapping[str, int]


class Index(NamedTuple):
    """The JSON file that says which shard holds which tensor.

    Attributes
    ----------
    name
        Its path within the model's folder.
    prefix
        The prefix of its shards.
    """

    name: str
    prefix: str
    content: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a model.

    Attributes
    ----------
    root
        Its folder, or its only file.
    left_out
        Files that hold the same weights in another form. A changed copy leaves them out, because they would still hold
        the old weights.
    gguf
        The model if it is GGUF. Its shards are its GGUF files then, without headers, and `write_gguf_copy` copies it.
    """

    root: Path
    shards: tuple[WeightFile, ...]
    indices: tuple[Index, ...]
    left_out: tuple[str, ...]
    gguf: "GgufModel | None" = None

    @property
    def tensors(self) -> dict[str, LazyArray]:
        """Every tensor by its key in the model, as it is stored."""
        return {shard.prefix + key: t for shard in self.shards for key, t in shard.stored.tensors.items()}

    @property
    def stored(self) -> dict[str, LazyArray]:
        """Every tensor by its key, as the file has it; codes of GGUF are bytes without a shape, in the file's order."""
        return {key: self.gguf.stored(key) for key in self.gguf.weights} if self.gguf else self.tensors

    def check_copyable(self) -> None:
        """Refuse a folder with something that cannot be copied, before any work is done.

        Raises
        ------
        FormatError
            A pipe, a device or a link to nothing lies beside the weights.
        """
        for name in self.companions if self.root.is_dir() else ():
            path = self.root / name
            if not path.is_file():
                what = "is a link to a file that is not there" if path.is_symlink() else "is not a regular file"
                raise FormatError(f"{name} {what}", fix="remove it, or restore the file").at(str(self.root))

    def check_unchanged(self) -> None:
        """Refuse a model that was written to since it was opened, because the tensors could then be of two models.

        Raises
        ------
        FormatError
            A shard was written to or replaced.
        """
        for shard in self.shards:
            if shard.stored.file:
                shard.stored.file.check_unchanged()

    @property
    def companions(self) -> list[str]:
        """The files beside the weights: configuration, tokenizer, code."""
        weights = {*(s.name for s in self.shards), *(i.name for i in self.indices), *self.left_out}
        return [name for name in _walk(self.root) if name not in weights]


def model_files(root: Path) -> ModelFiles:
    """The files of the model at ``root``, a folder, one safetensors file or a GGUF file. Only headers are read.

    The root of a GGUF model in parts is its folder, even if the path names one of the parts.

    Raises
    ------
    FormatError, OptionError
        A shard is missing or damaged; there is no safetensors file.
    """
    paths = gguf_paths(root)
    if paths:
        from loralens.formats.models.gguf_base import open_gguf  # it takes 10 ms, and few bases are GGUF

        return _gguf_files(root.parent if root.is_file() and len(paths) > 1 else root, open_gguf(paths))
    if root.is_file():
        return ModelFiles(root, (_shard(root, root.name, ""),), (), ())
    if not root.is_dir():
        raise OptionError(f"{root}: no such file or folder", fix="check the path")
    with place(root):
        # A folder without weights of its own may be a pipeline, whose components are folders in it.
        parts = [_in_folder(root, root)]
        if not parts[0][0]:
            parts = [_in_folder(root, p) for p in sorted(root.iterdir()) if p.is_dir() and p.name not in LEFT_OUT]
        shards = tuple(shard for part_shards, _ in parts for shard in part_shards)
        if not shards:
            raise FormatError("holds no safetensors weights", fix="convert its weights to safetensors")
    indices = tuple(index for _, index in parts if index)
    used = {*(shard.name for shard in shards), *(index.name for index in indices)}
    return ModelFiles(root, shards, indices, tuple(n for n in _walk(root) if n not in used and n.endswith(WEIGHTS)))


def _gguf_files(root: Path, gguf: "GgufModel") -> ModelFiles:
    parts: list[dict[str, LazyArray]] = [{} for _ in gguf.paths]
    for key, weight in gguf.weights.items():
        parts[weight.part][key] = gguf.tensors[key]
    shards = tuple(
        WeightFile(path.name, "", Stored(tensors, file=header.file), b"", {})
        for path, header, tensors in zip(gguf.paths, gguf.headers, parts, strict=True)
    )
    used = {shard.name for shard in shards}
    unused = () if root.is_file() else tuple(n for n in _walk(root) if n not in used and n.endswith(WEIGHTS))
    return ModelFiles(root, shards, (), unused, gguf)


def _in_folder(root: Path, folder: Path) -> tuple[list[WeightFile], Index | None]:
    # The names of a pipeline's tensors begin with its component, and the names of files with its folder.
    prefix, inside = ("", "") if folder == root else (f"{folder.name}.", f"{folder.name}/")
    listing = weight_files(folder)
    if listing is None:
        return [], None
    shards = [_shard(file, inside + file.name, prefix) for file in listing.files]
    return shards, Index(inside + listing.index.name, prefix, listing.content) if listing.index else None


def _shard(path: Path, name: str, prefix: str) -> WeightFile:
    stored = read_safetensors(path)
    assert stored.file
    # The header is read once more as bytes, because parsing it loses its order of fields and its spaces.
    length = stored.file.read(0, 8)
    header = stored.file.read(8, int.from_bytes(length, "little"))
    offsets = offsets_of(header)
    # With the names of the tensors, so that they are held once.
    return WeightFile(name, prefix, stored, length + header, {key: offsets[key] for key in stored.tensors})


def offsets_of(header: bytes) -> dict[str, int]:
    """The position of the numbers of each key, by the JSON of a header that was checked before."""
    return {key: entry["data_offsets"][0] for key, entry in parse_json(header).items() if key != "__metadata__"}


def _walk(root: Path) -> list[str]:
    """The path of every file under a folder, relative and with ``/``."""
    inside = folders(root, follow=True, without=LEFT_OUT.__contains__)
    return sorted((folder / name).relative_to(root).as_posix() for folder, names in inside for name in names)
