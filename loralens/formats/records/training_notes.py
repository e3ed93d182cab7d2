"""What an adapter of an image model says about its training, in the metadata of its header.

sd-scripts and the trainers built on it write keys ``ss_…`` (``train_network.py``), the keys ``modelspec.…`` are those
of Stability AI's ModelSpec, and ai-toolkit writes ``software`` and ``training_info``. All of it is text that came with
the file: it is shown and never believed, and what is too long is cut.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Any, NamedTuple, final

from loralens.errors import visible
from loralens.formats.files.json_text import json_or_none, json_text
from loralens.tables.table import Recorded

LONGEST = 300  # characters of a value that are shown; a description is rarely longer
PARSED = 4 << 20  # characters of a value that are parsed as JSON; tags of 10,000 images take 1 MB
MOST_TAGS = 100  # tags that are kept, the most frequent ones

_ABSENT = ("", "None", "null", "{}", "[]")  # what trainers write for an option that was not given
_TRAINERS = (  # a key that only one trainer writes → its name; the first that is there counts
    ("ss_sd_scripts_commit_hash", "sd-scripts"),
    ("ss_session_id", "sd-scripts"),
)


class Tag(NamedTuple):
    """A tag of the captions, and the number of images that have it."""

    tag: str
    images: int


class Folder(NamedTuple):
    """A folder of training images: how many there are, and how often each is repeated in an epoch."""

    name: str
    images: int | None
    repeats: int | None


@final
@dataclass(frozen=True, slots=True)
class TrainingNotes(Recorded):
    """What the metadata say about the training.

    Attributes
    ----------
    values : mapping of str to str
        Property → its value as text, in the order in which people ask for it.
    trigger_words : list of str
        The phrase that the metadata name; otherwise the names of the folders of images, as sd-scripts reads them.
    tags : list of Tag
        The most frequent tags of the captions.
    tag_count : int
        The number of all different tags.
    folders : list of Folder
    """

    values: Mapping[str, str]
    trigger_words: list[str]
    tags: list[Tag]
    tag_count: int
    folders: list[Folder]

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> "TrainingNotes | None":
        """The notes in the metadata of a header; None if there are none."""
        header = _stated(metadata)
        values = _values(header)
        tags, folders = _tags(header), list(_folders(header))
        words = trigger_words(header)
        # A file of kohya that loralens wrote states its network. This alone says nothing about a training.
        if not (values.keys() - {"network"} or tags or folders or words):
            return None
        return cls(values, words, [Tag(*tag) for tag in tags.most_common(MOST_TAGS)], len(tags), folders)


def trigger_words(metadata: Mapping[str, str] | None) -> list[str]:
    """The trigger words in the metadata of a header, without the other notes: tags take long to count."""
    header = _stated(metadata)
    phrase = header.get("modelspec.trigger_phrase")
    return [_short(phrase)] if phrase else [folder.name for folder in _folders(header)]


def _stated(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return {key: text for key, text in (metadata or {}).items() if isinstance(text, str) and text not in _ABSENT}


# Property and its keys in the header, the first of which counts; then those of numbers, which may be in parentheses.
_TEXTS = """
    title            modelspec.title ss_output_name name
    author           modelspec.author
    description      modelspec.description ss_training_comment
    usage_hint       modelspec.usage_hint
    license          modelspec.license
    architecture     modelspec.architecture ss_base_model_version
    base_file        ss_sd_model_name
"""
_NUMBERS = """
    images                      ss_num_train_images
    batch_size                  ss_total_batch_size ss_batch_size_per_device
    resolution                  ss_resolution modelspec.resolution
    optimizer                   ss_optimizer
    learning_rate               ss_learning_rate ss_unet_lr
    text_encoder_learning_rate  ss_text_encoder_lr
    scheduler                   ss_lr_scheduler
    clip_skip                   ss_clip_skip
    seed                        ss_seed
