"""Repeating a merge tensor by tensor, as its certificate or the options say, to compare it with a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast, final, get_args

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.few_bits.coded_weight import CodedWeight
from loralens.core.messages import note
from loralens.errors import MismatchError, OptionError
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.models.model_location import resolve_path
from loralens.formats.records.merged import CERTIFICATE, MergeSettings, merge_settings
from loralens.linalg.device import Device
from loralens.merging.apply import TensorMerge, prepare_merge
from loralens.merging.low_bit.apply import CodeRounding, prepare_codes
from loralens.merging.low_bit.verify import code_verdicts
from loralens.merging.rounding import MergeRounding
from loralens.merging.verify import Verdict
from loralens.verbs.inputs.input_moments import SweepInputs
from loralens.verbs.inputs.merge_inputs import MergeInputs, record_path
from loralens.verbs.inputs.rounding import sweep_inputs


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
    moments : SweepInputs or None
    device : Device
    strength_only : bool
        Whether this was a sweep that cannot be repeated, because its moments are missing.
    """

    inputs: MergeInputs
    rounding: RoundingMode
    seed: int
    coded: Mapping[str, CodedWeight]
    moments: SweepInputs | None
    device: Device
    strength_only: bool = False

    @classmethod
    def of(
        cls,
        merged: Path,
        inputs: MergeInputs,
        *,
        rounding: RoundingMode | None,
        seed: int | None,
        moments: str | PathLike[str] | None,
        device: Device,
    ) -> Self:
        """The merge that gave ``merged``: options come first, then its certificate, then the defaults.

        Raises
        ------
        MismatchError
            The moments are not those of the sweep.
        OptionError
            Moments without a sweep.
        """
        settings = settings_of(merged)
        number = seed if seed is not None else settings.seed or 0
        if not inputs.coded:
            if moments is not None:
                raise OptionError("--moments goes with a base of codes", fix="leave it out")
            # A certificate that names a sweep is not that of a merge into floats.
            stated = "nearest" if settings.rounding in {None, "sweep"} else settings.rounding
            return cls(inputs, rounding or cast("RoundingMode", stated), number, {}, None, device)
        mode = rounding or cast("RoundingMode", settings.rounding or "stochastic")
        sweep = sweep_inputs(moments, inputs.coded)
        if sweep and settings.moments is not None and sweep.digest != settings.moments:
            raise MismatchError(
                f"{moments}: these are not the moments with which {merged} was merged",
                fix="give the file that the merge was given, or leave --moments out",
            )
        strength_only = mode == "sweep" and sweep is None
        if strength_only:
            note("the codes of a sweep cannot be repeated without --moments: their strength alone is compared")
            mode = "stochastic"
        return cls(inputs, mode, number, open_checkpoint(merged).coded, sweep, device, strength_only)

    def prepare(self, key: str, dtype: np.dtype[Any]) -> TensorMerge:
        """The merge of one tensor of floats, in this dtype."""
        mode: RoundingMode = "nearest" if self.rounding == "sweep" else self.rounding
        rounding = MergeRounding(mode, self.seed, key)
        return prepare_merge(self.inputs.plan.tensors[key], dtype=dtype, rounding=rounding, device=self.device)

    def verdicts_on_codes(self, key: str) -> list[Verdict]:
        """The verdicts on the modules of one weight of codes."""
        weight = self.inputs.coded[key]
        moments = self.moments.of(key, weight.shape[1]) if self.moments else None
        mode: RoundingMode = "stochastic" if self.rounding == "sweep" and moments is None else self.rounding
        rounding = CodeRounding(mode, self.seed, key, moments)
        merge = prepare_codes(self.inputs.plan.tensors[key], weight, rounding, device=self.device)
        return code_verdicts(merge, self.coded.get(key), strength_only=self.strength_only)


def settings_of(merged: Path) -> MergeSettings:
    """How a merged model was made, by the certificate in its folder or beside it; damaged words count as unknown."""
    root = resolve_path(merged)
    settings = merge_settings(record_path(root, CERTIFICATE, folder=root.is_dir()))
    return settings if settings.rounding in get_args(RoundingMode) else settings._replace(rounding=None)
