"""Finding the adapter file of a path: a file, a folder, a Hub id in the local cache, or an installed package."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from loralens.errors import FormatError, LoraLensError, OptionError, place
from loralens.formats.files.atomic import Input, is_moved_aside
from loralens.formats.files.container import CONFIG
from loralens.formats.files.outside import NO_FILE, folders, is_relative_name, open_stream, read_whole
from loralens.requirements import ENCODER, LANGUAGE_MODEL, install_command

if TYPE_CHECKING:
    from importlib.metadata import Distribution


_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
# the names that transformers gives to weights, whole or in shards
_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def is_package_name(text: str) -> bool:
    """Whether a text can be the name of a package: letters and digits, with dots, dashes and underscores between."""
    return _NAME.fullmatch(text) is not None


def is_installed(name: str) -> bool:
    """Whether a package of this name is installed. Its case, and ``-``, ``_`` or ``.`` in it, make no difference."""
    return _distribution(name) is not None


def model_folder(name: str) -> Path | None:
    """The folder of a transformers model in an installed package; None if the package or the model is not there.

    Such a folder has a ``config.json`` with weights beside it: ``model.safetensors``, ``pytorch_model.bin``, or shards.
    """
    files = _package_files(name)
    configured = {file.parent for file in files if file.name == "config.json" and file.is_file()}
    folders = sorted(configured & {file.parent for file in files if _WEIGHTS.fullmatch(file.name)})
    if len(folders) > 1:
        what = f"{name}: the installed package holds several models: {_listed(map(str, folders))}"
        raise OptionError(what, fix="give one of these")
    return folders[0] if folders else None


def gguf_file(name: str) -> Path | None:
    """The only GGUF file in an installed package; None if the package is not there, or has none or several."""
    paths = [file for file in _package_files(name) if file.suffix == ".gguf" and file.is_file()]
    return paths[0] if len(paths) == 1 else None


def _package_files(name: str) -> list[Path]:
    """The files that an installed package says it has. The package is never imported."""
    distribution = _distribution(name)
    listed = (distribution.files or []) if distribution else []
    return [Path(str(file.locate())) for file in listed if is_relative_name(file.as_posix())]


def _distribution(name: str) -> "Distribution | None":
    from importlib.metadata import PackageNotFoundError, distribution  # 30 ms, and few paths are names of packages

    try:
        return distribution(name) if is_package_name(name) else None
    except PackageNotFoundError:
        return None


def _listed(names: Iterable[str]) -> str:
    """Up to eight names."""
    every = list(names)
    return ", ".join(every[:8]) + (" …" if len(every) > 8 else "")


# The usual names of adapter files. In a folder that has several, the first one is taken: safetensors before pickles.
NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors")
INDEX = ".safetensors.index.json"  # of an adapter in several files, as transformers divides models
# `.lora` is LitGPT's; the others are those of the containers that are read.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")
# Files that training tools leave beside an adapter, and pickles of whole models.
NO_ADAPTERS = (
    *("optimizer*", "scheduler*", "rng_state*", "training_args*", "scaler*", "pytorch_model*", "*.index.json"),
    "state.safetensors",  # of loralens train
)
_NO_ADAPTER = re.compile("|".join(map(translate, NO_ADAPTERS)))
# org/name; a path of two parts looks the same, so an existing path comes first.
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_PLAIN = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # a Hub id, whose parts have at most 96 letters
_FIX = "check the path, or first download the Hub id or install the package that it names"
_WINDOWS = re.compile(r"(?P<drive>[A-Za-z]):[\\/](?P<rest>.*)")
_NUMBER = re.compile(r"[+-]?[0-9]*[.,]?[0-9]+")
# Folders of trainers: what lies in them belongs to the adapter above them.
_CHECKPOINTS = re.compile(r"checkpoint-.*|.*-state|\..*")
_NEAR = 3  # names that are offered for a misspelt one
_LOOKED_AT = 10_000  # most names of a folder that are compared with a misspelt one; they take a tenth of a second
_LFS = b"version https://git-lfs"  # how a pointer file of Git LFS begins
Container = Literal["safetensors", "gguf", "pickle"]


@final
@dataclass(frozen=True, slots=True)
class AdapterPaths:
    """Where an adapter is stored. It stands for its path wherever a path is taken, and is not looked for again.

    Attributes
    ----------
    given
        The path as it was given.
    path
        The file or folder that it names: for a Hub id the folder of a snapshot, for a package that of its model.
    file
        The weights.
    container
        The container of the weights by their first bytes.
    config
        The ``adapter_config.json`` beside the weights, whether it is readable or not.
    """

    given: Path
    path: Path
    file: Path
    container: Container
    config: Path | None

    def __fspath__(self) -> str:
        return str(self.given)

    __str__ = __fspath__

    @property
    def inputs(self) -> list[Input]:
        """All of these paths, for checks that none of them is written to."""
        what = f"the adapter {self.given}"
        config = [(f"the configuration of {self.given}", self.config)] if self.config else []
        return [(what, self.path), (what, self.file), *config]


def find_adapter(source: str | os.PathLike[str]) -> AdapterPaths:
    """Find the adapter at a path, once for everything that reads it: what was found before is returned as it is.

    Raises
    ------
    OptionError
        There is no such file or folder, or the path is neither.
    FormatError
        The folder holds no adapter file or several, or the file is a Git-LFS pointer, a web page, or too short.
    """
    if isinstance(source, AdapterPaths):
        return source
    given = Path(source)
    path = existing_path(given)
    with _report_os_errors(path):
        file = file_in_folder(path) if path.is_dir() else path
        with place(file):
            start = _first_bytes(file)
            if not file.name.endswith(INDEX):
                _check_start(start)
    return AdapterPaths(given, path, file, _container(start), config_beside(file))


@contextmanager
def _report_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a FormatError."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or path}: cannot be opened: {error.strerror}"
        raise FormatError(what, fix="check the path and its permissions") from error


def existing_path(path: Path) -> Path:
    """Find what a path names: an existing file or folder, a Hub id in the local cache, or an installed package.

    For a Hub id it is the folder of the snapshot, for a package the folder of its model, or its GGUF file. Readers of
    models call `loralens.formats.models.model_files.model_path`, which turns the GGUF file of a package into a
    folder of floats.

    Raises
    ------
    OptionError
        It is none of these, and the message says which were tried; or the package holds several models.
    FormatError
        The system does not allow looking at the path.
    """
    name = path.as_posix()
    hub = _HUB_ID.match(name) is not None
    with _report_os_errors(path):
        if path.exists():
            if not (path.is_file() or path.is_dir()):
                raise OptionError(f"{path}: {NO_FILE}, and no folder", fix="give a file or a folder")
            return path
        if path.is_symlink():
            raise OptionError(f"{path}: is a link that leads to nothing or to itself", fix="remove or correct the link")
        folder = _cache_snapshot(name) if hub else _package_folder(name)
        if folder:
            return folder
    # A killed run leaves no adapter at its target, so that none is wrong.
    if "\0" not in name and is_moved_aside(path):
        what = f"{path}: no such file or folder: a run that was killed has moved it aside"
        raise OptionError(what, fix="repeat the command that wrote there, which puts it back first")
    # The message says which of the three meanings were looked for.
    tried = ", and the local Hub cache has no snapshot of it" if hub else ""
    if not hub and _names_package(name):
        without_model = f", and the installed package {name} holds no transformers model"
        tried = without_model if is_installed(name) else ", and no package of this name is installed"
    # The install command is known only for the packages of the two models that the documentation uses.
    installable = name in (ENCODER, LANGUAGE_MODEL) and not is_installed(name)
    fix = install_command([name]) if installable else nearest_names(path) or _FIX
    raise OptionError(f"{path}: no such file or folder{tried}", fix=fix)


def existing_file(path: Path, *, fix: str) -> Path:
    """The path of a file that is neither an adapter nor a model, so that it is no Hub id and no package.

    Raises
    ------
    OptionError
        There is no such file; the advice is the nearest name there, or else ``fix``.
    """
    if not path.exists():
        raise OptionError(f"{path}: no such file", fix=nearest_names(path) or fix)
    return path


def nearest_names(path: Path) -> str:
    """Advice for a path that does not exist, such as the nearest names in its folder; empty if there is none."""
    from difflib import get_close_matches  # only when something is wrong

    if _NUMBER.fullmatch(str(path)):
        return f"a number needs its option, such as --by {str(path).replace(',', '.')}"
    if os.sep == "/" and (windows := _WINDOWS.match(str(path))):
        tail = windows["rest"].replace("\\", "/")
        return f"this system writes paths with /; in WSL that is /mnt/{windows['drive'].lower()}/{tail}"
    wrong = path
    try:
        # The wrong name may be that of a folder on the way.
        while not wrong.parent.exists():
            wrong = wrong.parent
        with os.scandir(wrong.parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_LOOKED_AT), strict=False)]
    except (OSError, ValueError):
        return ""
    # A name in other capitals is nearer than any other, and then one of which only the beginning was given.
    near = [name for name in names if name.lower() == wrong.name.lower()]
    near = near or [
        name for name in sorted(names) if len(wrong.name) > 2 and name.lower().startswith(wrong.name.lower())
    ]
    called = {Path(name).stem: name for name in names} | {name: name for name in names}
    near = near or [called[word] for word in get_close_matches(wrong.name, called, n=_NEAR, cutoff=0.75)]
    paths = [str(wrong.with_name(name)) for name in dict.fromkeys(near[:_NEAR])]
    verb = "names there are" if len(paths) > 1 else "name there is"
    return f"the nearest {verb} {' and '.join(filter(None, (', '.join(paths[:-1]), paths[-1])))}" if paths else ""


def known_folder(name: str) -> Path | None:
    """The folder of the model that a file names: a Hub id in the local cache, or an installed package.

    A name that comes from a file is never used as a path.
    """
    if not _PLAIN.fullmatch(name):
        return None
    try:
        return _cache_snapshot(name) or (None if "/" in name else _package_folder(name))
    except (LoraLensError, OSError):
        return None


def _package_folder(name: str) -> Path | None:
    """The model folder in the installed package ``name``, else its GGUF file; None if no package can have the name."""
    return model_folder(name) or gguf_file(name) if _names_package(name) else None


def _names_package(name: str) -> bool:
    return is_package_name(name) and Path(name).suffix not in SUFFIXES


def _cache_snapshot(name: str) -> Path | None:
    """The snapshot of ``org/name`` in the Hugging Face cache."""
    # The variables and defaults of huggingface_hub, in its order.
    home = _folder("HF_HOME", _folder("XDG_CACHE_HOME", Path("~/.cache")) / "huggingface")
    return snapshot(_folder("HF_HUB_CACHE", home / "hub") / f"models--{name.replace('/', '--')}")


def snapshot(folder: Path) -> Path | None:
    """The snapshot in a folder ``models--org--name`` of a cache: the one that ``main`` names, else the only one."""
    # The layout of huggingface_hub's cache.
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    # refs/main holds the commit of the last download.
    if main.is_file():
        revision = read_whole(main).decode(errors="replace").strip()
        chosen = snapshots / revision if is_relative_name(revision) else None
        return chosen if chosen and chosen.is_dir() else None
    all_found = list(snapshots.glob("*"))
    return all_found[0] if len(all_found) == 1 else None


def _folder(variable: str, default: Path) -> Path:
    return Path(os.path.expandvars(os.environ.get(variable) or default)).expanduser()


def file_in_folder(folder: Path) -> Path:
    """The adapter file in a folder; whether it can be read is not checked. Errors as for `find_adapter`."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    indexes = [path for path in folder.glob(f"*{INDEX}") if path.is_file()]
    if len(indexes) == 1:
        return indexes[0]
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    # If the only tensor file of a folder has no configuration, but there are adapters in folders below, it is one
    # adapter of a collection.
    if len(files) == 1 and not (folder / CONFIG).exists():
        files += _adapters_below(folder)
    # A single file may have any name.
    if len(files) == 1:
        return files[0]
    if not files:  # PEFT saves an adapter that is not called "default" in a folder of its name
        inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [p / name for p in inner for name in NAMES if (p / name).is_file()]
        if len({file.parent for file in files}) == 1:
            return files[0]
    if not files:
        fix = f"give the file, or a folder with {NAMES[0]}"
        raise FormatError("the folder holds no adapter file", fix=fix).at(str(folder))
    raise FormatError(
        f"the folder holds several candidates: {_listed(str(file.relative_to(folder)) for file in files)}",
        fix="give one of these files; `loralens survey` lists all adapters under a folder",
    ).at(str(folder))


