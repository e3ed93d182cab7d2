"""Writing findings as SARIF 2.1.0, which code hosts show beside the files of a change."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from os.path import relpath
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, final
from urllib.parse import quote

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.stored import Moment, Moments, Recipe
from loralens.errors import FormatError, OptionError, place, target_exists
from loralens.formats.files.adapter_files import write_safetensors
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import OpenFile, Stored, read_json, read_safetensors
from loralens.formats.files.disk import check_room
from loralens.formats.files.json_text import dumps, finite_number, json_or_none, json_text, plain_text
from loralens.formats.files.location import existing_file, existing_path, find_adapter
from loralens.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
Record = Mapping[str, str | None]  # level, code, adapter, module, evidence, fix


def sarif(findings: Sequence[Record], *, rules: Mapping[str, str], root: Path) -> str:
    """The text of a SARIF log. Equal findings give equal texts.

    Parameters
    ----------
    findings : sequence of mappings
        ``level`` (error, warning or note: SARIF's own words), ``code``, ``evidence``, ``fix``, ``adapter`` (the path of
        the file) and ``module`` or None.
    rules : mapping of str to str
        Code → its meaning. A code that is missing here becomes a rule with its name only.
    root : Path
        The folder of the repository, to which paths are made relative.
    """
    # Sorted, so that the log does not depend on the order of findings.
    codes = sorted({str(finding["code"]) for finding in findings})
    index = {code: i for i, code in enumerate(codes)}
    driver = {
        "name": "loralens",
        "version": __version__,
        "informationUri": "https://arxiv.org/abs/2106.09685",
        "rules": [_rule(code, rules.get(code, "")) for code in codes],
    }
    results = [_result(finding, index, root) for finding in findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def check_log_target(path: Path) -> None:
    """Refuse a path where no log can be written, before the checks run.

    Raises
    ------
    OptionError
        Its folder cannot be made, or the path is a folder, or a file with something else than such a log.
    """
    check_room(path)
    if path.is_dir():
        raise OptionError(f"{path}: is a folder", fix="give a file")
    if path.exists() and not _holds_log(path):
        raise OptionError(f"{path}: exists, and holds no log of findings", fix="choose another file")


def _holds_log(path: Path) -> bool:
    """Whether a file is empty or such a log, so that it may be replaced; an adapter or its configuration may not."""
    try:
        return path.stat().st_size == 0 or {"version", "runs"} <= read_json(path).keys()
    except (FormatError, OSError):
        return False


def write_sarif(text: str, path: Path) -> None:
    """Write a log, complete or not at all. An old log is replaced without asking: every CI job writes it anew."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def _rule(code: str, meaning: str) -> dict[str, Any]:
    words = code.replace("-", " ")
    description = {"text": meaning or f"Found by the reader of the file: {words}."}
    return {
        "id": code,
        "name": words.title().replace(" ", ""),
        "shortDescription": {"text": words[:1].upper() + words[1:]},
        "fullDescription": description,
        "help": description,
    }


def _result(finding: Record, index: Mapping[str, int], root: Path) -> dict[str, Any]:
    module, fix, code = finding["module"], finding["fix"], str(finding["code"])
    # Code hosts show the message beside the file, so it has the module and the advice too.
    text = (f"{module}: " if module else "") + str(finding["evidence"]) + (f"\nFix: {fix}" if fix else "")
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(str(finding["adapter"]), root)}}}
    # A finding about the whole file has no module.
    if module:
        location["logicalLocations"] = [{"fullyQualifiedName": module, "kind": "module"}]
    return {
        "ruleId": code,
        "ruleIndex": index[code],
        "level": finding["level"],
        "message": {"text": text},
        "locations": [location],
    }


def _uri(path: str, root: Path) -> str:
    """The path as a relative URI reference: with ``/``, and quoted where a URI demands it."""
    file = Path(path)
    # There is no relative path between two drives of Windows.
    if file.is_absolute() and file.anchor == root.anchor:
        file = Path(relpath(file, root))
    return file.as_uri() if file.is_absolute() else quote(os.fsencode(file.as_posix()))


_FIX = "give a file that `loralens evaluate -o` has written"


class MeasuredAdapter(NamedTuple):
    """An adapter and its measures.

    Attributes
    ----------
    path
        As it was given to `loralens evaluate`; None for the model without an adapter.
    parameters
        The number of parameters in its pairs; None where it is not known.
    measures
        ``loss``, ``accuracy``, ``perplexity``, as far as the task has them; None where there was nothing to predict.
    """

    path: str | None
    parameters: int | None
    measures: Mapping[str, float | None]


@final
@dataclass(frozen=True, slots=True)
class StoredEvaluation:
    """The quality of a model on texts, with each of several adapters; ``texts`` is the number of texts."""

    model: str
    task: str
    data: str
    texts: int
    adapters: Sequence[MeasuredAdapter]


