"""The verb ``survey``: a folder of adapters at a glance, one line for each file, from the headers of the files."""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from hashlib import file_digest, sha256
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from loralens.analysis.clients import applied_by
from loralens.analysis.equality import differences
from loralens.choices import Consumer
from loralens.core.adapter import Adapter, Finding
from loralens.core.image_models import image_models
from loralens.core.messages import progress
from loralens.errors import LoraLensError, OptionError
from loralens.exports import checks_keywords
from loralens.fleet.catalogue import CATALOGUE, NON_FINITE, UNREACHABLE, Member, Unreadable, reading_setting
from loralens.fleet.known_bases import family_of, family_of_base
from loralens.fleet.updating import scan
from loralens.formats import load
from loralens.formats.files.container import read_json
from loralens.formats.files.location import config_beside, is_pickle
from loralens.formats.files.outside import open_stream
from loralens.formats.records.collection import (
    FolderEntry,
    HeaderLayouts,
    examine_file,
    folder_labels,
    metadata_of,
    note_repeated_links,
)
from loralens.formats.records.training_notes import TrainingNotes, trigger_words
from loralens.tables.numbers import UNDEFINED, count, fixed, number, size, span
from loralens.tables.result import ResultSequence
from loralens.tables.table import Column, Columns, Keys, Table, label_column, rows_key

if TYPE_CHECKING:
    from io import BufferedReader

    from loralens.verbs.fleets.fleet_verbs import Fleet

Reading = Callable[[Path], Adapter]
Level = Literal["fine", "check", "copy", "wrong", "unreadable", "unopened"]
# The order in which rows are shown where a screen has no room for all: what the user has to look at comes first.
GRAVITY: Mapping[Level, int] = {"wrong": 6, "unreadable": 5, "check": 4, "unopened": 3, "copy": 2, "fine": 1}
OTHERS_NAMED = 3  # files without LoRA pairs that a sentence names; --json lists all of them
MANY = 200  # files, to read whose headers takes long enough for a bar
FAMILY_WIDTH = 10  # letters of a family, and letters of trigger words, in the table: 80 columns hold all that is asked
WORDS_WIDTH = 24
SAMPLE = 1 << 16  # bytes at the beginning, in the middle and at the end by which files are compared before the whole
SPOILT_EXTRA = Finding(
    "error",
    NON_FINITE,
    "a head or another tensor that belongs to no pair holds NaN or Inf",
    "training diverged: go back to an earlier checkpoint",
)


