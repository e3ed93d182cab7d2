"""Finding the weights in the folder of a model: one file, or the shards that an index names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from loralens.core.stored import parse_json
from loralens.errors import FormatError, OptionError
from loralens.formats.files.container import read_json
from loralens.formats.files.relative_name import is_relative_name

# If a folder has several files, the one with one of these names (of transformers, of diffusers) holds the weights.
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@final
@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files that hold a model's weights, in order of names, and their index.

    Attributes
    ----------
    index
        The JSON file that says which shard holds which tensor.
    content
        The content of the index; empty if there is none.
    """

    files: tuple[Path, ...]
    index: Path | None
    content: dict[str, Any]


def weight_files(folder: Path) -> WeightFiles | None:
    """The files of the weights in a folder; None if it holds none.

    Raises
    ------
    OptionError, FormatError
        A shard is missing, the index is damaged, or it is not clear which of several indices or files is meant.
    """
    index = _usual(folder, "*.safetensors.index.json", "indices", fix="move away all but the one that is meant")
    # An index decides, because a folder may hold shards of several models.
    if index:
        content = read_json(index)
        shards = tuple(folder / name for name in shard_names(content, index.name))
        for shard in shards:
            if not shard.is_file():
                what = f"{shard.name} is named by {index.name}, but is missing"
                raise OptionError(what, fix="download the missing shard")
        return WeightFiles(shards, index, content)
    file = _usual(folder, "*.safetensors", "files and no index", fix="give one of these files")
    return WeightFiles((file,), None, {}) if file else None


def _usual(folder: Path, glob: str, what: str, *, fix: str) -> Path | None:
    """The file that matches; of several, the one with a model's usual name; None if none matches."""
    files = sorted(folder.glob(glob))
    # A folder of diffusers may hold variants (fp16, EMA) beside the usual file.
    usual = [file for file in files if file.name.removesuffix(".index.json") in SINGLE]
    if len(files) > 1 and len(usual) != 1:
        raise FormatError(f"holds several {what}: {', '.join(file.name for file in files[:6])}", fix=fix)
    return next(iter(usual or files), None)


def shard_names(content: Any, index: str) -> list[str]:
    """The files that an index names, which all lie in the folder of the index.

    Raises
    ------
    FormatError
        It is not an index, or a name in it is a path.
    """
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{index} has no weight_map", fix="download the index again")
    for name in set(names.values()):
        # An index may come from anybody, and names files that are opened.
        if not is_relative_name(name) or "/" in name:
            what = f"{index} names {name!a:.100}, which is not a plain file name"
            raise FormatError(what, fix="download the index again")
    return sorted(set(names.values()))


def check_index(text: str, index: str) -> None:
    """Refuse a text that is not an index, or names files outside of its folder. Errors are those of `shard_names`."""
    try:
        content = parse_json(text.removeprefix("\ufeff"))  # `read_json` accepts a byte order mark too
    except ValueError as error:
        raise FormatError(f"{index} is not JSON", fix="download the index again") from error
    shard_names(content, index)
