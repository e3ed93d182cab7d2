"""The place where a verb writes, with checks that refuse a wrong one before any work, and the sentence about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, FloatType, TargetFormat
from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.exports import Options
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.atomic import check_apart
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.location import SUFFIXES, AdapterPaths, find_adapter
from loralens.formats.files.writing import write_files
from loralens.formats.models.model_files import resolve_path
from loralens.tables.result import Tabular
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.option_values import check_choice

Inputs = Mapping[str, str | PathLike[str] | None]  # what an input is called ("the base") → where it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Options):
    """Writing: the place, and what happens to what is there.

    Parameters
    ----------
    output : path, optional
        The file or folder to write; of several adapters, the folder for all of them.

        A folder, or a file with the suffix of the dialect. Without it nothing is written, and all checks pass.
    overwrite : bool
        Replace what is already at the output path.
    dry_run : bool
        Check everything, report what would be done, write nothing.
    """

    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        # A verb may be given the path as text.
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))

    @property
    def written(self) -> Path | None:
        """The place that is written to; None in a dry run and without an output."""
        return None if self.dry_run else self.output

    @property
    def is_wanted(self) -> bool:
        """Whether the caller asked for a file, if only in a dry run. Python may ask for the resulting object alone."""
        return self.output is not None or self.dry_run

    def conclusion(self, what: str) -> str:
        """``Wrote OUT: what.``, or ``Would write OUT: what.`` in a dry run; ``what.`` alone if no file is wanted."""
        if not self.is_wanted:
            return f"{what}."
        return f"{'Wrote' if self.written else 'Would write'} {self.output or ''}".rstrip() + f": {what}."

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTarget(Target):
    """Writing: where the adapter is written, and in which form.

    Parameters
    ----------
    to : str, optional
        The dialect to write. [default: the dialect of the source]
    base : path, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Needed for DoRA, and for
        GGUF.
    dtype : str, optional
        Round all factors to this dtype. [default: the dtypes of the source]
    """

    to: TargetFormat | None = None
    base: str | PathLike[str] | None = None
    dtype: FloatType | None = None

    def check(self) -> None:
        """Refuse an unknown dialect or dtype before anything is read."""
        check_choice("to", self.to, TARGET_FORMATS)
        check_choice("dtype", self.dtype, FLOAT_TYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing(AdapterTarget):
    """Writing: where the adapter is written, and in which form; the error of rounding it is limited.

    Parameters
    ----------
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    """

    allow_loss: bool = False


class Written(Tabular):
    """A result of which something was written, or would be."""

    __slots__ = ()

    target: Target

    @property
    def output(self) -> Path | None:
        """The place that was written to; None in a dry run and without an output."""
        return self.target.written
