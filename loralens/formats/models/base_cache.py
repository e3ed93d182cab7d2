"""What the cache of the user holds of base models: digests of their files, and folders of floats.

A digest is cheap enough to check at every run that the base is still the same. A folder of floats is for a model that
is quantised, because training and evaluation need a model of transformers, which runs floats. The weights are
decoded once. For a GGUF file, transformers makes the configuration and the tokenizer from the metadata of the file; a
folder has them beside its weights.
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.messages import note
from loralens.errors import FormatError, LoraLensError, place
from loralens.formats.files.adapter_files import write_safetensors
from loralens.formats.files.atomic import atomic_file, check_space, reserve
from loralens.formats.files.container import Stored, read_json
from loralens.formats.files.disk import disk_errors, sync, sync_folder
from loralens.formats.files.json_text import dumps
from loralens.formats.files.outside import open_stream, read_whole
from loralens.formats.models.gguf_base import open_gguf
from loralens.formats.records.cache import default_folder
from loralens.requirements import missing_packages

BLOCK = 1 << 20  # bytes that are read at a time
KEPT_FROM = 1 << 23  # bytes from which the digest of a file is kept; a smaller file is hashed in 10 ms
# A file system may give two writes within this time the same stamp; FAT has the coarsest stamps.
SETTLED = 2_000_000_000  # nanoseconds
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|model|gguf)")
# the files that decide what a model computes; not a README, and no other configuration
_TELLING = re.compile(
    r"(?:quantize_)?config\.json|.*\.(?:index\.json|tiktoken)|(?:vocab|merges|tokenizer|added_tokens|special_tokens"
    r"|chat_template).*|"
    rf"{_WEIGHTS.pattern}"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def base_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the weights, the configuration and the tokenizer in a folder, or of one file.

    Every byte counts, because a merge into one module changes only a part of a file. Paths and times do not count. The
    digest of a large file is kept in the cache of the user under the device, inode, size and times of the file, so
    that a file is read completely only once.

    Raises
    ------
    FormatError
        A file cannot be read.
    """
    home = folder.parent if folder.is_file() else folder
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    # Without weights of its own, it may hold the components of a pipeline.
    if not any(_WEIGHTS.fullmatch(file.name) for file in files):
        files += sorted(folder.glob("*/*"))
    hasher = sha256()
    for file in files:
        if file.is_file() and (file == folder or _TELLING.fullmatch(file.name)):
            hasher.update(f"{file.relative_to(home).as_posix()}\0".encode())
            hasher.update(bytes.fromhex(_file_digest(file)))
    return hasher.hexdigest()


