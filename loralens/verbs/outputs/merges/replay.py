"""Repeating a merge tensor by tensor, as its certificate or the options say, to compare it with a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast, final, get_args

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.few_bits.coded_weight import CodedWeight
from loralens.errors import OptionError
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.models.model_location import resolve_path
from loralens.formats.records.merged import CERTIFICATE, MergeSettings, merge_settings
from loralens.linalg.device import Device
from loralens.merging.apply import TensorMerge, prepare_merge
from loralens.merging.low_bit.apply import CodeRounding, prepare_codes
from loralens.merging.low_bit.verify import code_verdicts
from loralens.merging.rounding import MergeRounding
from loralens.merging.verify import Verdict
from loralens.verbs.inputs.merge_inputs import MergeInputs, record_path


@final
@dataclass(frozen=True, slots=True)
class Replay:
    """A merge that is repeated.

    Attributes
    ----------
    inputs : MergeInputs
    rounding : str
    seed : int
    coded : mapping of str to CodedWeight
        The low-bit weights of the model in question.
    device : Device
    """

    inputs: MergeInputs
    rounding: RoundingMode
    seed: int
    coded: Mapping[str, CodedWeight]
    device: Device

    @classmethod
    def of(
        cls, merged: Path, inputs: MergeInputs, *, rounding: RoundingMode | None, seed: int | None, device: Device
    ) -> Self:
        """The merge that gave ``merged``: options come first, then its certificate, then the defaults."""
        settings = settings_of(merged)
        number = seed if seed is not None else settings.seed or 0
        default = "stochastic" if inputs.coded else "nearest"
        mode = rounding or cast("RoundingMode", settings.rounding or default)
        return cls(inputs, mode, number, open_checkpoint(merged).coded if inputs.coded else {}, device)

    def prepare(self, key: str, dtype: np.dtype[Any]) -> TensorMerge:
        """The merge of one tensor of floats, in this dtype."""
        rounding = MergeRounding(self.rounding, self.seed, key)
        return prepare_merge(self.inputs.plan.tensors[key], dtype=dtype, rounding=rounding, device=self.device)

    def verdicts_on_codes(self, key: str) -> list[Verdict]:
        """The verdicts on the modules of one weight of codes."""
        weight = self.inputs.coded[key]
        rounding = CodeRounding(self.rounding, self.seed, key)
        merge = prepare_codes(self.inputs.plan.tensors[key], weight, rounding, device=self.device)
        return code_verdicts(merge, self.coded.get(key))


def settings_of(merged: Path) -> MergeSettings:
    """How a merged model was made, by the certificate in its folder or beside it; damaged words count as unknown.

    Raises
    ------
    OptionError
        It was made by a sweep.
    """
    root = resolve_path(merged)
    settings = merge_settings(record_path(root, CERTIFICATE, folder=root.is_dir()))
    if settings.rounding == "sweep":
        raise OptionError(
            f"{merged}: its codes were moved by a sweep, which loralens no longer repeats",
            fix="restore its base by its undo file, or use the last commit that repeats a sweep, 31ab7467",
        )
    return settings if settings.rounding in get_args(RoundingMode) else settings._replace(rounding=None)
