"""``report``: all measurements of one or more adapters on one self-contained page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Never

from loralens.analysis.diagnosis import Diagnosis
from loralens.core.adapter import Adapter
from loralens.core.messages import command_line, note
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.stored import Moments
from loralens.errors import OptionError, visible
from loralens.exports import takes_options
from loralens.formats.files.atomic import check_apart
from loralens.formats.files.location import existing_path
from loralens.reporting.comparison_sections import watched_report
from loralens.reporting.document import PageTable, Report
from loralens.reporting.report_files import (
    check_report_target,
    markdown_paths,
    report_html,
    report_markdown,
    write_report,
)
from loralens.tables.numbers import join_words
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Keys, Rows, Table, label_column
from loralens.verbs.comparisons.trajectory import read_watched, watch_log_of
from loralens.verbs.pages.page import report_page
from loralens.verbs.shared.adapters import (
    Source,
    command_line_options,
    sources,
    with_checkpoints,
)
from loralens.verbs.shared.options import ModuleChoice, Reading
from loralens.verbs.spectra.doctor import FINDING_COLUMNS

ActivationSource = str | PathLike[str] | Moments


@dataclass(frozen=True, slots=True, repr=False)
class ReportResult(Tabular):
    """A report, which can be written as a page, as Markdown or as JSON.

    Attributes
    ----------
    document : Report
        The content of the page as plain data.
    written : sequence of Path
        The files and folders that were written; none without ``output``.
    """

    document: Report
    written: Sequence[Path] = ()

    def __reduce__(self) -> Never:
        # The tables of a page hold functions that make and write their cells.
        raise TypeError("a report cannot be pickled: keep what to_html(), to_markdown() or record() returns")

    def conclusion(self) -> list[str]:
        """What was written, and the first sentence of the page."""
        written = f"Wrote {join_words([str(path) for path in self.written])}: " if self.written else ""
        return [written + self.document.headline]

    def listing(self) -> list[Table[Any]]:
        """Every module of every adapter, as the last section of the page has them."""
        parts = [part for section in self.document.sections if section.key == "modules" for part in section.parts]
        tables = [part.table for part in parts if isinstance(part, PageTable)]
        # An adapter without a counterpart in the base lacks the columns of the comparison.
        common = set.intersection(*({column.key for column in table.columns} for table in tables)) if tables else set()

        def with_adapter(table: Table[Any]) -> Table[Any]:
            adapter: Column[Any] = label_column("adapter", "adapter", lambda _: table.title)
            return replace(table, columns=[adapter, *(column for column in table.columns if column.key in common)])

        return list(map(with_adapter, tables))

    def to_html(self) -> str:
        """The page as HTML."""
        return report_html(self.document)

    def to_markdown(self, folder: str = "report_files") -> str:
        """The report as Markdown, whose pictures are PNG files of ``folder``."""
        return report_markdown(self.document, folder)

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys that pages about adapters and fleets share; `record` takes the values from the page."""
        texts: list[Column[Any]] = [Column(key, type=str, may_lack=True) for key in ("command", "headline")]
        findings: Column[Any] = Column("findings", type=Rows(Diagnosis, FINDING_COLUMNS), may_lack=True)
        return (*texts, Column("summary", type=list[str], may_lack=True), findings, "*")

    def record(self) -> dict[str, Any]:
        """The numbers of the report as a JSON object."""
        return dict(self.document.record)

    def _repr_html_(self) -> str:
        from loralens.tables.render import html_sentence, html_table  # as in `Tabular`

        document = self.document
        sentences = "".join(f"<li>{escape(visible(sentence))}</li>" for sentence in document.remarks)
        verdicts = html_table(document.verdicts) if document.verdicts else ""
        title = f"<p><b>{escape(visible(document.title))}</b></p>"
        return f"{title}{html_sentence(document.headline)}{verdicts}{f'<ul>{sentences}</ul>' if sentences else ''}"