"""


def _values(header: Mapping[str, str]) -> dict[str, str]:
    """Property → value, for those that the header states."""

    def first(*keys: str) -> str | None:
        return next((_short(header[key]) for key in keys if key in header), None)

    def rows(table: str) -> dict[str, str | None]:
        return {name: first(*keys) for name, *keys in map(str.split, table.strip().splitlines())}

    def of(done: str | None, most: str | None) -> str | None:
        return f"{done or '?'} of {most}" if most and most != done else done

    module = first("ss_network_module")
    epochs = first("ss_epoch") or _from_json(header, "training_info", "epoch")
    values = {
        **rows(_TEXTS),
        "trainer": _trainer(header),
        "network": module and module + _arguments(header),
        "steps": of(first("ss_steps") or _from_json(header, "training_info", "step"), first("ss_max_train_steps")),
        "epochs": epochs and of(epochs, first("ss_num_epochs")),
        **{name: text and text.strip("()") for name, text in rows(_NUMBERS).items()},
        "date": _date(header),
    }
    return {name: text for name, text in values.items() if text}


def _short(text: object) -> str:
    """A text with its control characters visible, on one line and at most `LONGEST` characters long."""
    # Cut before anything else is done with it: it may have millions of characters.
    start = str(text)[: LONGEST + 1]
    line = visible(re.sub(r"\s+", " ", start).strip())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _parse(header: Mapping[str, str], key: str) -> Any:
    text = header.get(key, "")
    return json_or_none(text) if 0 < len(text) <= PARSED else None


def _from_json(header: Mapping[str, str], key: str, field: str) -> str | None:
    parsed = _parse(header, key)
    value = parsed.get(field) if isinstance(parsed, dict) else None
    return _short(value) if isinstance(value, int | float | str) else None


def _trainer(header: Mapping[str, str]) -> str | None:
    software = _parse(header, "software")
    if isinstance(software, dict) and isinstance(software.get("name"), str):
        version = software.get("version")
        return _short(f"{software['name']} {version}" if isinstance(version, str | int | float) else software["name"])
    if any(key.startswith("ot_") for key in header):
        return "OneTrainer"
    return next((name for key, name in _TRAINERS if key in header), None)


def _arguments(header: Mapping[str, str]) -> str:
    """The rank, α and arguments of a network, behind its name."""
    numbers = [
        f"{word} {_short(header[key])}"
        for word, key in (("dim", "ss_network_dim"), ("alpha", "ss_network_alpha"))
        if key in header
    ]
    arguments = _parse(header, "ss_network_args")
    pairs = (
        [f"{_short(name)}={_short(value)}" for name, value in arguments.items()] if isinstance(arguments, dict) else []
    )
    listed = ", ".join([*numbers, *pairs[:10]])
    return f" ({listed})" if listed else ""


def _date(header: Mapping[str, str]) -> str | None:
    stated = header.get("modelspec.date")
    if stated:
        return _short(stated)
    for key in ("ss_training_finished_at", "ss_training_started_at"):
        try:
            seconds = float(header.get(key, ""))
            if isfinite(seconds):
                return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
        except (ValueError, OverflowError, OSError):
            continue
    return None


def _datasets(header: Mapping[str, str]) -> list[Mapping[str, Any]]:
    parsed = _parse(header, "ss_datasets")
    return [each for each in parsed if isinstance(each, dict)] if isinstance(parsed, list) else []


def _tags(header: Mapping[str, str]) -> "Counter[str]":
    """The tags of all folders, and the number of images that have them."""
    counts: Counter[str] = Counter()
    for folders in (
        _parse(header, "ss_tag_frequency"),
        *(each.get("tag_frequency") for each in _datasets(header)),
    ):
        if not isinstance(folders, dict):
            continue
        for tags in folders.values():
            for tag, count in tags.items() if isinstance(tags, dict) else ():
                # Whole numbers that float64 cannot hold exactly are no counts of images.
                if type(count) is int and 0 < count < 1 << 53 and (name := _short(tag)):
                    counts[name] += count
        # Datasets repeat what ss_tag_frequency says.
        if counts:
            break
    return counts


def _folders(header: Mapping[str, str]) -> Iterator[Folder]:
    """The folders of images. sd-scripts takes the repeats and the trigger words from their names: ``10_sks dog``."""
    parsed = _parse(header, "ss_dataset_dirs")
    for path, about in list(parsed.items())[:MOST_TAGS] if isinstance(parsed, dict) else ():
        about = about if isinstance(about, dict) else {}
        repeats, images = about.get("n_repeats"), about.get("img_count")
        name = re.sub(r"^\d{1,9}_", "", re.split(r"[\\/]", path.rstrip("\\/"))[-1])
        yield Folder(
            _short(name), *(each if type(each) is int and abs(each) < 1 << 53 else None for each in (images, repeats))
        )


def join_notes(headers: Sequence[Mapping[str, str] | None]) -> Mapping[str, str] | None:
    """The metadata of the first of several files, with the trigger words and the tags of all of them."""
    first, *others = headers
    if not others:
        return first
    joined = dict(first or {})
    for header in filter(None, others):
        for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_datasets"):
            old, new = _parse(joined, key), _parse(header, key)
            if isinstance(new, list) and (old is None or isinstance(old, list)):
                joined[key] = json_text([*(old or []), *(each for each in new if each not in (old or []))])
            elif isinstance(new, dict) and (old is None or isinstance(old, dict)):
                joined[key] = json_text(_with_counts(old or {}, new))
        if tags := _joined_words([joined.get("modelspec.tags", ""), header.get("modelspec.tags", "")]):
            joined["modelspec.tags"] = tags
    # A phrase hides the names of folders, so it has the words of sources without a phrase too.
    if any(_stated(header).get("modelspec.trigger_phrase") for header in headers):
        joined["modelspec.trigger_phrase"] = _joined_words([", ".join(trigger_words(header)) for header in headers])
    return joined or first


def _joined_words(texts: Sequence[str]) -> str:
    words = [word.strip() for text in texts if text not in _ABSENT for word in text.split(",")]
    return ", ".join(filter(None, dict.fromkeys(words)))


def _with_counts(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables of folders, with the larger number of each entry of both, as they may be the same images."""
    joined = {**new, **old}
    for folder in old.keys() & new.keys():
        if isinstance(old[folder], dict) and isinstance(new[folder], dict):
            joined[folder] = _with_counts(old[folder], new[folder])
        elif isinstance(old[folder], int) and isinstance(new[folder], int):
            joined[folder] = max(old[folder], new[folder])
    return joined
