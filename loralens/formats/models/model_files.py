"""The files of a base model: its shards, their indices, and the files beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from loralens.core.lazy import LazyArray
from loralens.core.stored import parse_json
from loralens.errors import FormatError, MissingFileError, OptionError, place
from loralens.formats.files.container import Stored, read_header, read_json, read_safetensors
from loralens.formats.files.location import existing_path, is_gguf, is_package_name, snapshot
from loralens.formats.files.outside import folders, is_relative_name

if TYPE_CHECKING:
    from loralens.formats.models.gguf_base import GgufModel


# Scales of activations and of the key-value cache, which the weights do not depend on.
BESIDE = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
SUFFIX = ".gguf"
# The parts that llama.cpp's gguf-split writes.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
# Many models come with an image projector file (mmproj), which is a separate model.
_PROJECTOR = "mmproj"
_SHOWN = 6  # most names that a message lists


def resolve_path(path: Path) -> Path:
    """The file or folder of the model; for a ``models--org--name`` folder of the Hub cache, that of its snapshot."""
    path = model_path(path)
    # A path without snapshots is not a folder of the cache.
    if not (path / "snapshots").is_dir():
        return path
    chosen = snapshot(path)
    if not chosen:
        names = ", ".join(sorted(p.name for p in (path / "snapshots").iterdir())[:6]) or "none"
        what = f"{path}: refs/main points to none of its snapshots ({names})"
        raise OptionError(what, fix="give the folder of one snapshot, or download the model again")
    return chosen


def model_path(path: Path) -> Path:
    """The file or folder of a model. For the name of a package with a GGUF model, its `float_folder`.

    Raises
    ------
    OptionError, FormatError
        As for `existing_path`; transformers is not installed; the folder cannot be written.
    """
    existing = existing_path(path)
    # An existing path is used as it is, even if it names the GGUF file of a package.
    if path.exists() or existing.is_dir() or not is_package_name(path.as_posix()):
        return existing
    # Imported here because it imports the readers and writers of models, which other calls do not need.
    from loralens.formats.models.base_cache import float_folder

    return float_folder(path.as_posix(), gguf_paths(existing))


def gguf_paths(path: Path) -> tuple[Path, ...]:
    """The files of the GGUF model at a path: the file itself, all parts of a split one, or those in a folder.

    Empty if the path is not a GGUF model. GGUF files are ignored in a folder that also has safetensors weights.

    Raises
    ------
    FormatError
        A part is missing, or a folder holds several models.
    """
    if path.is_file():
        if not is_gguf(path):
            return ()
        match = _PART.fullmatch(path.name)
        count = int(match["count"]) if match else 0
        if not match or not count:
            return (path,)
        names = [f"{match['stem']}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]
        missing = next((name for name in names if not (path.parent / name).is_file()), None)
        if missing:
            what = f"{missing} is missing: the model is split into {count} files"
            raise FormatError(what, fix="download the missing part").at(str(path.parent))
        return tuple(path.parent / name for name in names)
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return ()
    files = sorted(p for p in path.glob(f"*{SUFFIX}") if p.is_file() and not p.name.startswith(_PROJECTOR))
    if len({match["stem"] if (match := _PART.fullmatch(file.name)) else file.name for file in files}) > 1:
        listed = ", ".join(file.name for file in files[:_SHOWN]) + (" …" if len(files) > _SHOWN else "")
        raise FormatError(f"holds several GGUF models: {listed}", fix="give one of these files").at(str(path))
    return gguf_paths(files[0]) if files else ()


# If a folder has several files, the one with one of these names (of transformers, of diffusers) holds the weights.
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
CONFIG = "config.json"
# Endings of files that hold weights, also in forms that are not read here, and of their indices.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz",
           ".bin.index.json", ".safetensors.index.json")  # fmt: skip
# files of weights that are not read, for a message that names one; transformers' own come first
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
LEFT_OUT = (".git", ".cache", ".locks")  # folders that a download leaves beside a model
_AGAIN = "download the index again"


def weight_files(folder: Path) -> tuple[list[Path], Path | None, dict[str, Any]]:
    """The safetensors files of the weights in a folder in order of names, their index, and its content.

    A FormatError or an OptionError if a shard is missing, the index is damaged, or it is not clear which of several
    indices or files is meant.
    """
    index = _usual(folder, "*.safetensors.index.json", "indices", fix="move away all but the one that is meant")
    # An index decides, because a folder may hold shards of several models.
    if index:
        content = read_json(index)
        shards = [folder / name for name in shard_names(content, index.name)]
        for shard in shards:
            if not shard.is_file():
                what = f"{shard.name} is named by {index.name}, but is missing"
                raise OptionError(what, fix="download the missing shard")
        return shards, index, content
    file = _usual(folder, "*.safetensors", "files and no index", fix="give one of these files")
    return [file] if file else [], None, {}


def _usual(folder: Path, glob: str, what: str, *, fix: str) -> Path | None:
    """The file that matches; of several, the one with a model's usual name; None if none matches."""
    files = sorted(folder.glob(glob))
    # A folder of diffusers may hold variants (fp16, EMA) beside the usual file.
    usual = [file for file in files if file.name.removesuffix(".index.json") in SINGLE]
    if len(files) > 1 and len(usual) != 1:
        raise FormatError(f"holds several {what}: {', '.join(file.name for file in files[:6])}", fix=fix)
    return next(iter(usual or files), None)