@dataclass(frozen=True, slots=True)
class SurveyedAdapter:
    """One row: an adapter as its header describes it, or a file that should be an adapter and cannot be read.

    Attributes
    ----------
    path : Path
        The file, or a folder that has a configuration without weights.
    label : str
        The name in the table, relative to the folder of the survey: the folder of the adapter if it holds no other one.
    bytes : int
        Bytes on disk.
    format : str or None
        The dialect; None of a file that is not opened or cannot be read. So are the following fields.
    family : str or None
        The family of models that it is for; several with "or" between them; None if nothing shows it.
    base_model : str or None
        The base model that the file or its configuration names.
    trained_on : str or None
        The same, or the file of the base model in the metadata of an image model's adapter.
    trigger_words : sequence of str
        The words that its metadata name.
    modules, parameters : int or None
        The numbers of modules, and of parameters in pairs.
    ranks : sequence of int
    scales : sequence of float
        Those that occur, increasing.
    clients : sequence of str
        The programs that apply it as it was trained, by the rules of ``inspect --for``.
    refusal : Finding or None
        Why programs that read its dialect do not apply it as it was trained, if none does.
    findings : sequence of Finding
        The findings of the reader.
    member : Member or None
        What the numbers show, if they were read.
    original : SurveyedAdapter or None
        The adapter before it of which it is a copy.
    duplicate_kind : str or None
        ``bytes``: the files are the same, and so are their configurations; ``tensors`` or ``update``: as
        `Fleet.copies` finds it.
    duplicate_difference : float or None
        ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module.
    same_file_as : SurveyedAdapter or None
        Another adapter whose file this path leads to, through a link; such a path is not a copy.
    reason, fix : str
        Why it cannot be read, or was not opened, and what the user can do.
    opened : bool
        Whether its header was read. Files of torch have none, and are opened only to read their numbers.
    """

    path: Path
    label: str
    bytes: int
    format: str | None = None
    family: str | None = None
    base_model: str | None = None
    trained_on: str | None = None
    trigger_words: Sequence[str] = ()
    modules: int | None = None
    parameters: int | None = None
    ranks: Sequence[int] = ()
    scales: Sequence[float] = ()
    clients: Sequence[Consumer] = ()
    refusal: Finding | None = None
    findings: Sequence[Finding] = ()
    member: Member | None = None
    original: "SurveyedAdapter | None" = None
    duplicate_kind: str | None = None
    duplicate_difference: float | None = None
    same_file_as: "SurveyedAdapter | None" = None
    reason: str = ""
    fix: str = ""
    opened: bool = True
    reading: Reading | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, whose numbers are read on demand; None if it cannot be read."""
        return self.reading(self.path) if self.reading else None

    @property
    def level(self) -> Level:
        """The verdict in one word, for programs."""
        if self.reason:
            return "unreadable" if self.opened else "unopened"
        if self.original or self.same_file_as:
            return "copy"
        levels = {finding.level for finding in self.findings}
        if "error" in levels:
            return "wrong"
        return "check" if "warning" in levels or self.refusal else "fine"

    @property
    def verdict(self) -> str:
        """The verdict in words: what is wrong, or which programs apply it."""
        match self.level:
            case "unreadable":
                return f"unreadable: {self.reason}"
            case "unopened":
                return f"{self.reason}, not opened"
            case "copy" if self.same_file_as:
                return f"same file as {self.same_file_as.label}"
            case "copy":
                assert self.original
                off = f" (ΔW differs by {self.duplicate_difference:.1g})" if self.duplicate_difference else ""
                return f"copy of {self.original.label}{off}"
            case "wrong":
                return f"wrong: {self._codes('error')}"
            case "check":
                reasons = (self.refusal.words if self.refusal else "", self._codes("warning"))
                return f"check: {', '.join(filter(None, reasons))}"
            case _:
                # A dialect without a row in the table of clients is read by the program that it is called after.
                return f"fine: {', '.join(self.clients) or self.format}"

    def _codes(self, level: str) -> str:
        return ", ".join(dict.fromkeys(finding.words for finding in self.findings if finding.level == level))


@dataclass(frozen=True, slots=True, repr=False)
class SurveyResult(ResultSequence[SurveyedAdapter]):
    """The adapters under a folder, in order of paths; the result is a sequence of them.

    Attributes
    ----------
    adapters : sequence of SurveyedAdapter
        The adapters, and files of torch that were not opened.
    unreadable : sequence of SurveyedAdapter
        Files that should be adapters and cannot be read, each with the reason.
    without_pairs : sequence of FolderEntry
        Files that hold tensors and no LoRA pairs: models, for example.
    content : bool
        Whether the numbers were read.
    written : Path or None
        The page that was written.
    """

    contents = "adapters"

    folder: Path
    adapters: Sequence[SurveyedAdapter]
    unreadable: Sequence[SurveyedAdapter]
    without_pairs: Sequence[FolderEntry]
    content: bool = False
    written: Path | None = None

    @property
    def files(self) -> list[SurveyedAdapter]:
        """The adapters and the files that cannot be read, in order of paths."""
        return sorted([*self.adapters, *self.unreadable], key=lambda row: row.path.parts)

    @property
    def findings(self) -> list[Finding]:
        """The findings of all files: those of the readers, why no program applies a file, and why it cannot be read."""
        found = [finding for row in self.files for finding in row.findings]
        found += [replace(row.refusal, level="warning") for row in self.files if row.refusal]
        return found + [Finding("error", "unreadable", row.reason, row.fix) for row in self.unreadable]

    def tables(self) -> list[Table[SurveyedAdapter]]:
        """One line for each file."""
        # Adapters of language models have no trigger words, which leaves more room for paths.
        worded = any(row.trigger_words for row in self.files)
        label, verdict = (replace(LABEL, shortest=18), replace(VERDICT, shortest=11)) if worded else (LABEL, VERDICT)
        columns = [column for column in COLUMNS if worded or column is not TRIGGERS]
        numbers = NUMBERS if self.content else ()
        return [Table(str(self.folder), (label, *columns, *numbers, verdict, PROBLEMS), self.files)]

    def conclusion(self) -> list[str]:
        """How many adapters there are, and how many there are of each verdict."""
        return [f"{self.folder}: {self.summary()}."]

    def summary(self) -> str:
        """The conclusion without the folder and without a full stop."""
        # Without a table an empty answer would look like a failure.
        if not (self.adapters or self.unreadable or self.without_pairs):
            return "no adapter in this folder, nor in any under it"
        levels = Counter(row.level for row in self.files)
        copies = sum(row.original is not None for row in self.files)
        links = levels["copy"] - copies
        counts = {
            f"{levels['fine']} fine": levels["fine"],
            f"{levels['check']} to check": levels["check"],
            f"{levels['wrong']} wrong": levels["wrong"],
            count(copies, "copy", "copies"): copies,
            f"{count(links, 'link')} to another": links,
            f"{levels['unopened']} not opened": levels["unopened"],
        }
        said = ", ".join(text for text, of in counts.items() if of)
        unread = f"; {count(len(self.unreadable), 'file')} that cannot be read" if self.unreadable else ""
        return f"{count(len(self.adapters), 'adapter')}{': ' if said else ''}{said}{unread}"

    def listing(self) -> list[Table[SurveyedAdapter]]:
        """The adapters and then the files that cannot be read, one file a row."""
        return [Table("adapters", ALL_COLUMNS, [*self.adapters, *self.unreadable])]

    def sentences(self) -> list[str]:
        """What opens files of torch, which other tensor files there are, and how to see more."""
        sentences = []
        # One sentence instead of the same remedy in every row.
        if fixes := [row.fix for row in self.unreadable if "needs torch" in row.reason]:
            need = "needs" if len(fixes) == 1 else "need"
            sentences.append(f"{len(fixes)} of them {need} torch: {fixes[0]}")
        if self.without_pairs:
            total = size(sum(file.size for file in self.without_pairs))
            # These files are counted and not listed, as the files of models would hide the adapters.
            hold = "holds" if len(self.without_pairs) == 1 else "hold"
            names = ", ".join(str(file.path.relative_to(self.folder)) for file in self.without_pairs[:OTHERS_NAMED])
            ellipsis = " …" if len(self.without_pairs) > OTHERS_NAMED else ""
            files = f"{count(len(self.without_pairs), 'file')} of {total}"
            sentences.append(f"no adapters: {files} {hold} tensors and no LoRA pairs: {names}{ellipsis}")
        if self.adapters and not self.content:
            sentences.append(
                "Only headers were read. --content reads the numbers too; --html PAGE.html writes a gallery."
            )
        if any(row.level in ("check", "wrong", "unreadable") for row in self.files):
            sentences.append("Inspect a file to read what is wrong with it and how to fix it: loralens FILE.")
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "folder",
            rows_key("adapters", ALL_COLUMNS),
            rows_key("unreadable", (Column("path"), Column("bytes"), Column("reason"), Column("fix"))),
            rows_key(
                "no_adapters", (Column("path"), Column("bytes", "size"), Column("reason")), source="without_pairs"
            ),
        )


def _base_name(name: str | None) -> str:
    """The last part of a base model's name or path; paths of Windows are recognised on any system."""
    return (name or UNDEFINED).replace("\\", "/").rstrip("/").rpartition("/")[2].removesuffix(".safetensors")


