"""The dialect that is written, for commands that are not functions yet: see `loralens.verbs.outputs.form`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loralens.formats import QUANTISED as FEW
from loralens.formats import WriterOptions
from loralens.verbs.outputs import form
from loralens.verbs.outputs.form import INTEGER_TYPES as BITS
from loralens.verbs.outputs.target import Target

__all__ = ["BITS", "FEW", "Form"]


@dataclass(frozen=True, slots=True)
class Form(form.Form):
    """The same with the names that these commands use."""

    @property
    def given(self) -> WriterOptions:
        """What its writer is given."""
        return self.writer_options

    def check(
        self, source: str, output: Path, *, overwrite: bool, others: Mapping[str, str | None] | None = None
    ) -> None:
        """Refuse a target that is not apart from source, base and others, or cannot be written, before any work."""
        self.check_target(Target(output, overwrite), source, others=others)
