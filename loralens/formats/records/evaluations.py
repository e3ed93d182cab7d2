"""Results of ``loralens evaluate`` in files: JSON objects, which ``loralens report`` shows on its page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, final

from loralens.errors import FormatError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import read_json
from loralens.formats.files.json_text import dumps, finite_number, plain_text
from loralens.formats.files.location import existing_path

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
    if not isinstance(entry, dict):
        raise FormatError("is not an evaluation: an adapter is not an object", fix=_FIX)
    numbers = dict(entry)
    path, parameters = numbers.pop("path", None), numbers.pop("parameters", None)
    if path is not None and plain_text(path) is None:
        raise FormatError("is not an evaluation: the path of an adapter is not text that can be shown", fix=_FIX)
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