def _family_text(family: str | None) -> str:
    """The first of several families, with a question mark."""
    first, several, _ = (family or UNDEFINED).partition(" or ")
    text = first + "?" * bool(several)
    return text if len(text) <= FAMILY_WIDTH else f"{text[: FAMILY_WIDTH - 1]}…"


def _size_text(nbytes: int) -> str:
    """A size without a decimal from two digits on, which leaves room for words."""
    text, unit = size(nbytes).split()
    return f"{round(float(text))} {unit}" if len(text) > 3 else f"{text} {unit}"


def _words_text(words: Sequence[str]) -> str:
    text = ", ".join(words)
    return text if len(text) <= WORDS_WIDTH else f"{text[: WORDS_WIDTH - 1]}…"


LABEL: Column[SurveyedAdapter] = label_column("label", "path", distinct=True)
VERDICT: Column[SurveyedAdapter] = label_column("verdict", "verdict", sentence=True)
PROBLEMS: Column[SurveyedAdapter] = Column(
    "gravity", lambda row: GRAVITY[row.level], json=False, csv=False, matters="largest", about="problems come first"
)
FAMILY: Column[SurveyedAdapter] = Column("family", "family", "family", _family_text, align="left", priority=8)
BASE: Column[SurveyedAdapter] = Column(
    "trained_on", "trained_on", "trained on", _base_name, align="left", priority=8, shortest=11
)
TRIGGERS: Column[SurveyedAdapter] = Column(
    "trigger_words",
    "trigger_words",
    "trigger words",
    _words_text,
    align="left",
    priority=8,
    csv=False,
    sentence=True,
    shortest=13,
)
# On a narrow terminal what the numbers show is left out first.
COLUMNS: Columns[SurveyedAdapter] = (
    FAMILY,
    Column("ranks", "ranks", "r", span, priority=8),
    Column("bytes", "bytes", "size", _size_text, priority=8),
    TRIGGERS,
    BASE,
)
NUMBERS: Columns[SurveyedAdapter] = (
    # One column for people instead of two, as modules with ΔW = 0 are rare.
    Column(
        "modules_and_zeros",
        lambda row: (
            f"{row.modules}" + (f" ({row.member.zero_modules} zero)" if row.member.zero_modules else "")
            if row.member
            else None
        ),
        "modules",
        priority=1,
        json=False,
        csv=False,
    ),
    Column("frobenius", "member.frobenius", "‖ΔW‖F", number, priority=3, about="length of ΔW"),
    Column(
        "effective_rank",
        "member.effective_rank",
        "effective",
        fixed(".2f"),
        priority=3,
        about="effective rank, mean over modules",
    ),
    # Twelve hexadecimal digits are 48 bits, enough to tell the adapters of a folder apart by eye.
    Column(
        "fingerprint",
        "member.fingerprint",
        "fingerprint",
        lambda text: (text or UNDEFINED)[:12],
        align="left",
        priority=0,
        about="hash of the content",
    ),
)
ALL_COLUMNS: Columns[SurveyedAdapter] = (
    Column("path"),
    Column("level"),
    Column("verdict"),
    Column("format"),
    *COLUMNS,
    Column("trigger_words", lambda row: ", ".join(row.trigger_words), json=False),
    Column("base_model"),
    Column("modules"),
    Column("zero_modules", "member.zero_modules"),
    Column("scales"),
    Column("parameters"),
    *NUMBERS[1:],
    Column("clients", csv=False),
    Column("clients", lambda row: " ".join(row.clients), json=False),
    Column("duplicate_of", "original.path"),
    Column("duplicate_kind"),
    Column("duplicate_difference"),
    Column("same_file_as", "same_file_as.path"),
    # JSON has the whole findings; a cell of CSV holds their codes.
    Column("findings", csv=False),
    Column("findings", lambda row: " ".join(finding.code for finding in row.findings), json=False),
    Column("reason", json=False),
)