def _adapters_below(folder: Path) -> list[Path]:
    """The first adapter in each folder within a folder, also behind links; checkpoints of trainers are left out."""
    adapters = []
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir() and not _CHECKPOINTS.fullmatch(entry.name))
    for name in inner:
        below = folders(folder / name, without=lambda name: _CHECKPOINTS.fullmatch(name) is not None)
        files = (path / file for path, files in below for file in files)
        adapters += next(([file] for file in files if file.name in NAMES or file.suffix == ".safetensors"), [])
    return adapters


# Bytes that no text holds: the control characters of ASCII without tab, line ends and form feed.
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f") | {127}


def _check_start(start: bytes) -> None:
    """Refuse a file whose first bytes show that it holds no tensors: a Git-LFS pointer, a web page, or nothing."""
    if start.startswith(_LFS):
        fix = "run 'git lfs pull', or download the file itself"
        raise FormatError("is a Git-LFS pointer, not the weights", fix=fix)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        what = "is an HDF5 file, as Keras and KerasHub (.lora.h5) write them, which loralens does not read"
        fix = "merge it in KerasHub, save the model with and without it as safetensors, and use loralens extract"
        raise FormatError(what, fix=fix)
    if not start:
        raise FormatError("is empty", fix="download or copy the file again")
    if len(start) < 8:  # the length of a safetensors header takes 8, and other containers need more
        raise FormatError(f"{len(start)} bytes are too few for any tensor file", fix="download or copy the file again")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise FormatError("is a web page, not the weights", fix="download the file itself; log in first if it is gated")
    # Every container has a byte of zero, or another one that no text has, within its first bytes.
    if not _CONTROL & {*start}:
        raise FormatError("is a text, not the weights", fix="leave it out, or give the file of the tensors")


