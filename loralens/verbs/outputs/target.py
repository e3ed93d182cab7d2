"""The place where a verb writes an adapter, with checks that refuse a wrong one before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats import FORMATS
from loralens.formats.files.apart import adapter_inputs, check_apart
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.location import SUFFIXES, adapter_file, config_beside
from loralens.formats.files.writing import write_files
from loralens.formats.models.checkpoint import resolve_path
from loralens.verbs.inputs.adapters import AdapterSource

Inputs = Mapping[str, str | PathLike[str] | None]  # what an input is called ("the base") → where it is


@dataclass(frozen=True, slots=True)
class Target:
    """Where a verb writes, and whether it may: its options ``output``, ``overwrite`` and ``dry_run``.

    Attributes
    ----------
    output : Path or None
        A folder, or a file with the suffix of the dialect; None: nothing is written, and all checks pass.
    overwrite : bool
        Replace what is there.
    dry_run : bool
        Check everything, and write nothing.
    """

    output: Path | None
    overwrite: bool = False
    dry_run: bool = False

    @classmethod
    def of(cls, output: str | PathLike[str] | None, *, overwrite: bool = False, dry_run: bool = False) -> "Target":
        """The target that the options of a verb name."""
        return cls(None if output is None else Path(output), overwrite, dry_run)

    @property
    def written(self) -> Path | None:
        """The place that is written to; None in a dry run, and without an output."""
        return None if self.dry_run else self.output

    def check_source(
        self, source: AdapterSource, *, base: str | PathLike[str] | None = None, other_inputs: Inputs | None = None
    ) -> None:
        """Refuse a target that is the source, file or folder, or a file beside it that would share its configuration.

        Nor may it hold the source, the base or other inputs, or lie in one. A file may lie beside the source: a GGUF
        file says all of itself. An adapter that has been read has no place of its own.
        """
        if self.output is None:
            return
        if not isinstance(source, Adapter):
            self._check_apart_from_source(self.output, Path(source))
        self.check_inputs({"the base": base, **(other_inputs or {})})

    def _check_apart_from_source(self, output: Path, source: Path) -> None:
        file = adapter_file(source)
        if output.exists() and (output.samefile(file) or output.samefile(file.parent)):
            raise OptionError(
                f"{output} is where the source is", fix="choose another target: a source is never written over"
            )
        config = config_beside(file)
        # A GGUF file holds its configuration itself.
        shares = output.suffix in SUFFIXES and output.suffix != ".gguf"
        if config and shares and output.parent.is_dir() and output.parent.samefile(file.parent):
            raise OptionError(
                f"{output} would share {config.name} with the source, and one of them be read wrongly",
                fix="choose another folder",
            )
        check_apart(output, adapter_inputs(str(source)), within=output.suffix not in SUFFIXES)

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse a target that is one of the inputs, holds one or lies in one."""
        if self.output is None:
            return
        places = [
            (what, place) for what, path in inputs.items() if path for place in (Path(path), resolve_path(Path(path)))
        ]
        check_apart(self.output, places)

    def check_format(self, name: str) -> None:
        """Refuse a target to which a file of the dialect ``name`` cannot be written."""
        if self.output is None:
            return
        files = next(form.files for form in FORMATS if form.name == name)
        assert files
        write_files(Stored({}), self.output, files=files, overwrite=self.overwrite, dry_run=True)

    def write(self, stored: Stored, files: Files) -> None:
        """Write an adapter as it is stored in its dialect; in a dry run, only refuse what that would refuse."""
        if self.output is not None:
            write_files(stored, self.output, files=files, overwrite=self.overwrite, dry_run=self.dry_run)