@checks_keywords
def survey(
    folder: str | PathLike[str],
    *,
    html: str | PathLike[str] | None = None,
    overwrite: bool = False,
    content: bool = False,
    once: bool = False,
) -> SurveyResult:
    """List the adapters under a folder: family, rank, size, trigger words, base, and a verdict on each.

    Only the headers of the files are read, and the bytes of files that may be copies. `loralens FOLDER` is the same
    command. A file that should be an adapter and cannot be read is listed with the reason. Whole models are recognised
    by their headers, and only counted. The exit code is 0 whatever is there.

    Parameters
    ----------
    folder : path
        The folder; its subfolders are searched too.
    html : path, optional
        Also write a gallery: one page with previews, a search and filters. Previews are pictures beside the files
        (NAME.png, NAME.preview.png …) or in their metadata.
    overwrite : bool
        Replace the page if it exists.
    content : bool
        Also read the numbers: norms, effective ranks, NaN, modules with ΔW = 0, and copies in other formats and dtypes.
    once : bool
        Add the update of the out_proj of an nn.MultiheadAttention once; PEFT adds it twice.

    Raises
    ------
    OptionError
        ``folder`` is not a folder, or the page cannot be written.

    Notes
    -----
    Files are copies if their bytes and their configurations are the same. The bytes are compared only of files of equal
    size. With ``content``, if the folder has an index (`loralens.Fleet`) and no file has changed since it was made, the
    index answers; otherwise all files are read.

    Examples
    --------
    $ loralens survey folder
    $ loralens survey folder --html gallery.html
    """
    root = Path(folder)
    if not root.is_dir():
        raise OptionError(f"{root}: is not a folder", fix="give the folder to look through")
    page = None if html is None else Path(html)
    if page:
        from loralens.reporting.gallery import check_gallery_target

        check_gallery_target(page, overwrite=overwrite)
    links: list[Path] = []
    files = scan(root, linked=links.append)
    paths = {root / name: file for name, file in files.items()}
    note_repeated_links(root, list(paths), links)
    reading: Reading = partial(load, once=once, strict=False)
    found, others = list[SurveyedAdapter](), list[FolderEntry]()
    layouts, known = HeaderLayouts(), dict[Hashable, SurveyedAdapter]()
    with progress("looking", len(paths) if len(paths) > MANY else 0) as step:
        for path in sorted(paths, key=lambda path: path.parts):
            if reason := paths[path].reason:
                found.append(SurveyedAdapter(path, "", 0, reason=reason, fix="give yourself the right to read it"))
            elif (key := layouts.key(path)) in known:
                found.append(replace(known[key], path=path, trigger_words=trigger_words(metadata_of(path))))
            elif isinstance(row := _examine(path, reading, once=once, opening=content), FolderEntry):
                others.append(row)
            else:
                found.append(row)
                # A message about a file that cannot be read may name it.
                if key is not None and not row.reason:
                    known[key] = row
            if step:
                step(1)
    rows = _with_byte_copies(_with_labels(root, found), {path: file.real for path, file in paths.items()})
    if content:
        with _index_of(root, once=once) as fleet:
            rows = _with_numbers(root, rows, fleet, reading)
    result = SurveyResult(
        root,
        [row for row in rows if row.level != "unreadable"],
        [row for row in rows if row.level == "unreadable"],
        others,
        content,
        page,
    )
    if page:
        from loralens.verbs.pages.survey_page import write_survey

        write_survey(result, page)
    return result


