"""The options of the verbs that write an adapter made of others."""

from os import PathLike
from typing import TypedDict

from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FloatType, TargetFormat
from loralens.verbs.outputs.rules import RankRules


class Writing(TypedDict, total=False):
    """How the result is written.

    Attributes
    ----------
    output : path, optional
        A folder, or a file with the suffix of the dialect; without it nothing is written.
    to : str, optional
        The dialect: ``peft``, ``kohya``, ``diffusers``, ``comfyui``, ``mlx``, ``loralib``, ``gguf`` or ``loralens-q``;
        by default that of the first adapter.
    base : path, optional
        The base model, which DoRA needs where its factors change, and GGUF.
    dtype : str, optional
        The dtype of all factors: ``f32``, ``bf16`` or ``f16``; by default they keep their own.
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Check everything, and write nothing.
    """

    output: str | PathLike[str] | None
    to: TargetFormat | None
    base: str | PathLike[str] | None
    dtype: FloatType | None
    allow_loss: bool
    overwrite: bool
    dry_run: bool


class WritingAndReading(Writing, Reading):
    """The options of a verb that reads adapters and writes one."""


class RulesWritingAndReading(RankRules, Writing, Reading):
    """The same of a verb that can also truncate what it writes."""


WRITING = Writing(
    output=None, to=None, base=None, dtype=None, allow_loss=False, overwrite=False, dry_run=False
)  # the defaults
