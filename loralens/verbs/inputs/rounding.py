"""How a merge rounds: the default, and the roundings that go with an output."""

from typing import get_args

from loralens.choices import MergeBits, ModelDtype, RoundingMode
from loralens.core.messages import warn
from loralens.errors import OptionError
from loralens.verbs.inputs.choices import check_choice


def choose_rounding(rounding: RoundingMode | None, *, bits: MergeBits | None, dtype: ModelDtype) -> RoundingMode:
    """The rounding of a merge: the one that was asked for, or else the one that keeps the adapter.

    Raises
    ------
    OptionError
        The rounding does not exist, or does not go with the output.
    """
    check_choice("bits", bits, get_args(MergeBits))
    if bits is not None and dtype != "keep":
        raise OptionError("--bits and --dtype exclude each other", fix="give --bits for codes, or --dtype for floats")
    if rounding is None:
        # Almost no update reaches the next code, so rounding to the nearest would lose it.
        rounding = "stochastic" if bits == "keep" else "nearest"
    check_choice("rounding", rounding, get_args(RoundingMode))
    if bits != "keep":
        if bits is not None and rounding != "nearest":
            raise OptionError(
                f"--bits {bits} rounds to the nearest code, as its own software does", fix="leave out --rounding"
            )
        return rounding
    if rounding == "feedback":
        raise OptionError(
            "error feedback shrinks an update on a coarse grid: it keeps 0.1 to 0.4 of it",
            fix="use --rounding stochastic",
        )
    if rounding == "nearest":
        warn("rounding to the nearest code loses nearly all of an adapter", "leave out --rounding")
    return rounding