def _examine(path: Path, reading: Reading, *, once: bool, opening: bool) -> "SurveyedAdapter | FolderEntry":
    """The row of a file, or its entry if it is a tensor file of another kind."""
    try:
        # torch takes a second to import, and reads old files as a whole.
        if not opening and path.is_file() and is_pickle(path):
            return _unopened(path)
    except (LoraLensError, OSError):  # examine_file says what is wrong
        pass
    entry = examine_file(path, once=once)
    if entry.status == "other":
        return entry
    adapter = entry.adapter
    if adapter is None:
        return SurveyedAdapter(path, "", entry.size, reason=entry.reason, fix=entry.fix)
    notes = TrainingNotes.of(adapter.metadata)
    modules = list(adapter.modules.values())
    clients, refusal = applied_by(adapter)
    stated = (notes.values.get("architecture", "") if notes else "").partition("/")[0]
    return SurveyedAdapter(
        path,
        "",
        entry.size,
        adapter.format,
        family_of(adapter) or _stated_family(stated) or None,
        adapter.base_model,
        adapter.base_model or (notes.values.get("base_file") if notes else None),
        trigger_words(adapter.metadata),
        len(adapter),
        adapter.parameters,
        sorted({module.rank for module in modules}),
        sorted({module.scale for module in modules}),
        clients,
        refusal,
        adapter.findings,
        reading=reading,
    )


