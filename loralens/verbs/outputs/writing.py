"""The options of verbs that write an adapter made of others, such as `combine` and `drop`."""

from os import PathLike
from typing import TypedDict

from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, FloatType, TargetFormat
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import check_choice
from loralens.verbs.outputs.rules import RankRules


# total=False in all of these: an option that is not given has the default of the function that takes it.
class Writing(TypedDict, total=False):
    """The options that say how the result is written.

    Attributes
    ----------
    output : path, optional
        A folder, or a file with the suffix of the dialect. Without it nothing is written.
    to : str, optional
        The dialect: ``peft``, ``kohya``, ``diffusers``, ``comfyui``, ``mlx``, ``loralib`` or ``gguf``.
        The default is that of the first adapter.
    base : path, optional
        The base model. It is needed to write GGUF, and to change the factors of a DoRA adapter.
    dtype : str, optional
        The dtype of all factors: ``f32``, ``bf16`` or ``f16``. By default every factor keeps its own.
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


def check_writing(to: str | None, dtype: str | None) -> None:
    """Refuse an unknown dialect or dtype before anything is read."""
    check_choice("to", to, TARGET_FORMATS)
    check_choice("dtype", dtype, FLOAT_TYPES)


class WritingAndReading(Writing, Reading):
    """The options of a verb that reads adapters and writes one."""


class RulesWritingAndReading(RankRules, Writing, Reading):
    """The options of a verb that reads adapters, combines them into one, and can truncate it."""