@takes_options
def report(
    *adapters: Source,
    output: str | PathLike[str] | None = None,
    fleet: str | PathLike[str] | None = None,
    base: ModelPath | None = None,
    activations: ActivationSource | Sequence[ActivationSource] = (),
    evaluations: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    intruders: bool | None = None,
    explain: bool | None = None,
    markdown: bool = False,
    overwrite: bool = False,
    selection: ModuleChoice,
    reading: Reading,
) -> ReportResult:
    """Write one self-contained page about adapters: findings, spectra, ranks, and comparisons; or about a fleet.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. With ``base`` the page also says what ΔW
    amplifies, which dimensions are intruders, and what a merge would lose. The folder of a run stands for its
    checkpoints, and that of a grid of runs for its finished runs.

    Parameters
    ----------
    *adapters : path, Adapter or model
        Files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load` returns. The folder of
        a run stands for its checkpoints. Or the log of a watched run (`loralens.watching`).
    output : path, optional
        The HTML page to write, such as reports/x.html.

        The page to write, a ``.html`` file; folders on the way are made. Without it nothing is written.
    fleet : path, optional
        Write the page of a fleet: its index, or the folder that holds .loralens-fleet. Without ADAPTER.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Also compare each adapter
        with its weights.
    activations : path or Moments, or a sequence of them
        A file of `loralens calibrate`: the second moments of real inputs. Each file belongs to the adapter that it was
        measured with.
    evaluations : path, or a sequence of them
        A file of `loralens evaluate ``output```, whose accuracies or losses then stand at the top of the page.
    intruders : bool, optional
        Whether to look for intruder dimensions, which takes an SVD of every weight. [default: if it takes at most about
        a minute]
    explain : bool, optional
        Whether to run the base, a language model, and show the words that each adapter makes more likely. [default: if
        torch and transformers are installed and it takes at most about a minute]
    markdown : bool
        Also write the page as Markdown with pictures, beside the page.
    overwrite : bool
        Replace what is already at the output path.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Returns
    -------
    ReportResult
        Its ``document`` is the content as plain data; `to_html`, `to_markdown` and `record` give it in other forms.

    Raises
    ------
    OptionError
        A page of another suffix than ``.html``, or that exists; ``markdown`` without ``output``; ``intruders`` or
        ``explain`` without a base; ``fleet`` with adapters, or with what is measured on them; a folder of several
        adapters that is not a run; a glob that matches nothing.
    FormatError
        A file that is not an adapter.
    MismatchError
        Activations that belong to none of the adapters.

    Notes
    -----
    ΔW is never formed. With a base its weights are read twice, one at a time: by the doctor, and for the amplification.

    Examples
    --------
    $ loralens report adapter other -o report.html
    """
    modules = selection.globs
    if markdown and output is None:
        raise OptionError("markdown is written next to the page, and there is no page", fix="give output, the page")
    # A report without intruders needs no base, so only True is refused.
    if intruders and base is None:
        raise OptionError("intruders are directions of W + ΔW, and no base is given", fix="give base, the base model")
    if explain and base is None:
        raise OptionError("explain runs the base, and no base is given", fix="give base, the base model")
    chosen = [] if fleet is not None else sources(adapters)
    # A single path is recognised by its type, since a string is a sequence too.
    moments = [activations] if isinstance(activations, str | PathLike | Moments) else list(activations)
    measured = [evaluations] if isinstance(evaluations, str | PathLike) else list(evaluations)
    for_adapters: dict[str, object] = {"base": base, "activations": moments, "evaluations": measured}
    page = None if output is None else Path(output)
    older: list[Path] = []
    # The target is checked before anything is measured, which may take minutes.
    if page:
        check_report_target(page, with_markdown=markdown, overwrite=overwrite)
        read = [*chosen, *moments, *measured, *([] if base is None else [base])]
        paths = [Path(source) for source in read if not isinstance(source, Adapter | Moments | ModelInMemory)]
        inputs = [(str(path), existing_path(path)) for path in paths]
        # A page may stand in the folder of an adapter: it replaces nothing there.
        for target in (page, *(markdown_paths(page) if markdown else ())):
            check_apart(target, inputs, within=False)
        # Only beside a page that is replaced: a Markdown file of the same name may else belong to something different.
        older = [] if markdown or not page.exists() else [path for path in markdown_paths(page) if path.exists()]
    if fleet is not None:
        if adapters:
            raise OptionError("fleet and adapters exclude each other", fix="leave out the adapters, or leave out fleet")
        _check_alone("page is about a fleet", "", **for_adapters, modules=modules)
        from loralens.verbs.fleets.fleet_page import (
            fleet_report,  # takes 60 ms to import, and few reports are of fleets
        )
        from loralens.verbs.fleets.fleet_verbs import open_fleet

        words = ["loralens", "report", "--fleet", str(fleet), *(["-o", str(page)] if page else ["--json"])]
        document = fleet_report(open_fleet(fleet), command=command_line(*words, *(["--markdown"] if markdown else [])))
        return ReportResult(document, write_report(document, page, with_markdown=markdown) if page else [])
    # The command on one line; empty where an input was an object, which no command can name.
    command = ""
    objects = (Adapter, Moments, ModelInMemory)
    if not any(isinstance(each, objects) for each in (*chosen, *moments, base)):
        options: dict[str, Sequence[object]] = {
            "base": [base] if base else [],
            "activations": moments,
            "evaluations": measured,
            "modules": modules,
        }
        words = ["loralens", "report", *map(str, chosen)]
        words += [word for name, values in options.items() for value in values for word in (f"--{name}", str(value))]
        words += [] if intruders is None else ["--intruders" if intruders else "--no-intruders"]
        words += [] if explain is None else ["--explain" if explain else "--no-explain"]
        # Without a page the command prints JSON, because `loralens report` needs either -o or --json.
        last = ["-o", str(page)] if page else ["--json"]
        last += ["--markdown"] if markdown else []
        command = " ".join(filter(None, [command_line(*words), command_line_options(reading), command_line(*last)]))
    if (log := watch_log_of(chosen)) is not None:
        _check_alone("is the log of a run", ", or give the adapters", **for_adapters)
        watched = read_watched(log, modules)
        document = watched_report(
            log.name,
            watched.tables()[0],
            sentences=watched.on_run,
            warnings=[(warning["step"], warning) for warning in watched.warnings],
            command=command,
            record=watched.record(),
        )
    else:
        document = report_page(
            with_checkpoints(chosen),
            base=base,
            activations=moments,
            evaluations=measured,
            modules=modules,
            intruders=intruders,
            explain=explain,
            reading=reading,
            command=command,
        )
    written = write_report(document, page, with_markdown=markdown) if page else []
    if older:
        names = " and ".join(map(str, older))
        note(f"{names} of an earlier report left unchanged; --markdown writes them again")
    return ReportResult(document, written)


def _check_alone(subject: str, fix: str, **options: object) -> None:
    """Refuse options that are for adapters, for a page about something else."""
    for name, value in options.items():
        if value:
            raise OptionError(f"{name} is for adapters, and this {subject}", fix=f"leave out {name}{fix}")
