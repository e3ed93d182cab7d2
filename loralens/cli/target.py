"""Where an adapter goes, for commands that are not functions of their own yet: see `loralens.verbs.outputs.target`."""

from collections.abc import Mapping
from pathlib import Path

from loralens.cli.options import require_output as require
from loralens.core.adapter import Adapter
from loralens.verbs.inputs.choices import numpy_dtype
from loralens.verbs.outputs.form import check_known as check_known
from loralens.verbs.outputs.form import writer_options as of_format
from loralens.verbs.outputs.rounding import rounded
from loralens.verbs.outputs.target import Target

__all__ = ["check_known", "check_writable", "narrowed", "of_format", "refuse_inputs", "refuse_source", "require"]


def check_writable(output: Path, to: str, *, overwrite: bool) -> None:
    """Refuse a target to which a file of the dialect ``to`` cannot be written."""
    Target(output, overwrite).check_format(to)


def refuse_source(
    source: str, output: Path, *, base: str | None = None, others: Mapping[str, str | None] | None = None
) -> None:
    """Refuse a target that is not apart from the source and other inputs."""
    Target(output).check_source(source, base=base, others=others)


def refuse_inputs(output: Path, inputs: Mapping[str, str | None]) -> None:
    """Refuse a target that is not apart from the inputs."""
    Target(output).check_inputs(inputs)


def narrowed(adapter: Adapter, dtype: str | None) -> Adapter:
    """The adapter, its factors rounded once to ``dtype`` where one was given."""
    return rounded(adapter, numpy_dtype(dtype))