def write_evaluation(record: Mapping[str, Any], path: Path) -> None:
    """Write the record of a result of `loralens.evaluate`."""
    with atomic_file(path) as stream:
        stream.write(dumps(record).encode("utf-8"))


def read_evaluation(path: Path) -> StoredEvaluation:
    """Read what `write_evaluation` wrote.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        The file holds something else.
    """
    record = read_json(existing_path(path), fix=_FIX)
    with place(path):
        model, task, data = (plain_text(record.get(key)) for key in ("model", "task", "data"))
        texts, adapters = record.get("texts"), record.get("adapters")
        if model is None or task is None or data is None or not _is_count(texts) or not isinstance(adapters, list):
            raise FormatError("is not an evaluation: it lacks the model, the task, the texts or the adapters", fix=_FIX)
        if not adapters:
            raise FormatError("is an evaluation without adapters or measures", fix=_FIX)
        return StoredEvaluation(model, task, data, texts, [_parse_adapter(entry) for entry in adapters])


def _parse_adapter(entry: Any) -> MeasuredAdapter:
    numbers = dict(entry) if isinstance(entry, dict) else {"path": 0}
    path: Any = numbers.pop("path", None)
    parameters = numbers.pop("parameters", None)
    if path is not None and plain_text(path) is None:
        raise FormatError("is not an evaluation: an adapter is no object with a path that can be shown", fix=_FIX)
    # A later version may store more than numbers.
    measures = {
        name: finite_number(value)
        for name, value in numbers.items()
        if plain_text(name) and (value is None or finite_number(value) is not None)
    }
    return MeasuredAdapter(path, parameters if _is_count(parameters) else None, measures)


def _is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that float64 can hold, as the columns of a page are sorted by floats."""
    return type(value) is int and finite_number(value) is not None


RECIPE = "loralens_recipe"  # the key of the recipe in the metadata
LONGEST = 1_000_000  # bytes of a TOML file; a recipe of a thousand adapters takes less
DEEPEST = 30  # parts of a dotted key: the time of tomllib grows with their square, and a recipe needs three
_DEEP = re.compile(rf"""(?<![\w.-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{DEEPEST}}}""")


def read_recipe(path: Path) -> Recipe:
    """Read the recipe in a TOML file, or in the metadata of the adapter at ``path``.

    Raises
    ------
    FormatError
        The file is not TOML, or the file or adapter contains no recipe.
    """
    with place(path):
        if path.suffix == ".toml":
            return _from_toml(path)
        file = find_adapter(path).file
        # Only safetensors files have metadata that a recipe is written to.
        if file.suffix != ".safetensors":
            raise FormatError("holds no recipe", fix="give a .toml file, or an adapter that loralens combined")
        text = (read_safetensors(file).metadata or {}).get(RECIPE)
        if text is None:
            raise FormatError("was not combined by loralens: no recipe is in it", fix="give a .toml file")
        content = json_or_none(text)
        if not isinstance(content, dict):
            raise FormatError("its recipe is not readable", fix="write one as a .toml file")
        return Recipe.of(content)


def _from_toml(path: Path) -> Recipe:
    try:
        file = OpenFile(path)  # it does not wait for a pipe, and refuses a folder
        if file.size > LONGEST:
            raise FormatError(f"{file.size:,} bytes are too many for a recipe", fix="give the path of a recipe")
        text = file.read(0, file.size).decode("utf-8")
        # This is checked before tomllib sees the text.
        if _DEEP.search(text):
            raise FormatError(f"has a name of more than {DEEPEST} parts", fix="give the path of a recipe")
        import tomllib  # few recipes are read from files of their own

        content = tomllib.loads(text)
    # TOMLDecodeError is a ValueError. A number of too many digits raises a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not TOML: {error}", fix="correct the file") from error
    recipe = Recipe.of(content)

    def resolve(name: str) -> str:
        # Path.exists raises an error for a path that is too long for the system.
        return str(path.parent / name) if os.path.exists(path.parent / name) else name  # noqa: PTH110

    take = recipe.take if recipe.take in (None, "none") else resolve(str(recipe.take))
    adapters = tuple(replace(member, path=resolve(member.path)) for member in recipe.adapters)
    return replace(recipe, adapters=adapters, take=take)


def stamp_recipe(stored: Stored, recipe: Recipe) -> Stored:
    """Add the recipe to the metadata of ``stored``."""
    text = json_text(recipe.record())
    return replace(stored, metadata={**(stored.metadata or {}), RECIPE: text})


MOMENTS = "loralens.moments"
VERSION = 1
LARGEST = 1e150  # of an entry: products of two such entries, as an eigenvalue routine makes them, stay finite
# How far K may be from symmetric, and how far below 0 an eigenvalue may be, relative to the largest entry.
ROUNDING = 1e-4
_AGAIN = "measure them again: loralens calibrate"


def save_moments(moments: Moments, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write moments to a safetensors file, which appears complete or not at all. Equal moments give equal bytes.

    Raises
    ------
    OptionError
        The name does not end in ``.safetensors``, its folder does not exist, or the file exists and ``overwrite`` is
        false or it holds something else than moments.
    FormatError
        The file cannot be written.
    """
    path = Path(path)
    check_moments_target(path, overwrite=overwrite)
    tensors = {}
    for name, moment in moments.items():
        tensors[f"{name}.K"] = LazyArray.of(np.ascontiguousarray(moment.K, np.float64))
        if moment.G is not None:
            tensors[f"{name}.G"] = LazyArray.of(np.ascontiguousarray(moment.G, np.float64))
    record = {
        "version": VERSION,
        "fingerprint": moments.fingerprint,
        "counts": {name: moment.count for name, moment in moments.items()},
        "traces": {name: moment.trace for name, moment in moments.items()},
        "unmeasured": dict(moments.unmeasured),
        "source": dict(moments.source),
    }
    write_safetensors(Stored(tensors, {MOMENTS: json.dumps(record, ensure_ascii=True)}), path)