def shard_names(content: Any, index: str) -> list[str]:
    """The files that an index names, which all lie in the folder of the index."""
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{index} has no weight_map", fix=_AGAIN)
    shards = sorted(set(names.values()))
    for name in shards:
        # An index may come from anybody, and names files that are opened.
        if not is_relative_name(name) or "/" in name:
            raise FormatError(f"{index} names {name!a:.100}, which is not a plain file name", fix=_AGAIN)
    return shards


def check_index(text: str, index: str) -> None:
    """Refuse a text that is not an index, or names files outside of its folder."""
    try:
        content = parse_json(text.removeprefix("\ufeff"))  # `read_json` accepts a byte order mark too
    except ValueError as error:
        raise FormatError(f"{index} is not JSON", fix=_AGAIN) from error
    shard_names(content, index)


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
    """

    name: str
    prefix: str
    stored: Stored

    @property
    def header(self) -> bytes:
        """The length and JSON of a safetensors file, since every writer has its own order of fields; empty for GGUF."""
        assert self.stored.file
        return b"" if is_gguf(self.stored.file.path) else read_header(self.stored.file)


class Index(NamedTuple):
    """The JSON file that says which shard holds which tensor: its path within the model's folder, and their prefix."""

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
    gguf
        The model if it is GGUF. Its shards are its GGUF files then, without headers, and `write_gguf_copy` copies it.
    """

    root: Path
    shards: tuple[WeightFile, ...]
    indices: tuple[Index, ...]
    gguf: "GgufModel | None" = None

    @property
    def tensors(self) -> dict[str, LazyArray]:
        """Every tensor by its key in the model, as it is stored."""
        return {shard.prefix + key: t for shard in self.shards for key, t in shard.stored.tensors.items()}

    @property
    def stored(self) -> dict[str, LazyArray]:
        """Every tensor by its key, as the file has it; codes of GGUF are bytes without a shape, in the file's order."""
        return {key: self.gguf.stored(key) for key in self.gguf.weights} if self.gguf else self.tensors

    @property
    def _others(self) -> list[str]:
        """Every other file of the folder, relative and with ``/``."""
        used = {*(shard.name for shard in self.shards), *(index.name for index in self.indices)}
        inside = folders(self.root, follow=True, without=LEFT_OUT.__contains__) if self.root.is_dir() else ()
        names = ((folder / name).relative_to(self.root).as_posix() for folder, names in inside for name in names)
        return sorted(name for name in names if name not in used)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files that hold the same weights in another form. A changed copy leaves them out, as they would be old."""
        return tuple(name for name in self._others if name.endswith(WEIGHTS))

    @property
    def companions(self) -> list[str]:
        """The files beside the weights: configuration, tokenizer, code."""
        return [name for name in self._others if not name.endswith(WEIGHTS)]

    def check_copyable(self) -> None:
        """Refuse a folder with something that cannot be copied, such as a pipe, before any work is done."""
        for name in self.companions:
            path = self.root / name
            if not path.is_file():
                what = "is a link to a file that is not there" if path.is_symlink() else "is not a regular file"
                raise FormatError(f"{name} {what}", fix="remove it, or restore the file").at(str(self.root))

    def check_unchanged(self) -> None:
        """Refuse a model that was written to since it was opened, because the tensors could then be of two models."""
        for shard in self.shards:
            if shard.stored.file:
                shard.stored.file.check_unchanged()


def model_files(root: Path) -> ModelFiles:
    """The files of the model at ``root``, a folder, one safetensors file or a GGUF file. Only headers are read.

    The root of a GGUF model in parts is its folder, even if the path names one of the parts. A FormatError or an
    OptionError if a shard is missing or damaged, or there is no safetensors file.
    """
    paths = gguf_paths(root)
    if paths:
        from loralens.formats.models.gguf_base import open_gguf  # it takes 10 ms, and few bases are GGUF

        gguf = open_gguf(paths)
        parts: list[dict[str, LazyArray]] = [{} for _ in paths]
        for key, weight in gguf.weights.items():
            parts[weight.part][key] = gguf.tensors[key]
        found = zip(paths, gguf.headers, parts, strict=True)
        shards = [WeightFile(path.name, "", Stored(tensors, file=header.file)) for path, header, tensors in found]
        return ModelFiles(root.parent if root.is_file() and len(paths) > 1 else root, tuple(shards), (), gguf)
    if root.is_file():
        return ModelFiles(root, (WeightFile(root.name, "", read_safetensors(root)),), ())
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such file or folder", fix="check the path")
    with place(root):
        # A folder without weights of its own may be a pipeline, whose components are folders in it, and whose keys
        # begin with the component's name.
        found_in = {"": weight_files(root)}
        if not found_in[""][0]:
            inner = sorted(path for path in root.iterdir() if path.is_dir() and path.name not in LEFT_OUT)
            found_in = {path.name: weight_files(path) for path in inner}
        shards, indices = list[WeightFile](), list[Index]()
        for component, (files, index, content) in found_in.items():
            prefix, inside = (f"{component}.", f"{component}/") if component else ("", "")
            shards += [WeightFile(inside + file.name, prefix, read_safetensors(file)) for file in files]
            indices += [Index(inside + index.name, prefix, content)] if index else []
        if not shards:
            pickled = next((file.name for pattern in PICKLES for file in sorted(root.glob(pattern))), "")
            fix = f"convert {pickled} to safetensors" if pickled else "give the folder of a model"
            raise FormatError("holds no safetensors weights", fix=f"{fix}; a Hub download may still be incomplete")
    return ModelFiles(root, tuple(shards), tuple(indices))


def offsets_of(header: bytes) -> dict[str, int]:
    """The position of the numbers of each key, by the JSON of a header that was checked before."""
    return {key: entry["data_offsets"][0] for key, entry in parse_json(header).items() if key != "__metadata__"}
