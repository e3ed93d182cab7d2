"""The place where a verb writes, with checks that refuse a wrong one before any work, and the sentence about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.atomic import check_apart
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.location import SUFFIXES, AdapterPaths, find_adapter
from loralens.formats.files.writing import write_files
from loralens.formats.models.model_files import resolve_path
from loralens.tables.result import Tabular
from loralens.verbs.shared.adapters import AdapterSource

Inputs = Mapping[str, str | PathLike[str] | None]  # what an input is called ("the base") → where it is


@dataclass(frozen=True, slots=True)
class Target:
    """The options ``output``, ``overwrite`` and ``dry_run`` of a verb that writes.

    Attributes
    ----------
    output : Path or None
        A folder, or a file with the suffix of the dialect. If it is None, nothing is written and all checks pass.
    """

    output: Path | None
    overwrite: bool = False
    dry_run: bool = False

    @classmethod
    def of(cls, output: str | PathLike[str] | None, *, overwrite: bool = False, dry_run: bool = False) -> "Target":
        """The target that the options of a verb describe."""
        return cls(None if output is None else Path(output), overwrite, dry_run)

    @property
    def written(self) -> Path | None:
        """The place that is written to; None in a dry run and without an output."""
        return None if self.dry_run else self.output

    @property
    def is_wanted(self) -> bool:
        """Whether the caller asked for a file, if only in a dry run. Python may ask for the resulting object alone."""
        return self.output is not None or self.dry_run

    def sentence(self, what: str) -> str:
        """``wrote OUT: what``, or ``would write OUT: what`` in a dry run."""
        return f"{'wrote' if self.written else 'would write'} {self.output or ''}".rstrip() + f": {what}"

    def sentences(self, what: str) -> list[str]:
        """The sentence about the file, if the caller asked for one."""
        return [self.sentence(what)] if self.is_wanted else []

    def conclusion(self, what: str) -> str:
        """``Wrote OUT: what.``, or ``Would write OUT: what.`` in a dry run; ``what.`` alone if no file is wanted."""
        if not self.is_wanted:
            return f"{what}."
        sentence = self.sentence(what)
        return f"{sentence[0].upper()}{sentence[1:]}."

    def check_source(
        self, source: AdapterSource, *, base: str | PathLike[str] | None = None, other_inputs: Inputs | None = None
    ) -> None:
        """Refuse a target that overlaps with the source, the base or another input.

        The target may be none of them, contain none and lie in none. A file beside the source is allowed, unless both
        would share one configuration file. A source that is an `Adapter` has no place, so only the others are checked.

        Raises
        ------
        OptionError
            The message names the input and how it overlaps with the target.
        """
        if self.output is None:
            return
        # An object may have come from a file, but from which one is not known here.
        if not isinstance(source, Adapter):
            self._check_apart_from_source(self.output, find_adapter(source))
        self.check_inputs({"the base": base, **(other_inputs or {})})

    def _check_apart_from_source(self, output: Path, found: AdapterPaths) -> None:
        file, config = found.file, found.config
        # Refused even with --overwrite, since the result lacks what was cut or rounded. samefile() follows links.
        if output.exists() and (output.samefile(file) or output.samefile(file.parent)):
            raise OptionError(
                f"{output} is where the source is", fix="choose another target: a source is never written over"
            )
        # Readers take α and r from adapter_config.json beside the weights. With two files of weights in one folder the
        # configuration can belong to only one of them. A GGUF file holds its configuration itself.
        shares = output.suffix in SUFFIXES and output.suffix != ".gguf"
        if config and shares and output.parent.is_dir() and output.parent.samefile(file.parent):
            raise OptionError(
                f"{output} would share {config.name} with the source, and one of them would be read wrongly",
                fix="choose another folder",
            )
        # A single file replaces nothing in the source's folder, so it may lie there; a folder has to lie outside.
        check_apart(output, found.inputs, within=output.suffix not in SUFFIXES)

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse a target that is one of the inputs, contains one or lies in one."""
        if self.output is None:
            return
        # A Hub id is a path in the cache once it is resolved. The text itself is checked as well, because a folder of
        # that name may exist.
        places = [
            (what, place) for what, path in inputs.items() if path for place in (Path(path), resolve_path(Path(path)))
        ]
        check_apart(self.output, places)

    def check_format(self, name: str) -> None:
        """Refuse a target to which a file of the dialect ``name`` cannot be written."""
        if self.output is None:
            return
        # A dry run with no tensors makes every check of the real writing, and needs no adapter yet.
        files = next(form.files for form in FORMATS if form.name == name)
        assert files
        write_files(Stored({}), self.output, files=files, overwrite=self.overwrite, dry_run=True)

    def write(self, stored: Stored, files: Files) -> None:
        """Write an adapter in its stored form; a dry run makes the same checks and raises the same errors."""
        if self.output is not None:
            write_files(stored, self.output, files=files, overwrite=self.overwrite, dry_run=self.dry_run)


class Written(Tabular):
    """A result of which something was written, or would be."""

    __slots__ = ()

    target: Target

    @property
    def output(self) -> Path | None:
        """The place that was written to; None in a dry run and without an output."""
        return self.target.written