def _stated_family(stated: str) -> str:
    """The family in what the metadata say about the architecture, where names and shapes show none."""
    named = [model.name for model in image_models() if any(word in stated.lower() for word in model.words)]
    return family_of_base(stated) or (named[0] if named else stated) if stated else ""


def _unopened(path: Path) -> SurveyedAdapter:
    """The row of a file of torch, as its configuration describes it."""
    config, beside = {}, config_beside(path)
    if beside:
        config = read_json(beside)
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    base = base if isinstance(base, str) and base else None
    return SurveyedAdapter(
        path,
        "",
        path.stat().st_size,
        family=family_of_base(base or "") or None,
        base_model=base,
        trained_on=base,
        ranks=[rank] if type(rank) is int else (),
        reason="torch file",
        fix="give --content, or inspect the file",
        opened=False,
    )


def _with_labels(root: Path, rows: Sequence[SurveyedAdapter]) -> list[SurveyedAdapter]:
    """The rows with their names, without the suffix of most files where the rest tells them apart."""
    labels = folder_labels(root, [row.path for row in rows])
    short = {path: label.removesuffix(".safetensors") for path, label in labels.items()}
    uses = Counter(short.values())
    return [replace(row, label=short[row.path] if uses[short[row.path]] == 1 else labels[row.path]) for row in rows]


class _FileKey(NamedTuple):
    """What files must have in common to be copies, from the cheapest to find out to the dearest."""

    size: int
    config: str = ""
    sample: bytes = b""
    digest: bytes = b""


def _with_byte_copies(rows: Sequence[SurveyedAdapter], real: Mapping[Path, str]) -> list[SurveyedAdapter]:
    """The rows with the copies and links among them; of copies, the first in order of paths is the original.

    ``real`` identifies the file that each path leads to. Checkpoints of one run have equal sizes and headers. Their
    samples differ, so none of them is read as a whole.
    """
    found = list(rows)
    targets: dict[str, int] = {}
    keys: dict[int, _FileKey] = {}
    for i, row in enumerate(found):
        first = targets.setdefault(real[row.path], i) if row.bytes else i
        if first != i:
            found[i] = replace(row, same_file_as=found[first])
        elif row.bytes and row.level != "unreadable":
            keys[i] = _FileKey(row.bytes)
    for step in (_with_config, _sampled, _digested):
        uses = Counter(keys.values())
        told = {i: step(found[i].path, key) for i, key in keys.items() if uses[key] > 1}
        keys = {i: key for i, key in told.items() if key}
    originals: dict[_FileKey, int] = {}
    for i, key in keys.items():
        first = originals.setdefault(key, i)
        if first != i:
            found[i] = replace(found[i], original=found[first], duplicate_kind="bytes", duplicate_difference=0.0)
    return found


def _unless_gone(step: Callable[[Path, _FileKey], _FileKey]) -> Callable[[Path, _FileKey], _FileKey | None]:
    """A step that answers None about a file that cannot be read any more: it is a copy of none."""

    @wraps(step)
    def answer(path: Path, key: _FileKey) -> _FileKey | None:
        try:
            return step(path, key)
        except (LoraLensError, OSError):
            return None

    return answer


@_unless_gone
def _with_config(path: Path, key: _FileKey) -> _FileKey:
    # The configuration may change what the tensors mean; the order of its fields does not.
    beside = config_beside(path)
    return key._replace(config=json.dumps(read_json(beside), sort_keys=True)) if beside else key


