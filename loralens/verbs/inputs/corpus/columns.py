"""Rows of Parquet files, and of data sets that Hugging Face's ``datasets`` has saved to a folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralens.errors import FormatError
from loralens.formats.files.regular import check_folder, open_stream
from loralens.requirements import missing_packages

PARQUET = ".parquet"
SAVED = "dataset_info.json"  # in a folder of `Dataset.save_to_disk`
SPLITS = "dataset_dict.json"  # in a folder of `DatasetDict.save_to_disk`, beside a folder of each split


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a data set that ``datasets`` has saved, or several splits of one."""
    return any((folder / name).is_file() for name in (SAVED, SPLITS))


def parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file as mappings, some at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_packages("reading Parquet", ("pyarrow",), error) from error
    try:
        with open_stream(path) as stream, ParquetFile(stream) as file:
            for batch in file.iter_batches():
                yield from map(_without_nulls, batch.to_pylist())
    except (ArrowException, OSError) as error:
        what = f"cannot be read as Parquet: {str(error).splitlines()[0]}"
        raise FormatError(what, fix="save the table again") from error


def saved_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set that was saved to a folder."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise missing_packages("reading a folder of datasets", ("datasets",), error) from error
    check_folder(folder)
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        what = f"cannot be read as a data set: {str(error).splitlines()[0]}"
        raise FormatError(what, fix="save it again: dataset.save_to_disk(…)") from error
    if not isinstance(dataset, Dataset):
        if len(dataset) != 1:
            fix = f"give the folder of one of them: {', '.join(str(folder / name) for name in dataset)}"
            raise FormatError("holds several splits of a data set", fix=fix)
        (dataset,) = dataset.values()
    yield from map(_without_nulls, dataset)


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose values are null, at any depth.

    All rows of a column have the same keys: a message has the ``tool_calls`` of another one as null. A chat template
    that asks whether a message has any would find them.
    """
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
