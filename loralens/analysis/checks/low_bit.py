"""What a merge into the codes of a low-bit base is expected to do to an adapter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, final

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.core.messages import quote_word
from loralens.tables.numbers import count, number, percent

if TYPE_CHECKING:  # examinations hold a prediction
    from loralens.analysis.checks.examination import Examination

CODES = {
    "codes-merge": "What `loralens merge --bits keep` is expected to do: the strength that arrives in the codes of the "
    "base, the noise relative to the update, and the codes that change.",
    "codes-weak": "The update is weak compared with a step of the codes of the base: its noise in the merged model is "
    "more than 15 times the update.",
}
# Noise relative to the update. At 3 to 8, adapters kept 85 % and more of the loss that they gain; at 22 they did not.
NOISY = 15.0
FIX = (
    "serve the adapter unmerged (for llama.cpp: `loralens convert --to gguf`), or merge in floats "
    "(`loralens merge --dtype bf16`)"
)


@final
@dataclass(frozen=True, slots=True)
class CodesPrediction:
    """The expected effect of a merge into codes, for all modules together and for every module.

    Attributes
    ----------
    layouts : str
        The layouts of the weights.
    gain, noise : float
        The expected gain, and the noise of one stochastic rounding relative to the update.
    own_error : float or None
        The expected error in the input directions of the update, relative to it; None if an update is not a pair.
    changed, clipped : float
        The shares of codes that are expected to change, and to stop at the end of their range.
    mean_move : float
        The mean move of a code that the adapter requires, in steps.
    noises : mapping of str to float
        The noise of every module.
    base : str
        The base as the user wrote it, for a suggested command.
    """

    layouts: str
    gain: float
    noise: float
    own_error: float | None
    changed: float
    clipped: float
    mean_move: float
    noises: Mapping[str, float] = field(default_factory=dict)
    base: str = ""


def look(exam: "Examination") -> Iterator[Diagnosis]:
    """One diagnosis for the adapter, and one for every module that is too weak, the weakest first."""
    expected = exam.codes
    if expected is None:
        return
    own = expected.own_error
    yield Diagnosis(
        "note",
        "codes-merge",
        f"merged into the codes of the base ({expected.layouts}) it arrives with a gain of {expected.gain:.3f}"
        f"{'' if own is None else f' and an error of {number(own)} in its own directions'}; it asks for "
        f"{number(expected.mean_move)} steps of a code on average, so {percent(expected.changed)} of the codes change, "
        f"{percent(expected.clipped)} are clipped, and the noise is {number(expected.noise)} times the update "
        f"({count(len(expected.noises), 'module')})",
        _merge_command(exam, expected),
    )
    for name, noise in sorted(expected.noises.items(), key=lambda item: -item[1]):
        if noise > NOISY:
            evidence = f"merged into the codes of the base, the noise is {noise:.0f} times the update"
            yield Diagnosis("warning", "codes-weak", evidence, FIX, name)


def _merge_command(exam: "Examination", expected: CodesPrediction) -> str:
    """The command that merges the adapter into the codes; empty if its noise would be too large."""
    if expected.noise > NOISY or not expected.base:
        return ""
    base = PurePath(expected.base)
    # A base that is one file becomes one file, whose suffix decides the container.
    suffix = base.suffix if base.suffix in (".gguf", ".safetensors") else ""
    target = quote_word(str(PurePath(exam.path).with_suffix("").name or "adapter") + f"-merged{suffix}")
    command = exam.command("merge", "--base", quote_word(expected.base), "--bits", "keep", "-o", target)
    return f"`{command}` merges it into the codes"