@_unless_gone
def _sampled(path: Path, key: _FileKey) -> _FileKey:
    sample = sha256()
    with open_stream(path) as stream:
        for start in (0, max(0, key.size // 2), max(0, key.size - SAMPLE)):
            stream.seek(start)
            sample.update(stream.read(SAMPLE))
    return key._replace(sample=sample.digest())


@_unless_gone
def _digested(path: Path, key: _FileKey) -> _FileKey:
    # Of small files the sample was the whole.
    if key.size <= SAMPLE:
        return key
    with open_stream(path) as stream:
        return key._replace(digest=file_digest(cast("BufferedReader", stream), "sha256").digest())


# ---- With the numbers


@contextmanager
def _index_of(root: Path, *, once: bool) -> "Iterator[Fleet]":
    """The index in a folder if it is up to date, otherwise a fresh one that is removed afterwards."""
    from loralens.verbs.fleets.fleet_verbs import Fleet

    stored = Fleet.open(root)
    if _is_current(stored, root, once=once):
        yield stored
        return
    # The index is not in the folder itself, since a survey writes nothing there.
    with TemporaryDirectory(prefix="loralens-survey-") as home:
        fresh = Fleet.open(home)
        fresh.update(root, once=once)
        yield fresh


def _is_current(fleet: "Fleet", root: Path, *, once: bool) -> bool:
    """Whether there is an index of this folder, whose files were read in the same way and have not changed since."""
    if not (fleet.home / CATALOGUE).exists():
        return False
    try:
        same = fleet.state.reading == reading_setting(once=once) and fleet.root.samefile(root)
        # A fresh index says why something cannot be reached, and does not keep what could be reached before.
        reached = not any(row.stamp == UNREACHABLE for row in fleet.state.files.values())
        return same and reached and not fleet.changes()
    except (LoraLensError, OSError):  # an index that cannot be read is no obstacle, as a fresh one is made
        return False


def _with_numbers(
    root: Path, rows: Sequence[SurveyedAdapter], fleet: "Fleet", reading: Reading
) -> list[SurveyedAdapter]:
    """The rows with what the index has of them, and the copies in other formats and dtypes."""

    def shown(item: Member | Unreadable) -> Path:
        # The folder as the user wrote it; the index has its real path.
        return root / item.path.relative_to(fleet.root)

    members = {shown(member): member for member in fleet.members()}
    failed = {shown(file): file for file in fleet.unreadable()}
    found: dict[int | Path, SurveyedAdapter] = {}
    duplicates = _duplicates(fleet, reading)
    for row in rows:
        if file := failed.get(row.path):
            row = SurveyedAdapter(row.path, row.label, row.bytes, reason=file.reason, fix=file.fix)
        elif member := members.get(row.path):
            spoilt = [SPOILT_EXTRA] if NON_FINITE in member.findings else []
            row = replace(row, member=member, findings=[*spoilt, *row.findings])
            # Copies of the same bytes were found already.
            if member.number in duplicates and not (row.original or row.same_file_as):
                original, kind, difference = duplicates[member.number]
                if original in found:
                    row = replace(row, original=found[original], duplicate_kind=kind, duplicate_difference=difference)
            found[member.number] = row
        found[row.path] = row
    return [found[row.path] for row in rows]


def _duplicates(fleet: "Fleet", reading: Reading) -> dict[int, tuple[int, str, float]]:
    """Number of a copy → number of the first adapter of its group in order of paths, and how much both are the same."""
    copies = fleet.copies()
    to_kept = {copy.member.number: copy for copy in copies.copies}
    duplicates: dict[int, tuple[int, str, float]] = {}
    for group in copies.groups:
        first, *others = sorted(group, key=lambda member: member.path.parts)
        for member in others:
            copy = to_kept.get(member.number) or to_kept[first.number]
            kind, off = copy.sameness.kind, copy.sameness.difference
            # The other pairs of the group were not compared.
            if {copy.kept.number, copy.member.number} != {first.number, member.number}:
                pair = reading(first.path), reading(member.path)
                off = max((one.relative for one in differences(*pair)), default=0.0)
                kind = "tensors" if first.fingerprint == member.fingerprint else "update"
            duplicates[member.number] = first.number, kind, off
    return duplicates
