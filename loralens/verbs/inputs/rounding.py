"""How a merge rounds: the default, and the roundings that go with an output."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import get_args

from loralens.choices import MergeBits, ModelDtype, RoundingMode
from loralens.core.few_bits.coded_weight import CodedWeight
from loralens.core.messages import warn
from loralens.errors import OptionError
from loralens.verbs.inputs.choices import check_choice
from loralens.verbs.inputs.input_moments import SweepInputs


def choose_rounding(
    rounding: RoundingMode | None, *, bits: MergeBits | None, dtype: ModelDtype, moments: str | PathLike[str] | None
) -> RoundingMode:
    """The rounding of a merge: the one that was asked for, or else the one that keeps the adapter.

    Raises
    ------
    OptionError
        The rounding does not exist, or does not go with the output or the moments.
    """
    check_choice("bits", bits, get_args(MergeBits))
    if bits is not None and dtype != "keep":
        raise OptionError("--bits and --dtype exclude each other", fix="give --bits for codes, or --dtype for floats")
    if rounding is None:
        # Almost no update reaches the next code, so rounding to the nearest would lose it.
        rounding = "stochastic" if bits == "keep" else "nearest"
    check_choice("rounding", rounding, get_args(RoundingMode))
    if bits != "keep":
        if rounding == "sweep":
            raise OptionError("a sweep moves codes, so --rounding sweep goes with --bits keep", fix="give --bits keep")
        if moments is not None:
            raise OptionError("--moments goes with --rounding sweep", fix="leave it out")
        if bits is not None and rounding != "nearest":
            raise OptionError(
                f"--bits {bits} rounds to the nearest code, as its own software does", fix="leave out --rounding"
            )
        return rounding
    if rounding == "feedback":
        raise OptionError(
            "error feedback shrinks an update on a coarse grid: it keeps 0.1 to 0.4 of it",
            fix="use --rounding stochastic, or sweep with --moments",
        )
    if rounding == "sweep" and moments is None:
        raise OptionError(
            "a sweep needs the second moments of the inputs",
            fix="give --moments FILE, which loralens calibrate --inputs writes",
        )
    if rounding != "sweep" and moments is not None:
        raise OptionError("--moments goes with --rounding sweep", fix="give both, or leave it out")
    if rounding == "nearest":
        warn("rounding to the nearest code loses nearly all of an adapter", "leave out --rounding")
    return rounding


def sweep_inputs(moments: str | PathLike[str] | None, coded: Mapping[str, CodedWeight]) -> SweepInputs | None:
    """The moments in a file for a sweep of these weights, with messages about them; None if no file was given."""
    if moments is None:
        return None
    sweep = SweepInputs(Path(moments))
    sweep.tell(list(coded.items()))
    return sweep