def container_of(file: Path) -> Container:
    """The container of a file by its first bytes; a file that begins as no other one does counts as safetensors."""
    return _container(_first_bytes(file))


def _container(start: bytes) -> Container:
    # A safetensors file begins with the length of its header in eight bytes, the upper four of which are zero, and then
    # the brace of its header. A length of 640 or 896 … modulo 65,536 gives the same two bytes as a pickle's protocol.
    if start.startswith(b"GGUF"):
        return "gguf"
    protocol = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    safetensors = start[4:9] == bytes(4) + b"{"
    return "pickle" if start[:4] == b"PK\x03\x04" or (protocol and not safetensors) else "safetensors"


def is_pickle(file: Path) -> bool:
    """Whether a file is a torch pickle by its first bytes: a zip archive, or a pickle of protocol 2 or later."""
    return container_of(file) == "pickle"


def is_gguf(file: Path) -> bool:
    """Whether a file is a GGUF file by its first bytes."""
    return container_of(file) == "gguf"


def _first_bytes(file: Path) -> bytes:
    """Read up to 64 bytes; none of a pipe, because reading it would wait for another process to write to it."""
    try:
        with open_stream(file) as stream:
            return stream.read(64)
    except FormatError:
        if file.exists() and not file.is_file():
            return b""
        raise


def weights_among(names: Iterable[str]) -> list[str]:
    """The names of files that may hold an adapter."""
    return [name for name in names if is_tensor_file(name) and not _NO_ADAPTER.match(name)]


def is_tensor_file(name: str) -> bool:
    """Whether a file has the suffix of one that holds tensors, and is not hidden."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def config_beside(file: Path) -> Path | None:
    """The ``adapter_config.json`` in the folder of a file, whether it is readable or not."""
    config = file.parent / CONFIG
    return config if os.path.lexists(config) else None