def check_moments_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where moments cannot be written, before they are measured."""
    if path.suffix != ".safetensors":
        raise OptionError(f"{path}: moments are written to .safetensors files", fix="give a file of that suffix")
    check_room(path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise target_exists(path)
    # --overwrite must not destroy an adapter whose name was given by mistake.
    if path.exists():
        metadata: Mapping[str, str] | None = None
        with suppress(FormatError):
            metadata = read_safetensors(path).metadata
        if MOMENTS not in (metadata or {}):
            raise OptionError(f"{path}: exists, and holds no moments", fix="choose another target")


def load_moments(path: str | PathLike[str]) -> Moments:
    """Read the moments in a file.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        The file holds no moments, or they are damaged.
    """
    path = existing_file(Path(path), fix="check the path, or measure the moments: loralens calibrate")
    stored = read_safetensors(path)
    with place(path):
        record = _record(stored)
        counts, traces = record["counts"], record["traces"]
        modules = {name: _moment(name, count, traces.get(name), stored.tensors) for name, count in counts.items()}
        # Only a file that was put together by hand or damaged has a tensor without a count.
        extra = set(stored.tensors) - {f"{name}.{side}" for name in modules for side in "KG"}
        if extra:
            raise FormatError(f"{min(extra)} belongs to no module that was counted", fix=_AGAIN)
    described = {field: record[field] for field in ("fingerprint", "unmeasured", "source")}
    return Moments(modules=modules, **described)


def _record(stored: Stored) -> dict[str, Any]:
    """The record in the metadata, whose fields are checked for their types."""
    if MOMENTS not in (stored.metadata or {}):
        raise FormatError("holds no moments", fix="give the file that loralens calibrate wrote")
    record = json_or_none((stored.metadata or {})[MOMENTS])
    version = record.get("version") if isinstance(record, dict) else None
    # A newer version may mean other numbers by the same keys.
    if version != VERSION:
        what = f"its record is damaged, or of version {version!a:.20}, not {VERSION}"
        raise FormatError(what, fix=_AGAIN + ", with this loralens")
    # Every field is used without further checks by the callers.
    kinds = {"fingerprint": str, "counts": dict, "traces": dict, "unmeasured": dict, "source": dict}
    whole = all(isinstance(record.get(name), kind) for name, kind in kinds.items())
    if not (
        whole
        and all(type(count) is int and count >= 0 for count in record["counts"].values())
        and all(
            x is None or ((trace := finite_number(x)) is not None and 0 <= trace <= LARGEST)
            for x in record["traces"].values()
        )
        and all(isinstance(reason, str) for reason in record["unmeasured"].values())
    ):
        raise FormatError("a field of its record is missing, or has a value that no measurement gives", fix=_AGAIN)
    return dict(record)


def _moment(name: str, count: int, trace: float | None, tensors: Mapping[str, LazyArray]) -> Moment:
    with place(name):
        K, G = (_square(tensors, f"{name}.{side}") for side in "KG")
        if K is None:
            raise FormatError("it was counted, but its moments are missing", fix=_AGAIN)
        return Moment(K, count, G, trace=trace)


def _square(tensors: Mapping[str, LazyArray], key: str) -> Array | None:
    """The matrix of second moments under a key, checked to be symmetric and positive semidefinite; None if missing."""
    if key not in tensors:
        return None
    tensor = tensors[key]
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.dtype != np.float64:
        raise FormatError(f"{key} {tensor.shape} {tensor.dtype} is not a square float64 matrix", fix=_AGAIN)
    array = tensor.read()
    size = float(np.abs(array).max(initial=0.0))
    # `not <=` refuses NaN too. eigvalsh returns the smallest eigenvalue first.
    if (
        not size <= LARGEST
        or np.abs(array - array.T).max(initial=0.0) > ROUNDING * size
        or (size and np.linalg.eigvalsh(array)[0] < -ROUNDING * size)
    ):
        what = f"{key} is not a matrix of second moments: it is not symmetric, or has a negative eigenvalue, NaN or Inf"
        raise FormatError(what, fix=_AGAIN)
    return array