def _file_digest(file: Path) -> str:
    """The digest of the size and all bytes of a file, from the cache if the file is the one that was hashed."""
    hasher = sha256()
    try:
        with open_stream(file) as stream:
            before = os.fstat(stream.fileno())
            kept = _kept(before)
            with suppress(FormatError, UnicodeDecodeError):
                if kept and _DIGEST.fullmatch(known := read_whole(kept).decode("ascii")):
                    return known
            hasher.update(before.st_size.to_bytes(8, "little"))
            while block := stream.read(BLOCK):
                hasher.update(block)
            after = os.fstat(stream.fileno())
    except OSError as error:
        with place(file):
            raise FormatError(f"cannot be read: {error.strerror}", fix="check its permissions") from error
    settled = time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED
    if kept and settled and kept == _kept(after):
        # Without a cache that can be written, the next run reads the file again.
        with suppress(OSError, LoraLensError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as out:
                out.write(hasher.hexdigest().encode())
    return hasher.hexdigest()


def _kept(state: os.stat_result) -> Path | None:
    """Where the digest of a large file in this state is kept; None for a small file."""
    if state.st_size < KEPT_FROM:
        return None
    # The time of the last change of the inode belongs to it, because programs can set the time of the content.
    key = f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    return default_folder() / "digests" / sha256(key.encode()).hexdigest()


VERSION = "loralens float folder 1"  # of the folder's content; the digest in its name includes it
_DIGITS = 32  # hexadecimal digits of the digest in the name of a folder, so that nobody can make a file with the same
_BESIDE = 1 << 24  # bytes of the configuration and the tokenizer, at most
_CONFIG = "config.json"
# What config.json says about codes (the second field is MLX's), and about the dtype, in two generations of names.
_STORAGE = ("quantization_config", "quantization", "torch_dtype", "dtype")
# Files of a tokenizer and settings; no code, which would be run.
_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_INDEX = ".index.json"  # of the weights


def float_folder(name: str, paths: tuple[Path, ...]) -> Path:
    """A folder that transformers can load, with the weights of a GGUF file in float32. It is made once, in the cache.

    Parameters
    ----------
    name : str
        The name of the model, with which the name of the folder begins.
    paths : tuple of Path
        The file, or the parts of a split one.
    """
    return _make_once(name, paths, lambda: open_gguf(paths).tensors, partial(_write_beside, paths))


def float_copy(name: str, folder: Path, tensors: Mapping[str, LazyArray]) -> Path:
    """The same for a folder of safetensors whose weights are quantised (NF4, GPTQ, MLX …).

    Parameters
    ----------
    name : str
        The name of the model.
    folder : Path
    tensors : mapping of str to LazyArray
        All weights of the model as numbers.

    Raises
    ------
    FormatError
        There is no configuration beside the weights, so transformers cannot load them.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise FormatError(f"has no {_CONFIG}, without which a model cannot be run", fix="give the model's folder").at(
            str(folder)
        )

    def write_beside(part: Path) -> None:
        stated = read_json(path)
        plain = {key: value for key, value in stated.items() if key not in _STORAGE}
        (part / _CONFIG).write_text(dumps({**plain, "dtype": "float32"}), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            if file.name != _CONFIG and file.suffix in _ENDINGS and not file.name.endswith(_INDEX) and file.is_file():
                (part / file.name).write_bytes(read_whole(file))

    return _make_once(name, (folder,), lambda: tensors, write_beside)


def _make_once(
    name: str,
    paths: tuple[Path, ...],
    tensors_of: Callable[[], Mapping[str, LazyArray]],
    write_beside: Callable[[Path], None],
) -> Path:
    """The folder in the cache; ``write_beside`` writes what lies beside the weights into a new one."""
    digest = sha256(" ".join([VERSION, *map(base_digest, paths)]).encode()).hexdigest()[:_DIGITS]
    folder = default_folder() / "models" / f"{name.lower()}-{digest}"
    # The same file may have been given under another name: by its path, or by the name of its package.
    for known in (folder, *sorted(folder.parent.glob(f"*-{digest}"))):
        if _is_complete(known):
            return known
    needed = sum(4 * tensor.size for tensor in tensors_of().values())
    note(
        f"{name}: its weights are decoded once to float32, {needed / 1e6:,.0f} MB in {folder}, "
        "which can be deleted later"
    )
    # Another process that makes the same folder is waited for.
    with place(folder), disk_errors(), reserve(folder, folder=True, wait=True) as part:
        if not _is_complete(folder):
            check_space(folder, needed + _BESIDE)
            wide = partial(np.asarray, dtype=np.float32)
            tensors = {
                key: tensor if tensor.dtype == np.float32 else tensor.map(wide, shape=tensor.shape, dtype=np.float32)
                for key, tensor in tensors_of().items()
            }
            write_beside(part)
            write_safetensors(Stored(tensors, {"format": "pt"}), part / "model.safetensors")
            sync(part)
            part.rename(folder)
            sync_folder(folder.parent)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()


def _write_beside(paths: tuple[Path, ...], folder: Path) -> None:
    """Write the configuration and the tokenizer that transformers makes of the metadata."""
    gguf, stated = paths[0], open_gguf(paths).config
    try:
        import transformers
    except ImportError as error:
        raise missing_packages("a float model made from a GGUF file", ("torch", "transformers"), error) from error
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": gguf.parent,
            "gguf_file": gguf.name,
            "local_files_only": True,
            "trust_remote_code": False,  # else transformers asks whether the Python code of a folder may run
        }
        config = transformers.AutoConfig.from_pretrained(**source)
        # From the metadata, transformers sets no class and no dtype, and ε carries the rounding error of a float32.
        config.architectures, config.dtype = stated["architectures"], "float32"
        if "rms_norm_eps" in stated:
            config.rms_norm_eps = stated["rms_norm_eps"]
        # transformers reads the scaling of positions from the key-values, but they do not state that of Llama 3.
        if stated.get("rope_scaling", {}).get("rope_type") == "llama3":
            config.rope_parameters = {**(config.rope_parameters or {}), **stated["rope_scaling"]}
        config.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # A faulty file makes transformers raise errors of many kinds.
    except Exception as error:
        what = f"transformers cannot make a configuration and a tokenizer from its metadata ({ascii(error)[:200]})"
        raise FormatError(what, fix="give the model's own folder of transformers").at(str(gguf)) from error
    finally:
        logging.set_verbosity(verbosity)
