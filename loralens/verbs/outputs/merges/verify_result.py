"""The result of a comparison of a merged model with an adapter: its sentences and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from loralens.choices import RoundingMode
from loralens.core.names import some
from loralens.merging.verify import HIGH, LOW, Outcome, Verdict, relation
from loralens.tables.numbers import count, fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.merges.losses import DAMAGED

# The cosines from which the directions of two updates are called the same, and similar. Between step 750 of a run and
# its steps 400 and 100 (docs/merge.md) the cosine is 0.99 and 0.70, and between two runs on one base 0.01. Chance alone
# gives 1/√(out·in), such as 0.003.
SAME = 0.9
RELATED = 0.3

OUTCOMES: tuple[Outcome, ...] = ("exact", "rounded", "partial", "absent")  # best first
# The outcomes with the answer yes, and exit code 0. A tool that rounds in another way has merged the adapter too.
GOOD: tuple[Outcome, ...] = ("exact", "rounded")

# The predicted gain is for machines: people read it in the sentence about a module whose gain differs from it.
COLUMNS: tuple[Column[Verdict], ...] = (
    Column("name", lambda row: row.module, "module", align="left", priority=ALWAYS),
    Column("verdict", lambda row: row.outcome, "verdict", align="left", priority=ALWAYS),
    Column("gain", lambda row: row.gain, "gain", fixed(".4f"), priority=ALWAYS),
    Column("predicted_gain", lambda row: row.predicted),
    Column("relative_error", lambda row: row.error, "error", number, priority=5),
    Column("different", lambda row: row.different, "entries differ", "{:,}".format, priority=4),
)


@dataclass(frozen=True, slots=True, repr=False)
class VerifyResult(Tabular):
    """Whether a merged model contains an adapter.

    Attributes
    ----------
    merged, base : str
        The paths of the models.
    rounding : str
        The rounding with which the merge was repeated.
    modules : sequence of Verdict
        One for every module of the adapter.
    others_changed : sequence of str
        The tensors that the adapter does not change, but that differ from those of the base.
    adapters : sequence of str
        The adapters, with their weights where these are not 1.
    in_codes : bool
        Whether the merge moved the codes of a low-bit base.
    """

    merged: str
    base: str
    rounding: RoundingMode
    modules: Sequence[Verdict]
    others_changed: Sequence[str]
    adapters: Sequence[str]
    in_codes: bool = False

    @property
    def verdict(self) -> Outcome:
        """The outcome of the worst module; ``exact`` if the adapter has no modules."""
        return max((verdict.outcome for verdict in self.modules), key=OUTCOMES.index, default="exact")

    @property
    def answer(self) -> bool:
        """Whether the model contains every module at full strength."""
        return self.verdict in GOOD

    def __repr__(self) -> str:
        return f"VerifyResult({self.verdict}, {len(self.modules)} modules)"

    @property
    def _bad(self) -> list[Verdict]:
        return [verdict for verdict in self.modules if verdict.outcome not in GOOD]

    def conclusion(self) -> list[str]:
        """Whether the model holds the adapter; if not, what it holds instead."""
        adapter, bad = " + ".join(self.adapters), self._bad
        if not self.modules:
            return [f"Nothing was compared: {adapter} changes no weight of {self.base}."]
        if self.verdict == "exact":
            return [self._exact_sentence(adapter)]
        if not bad:
            return [f"{self.merged} holds {adapter} at full strength, with another rounding than that of this merge."]
        of, names = count(len(self.modules), "module"), some(verdict.module for verdict in bad)
        # Names tell something only if other modules are better.
        extent = "" if len(bad) == len(self.modules) else f" in {len(bad)} of {of} ({names})"
        return [f"{self.merged} does not hold {adapter}{extent}{self._content_text(bad)}.", *self._absence(bad)]

    def _exact_sentence(self, adapter: str) -> str:
        """That every bit is as the merge writes it; and what rounding did to the update, if it did much."""
        measured = [verdict for verdict in self.modules if verdict.norm]
        energy = sum(verdict.norm**2 for verdict in measured) or 1.0
        error = sqrt(sum((verdict.error * verdict.norm) ** 2 for verdict in measured) / energy)
        # Codes of a few bits and narrow dtypes take much of an update, or add noise; "exactly" would hide that.
        if not error > DAMAGED:
            return f"{self.merged} holds {adapter} exactly."
        gain = sum(verdict.gain * verdict.norm**2 for verdict in measured) / energy
        lost = f"a gain of {fixed('.3f')(gain)}, and adds an error of {number(error)} times the update"
        return f"{self.merged} is the merge of {adapter}, bit for bit; rounding leaves {lost}."

    def _absence(self, bad: Sequence[Verdict]) -> list[str]:
        """The modules in which the adapter is absent."""
        absent = [verdict.module for verdict in bad if verdict.outcome == "absent"]
        if not absent:
            return []
        number = count(len(absent), "module")
        every = len(absent) == len(self.modules) > 1
        return [f"It is absent in all {number}." if every else f"It is absent in {number} ({some(absent)})."]

    @property
    def _taker(self) -> str:
        """What took an update away although the merge is as it should be."""
        if not self.in_codes:
            return "rounding to the dtype of the model"
        return "rounding to the nearest code" if self.rounding == "nearest" else "the limited range of the codes"

    def _content_text(self, bad: Sequence[Verdict]) -> str:
        """What these modules hold in place of the adapter, as the end of a sentence."""
        if all(verdict.by_rounding for verdict in bad):
            return f": {self._taker} takes the update"
        # The base itself moves by exactly 0, and what is left is exactly D.
        if all(verdict.norm and verdict.gain == 0 and verdict.error == 1 for verdict in bad):
            return ": the weights are those of the base"
        likeness = relation(bad)
        # Where a weight is replaced or has another shape, there are no directions to compare.
        if likeness is None:
            return ": the weights are others"
        part = number(abs(likeness.gain), 2)
        strength = "full strength" if part == "1" else f"{part} of the strength"
        cosine = fixed(".2f")(likeness.cosine)
        if likeness.cosine >= SAME:
            return f" as it is, but the same directions at {strength}: another weight, or another checkpoint of its run"
        if likeness.cosine <= -SAME:
            return f", but the same directions with the opposite sign at {strength}"
        if likeness.cosine >= RELATED:
            like = "as another checkpoint of its run has"
            return f" as it is, but similar directions (cosine {cosine}) at {strength}, {like}"
        return f": what was added to the base has other directions (cosine {cosine})"

    def _title(self) -> str:
        counts = ", ".join(
            f"{number} {outcome}"
            for outcome in OUTCOMES
            if (number := sum(verdict.outcome == outcome for verdict in self.modules))
        )
        return f"{count(len(self.modules), 'module')}: {counts}"

    def tables(self) -> list[Table[Verdict]]:
        """The modules, with the worst first."""
        # People look for what is wrong. Programs get the natural order of `listing`.
        worst_first = sorted(self.modules, key=lambda verdict: -OUTCOMES.index(verdict.outcome))
        return [
            Table(
                self._title(),
                COLUMNS,
                worst_first,
                uneventful=lambda verdict: verdict.outcome == "exact",
                sum_up=lambda exact: f"{count(exact, 'module')} in which every bit is as this merge writes it",
            )
        ]

    def listing(self) -> list[Table[Verdict]]:
        """The modules in natural order."""
        return [Table(self._title(), COLUMNS, self.modules)]

    def sentences(self) -> list[str]:
        """The reasons for the answer no as far as the numbers show them, and the other tensors that changed."""
        sentences: list[str] = []
        bad = self._bad
        # Two causes have two remedies: the rounding of the merge itself, and a merge other than the stated one. The
        # conclusion says whether the strength differs.
        by_rounding = [verdict.module for verdict in bad if verdict.by_rounding]
        unexplained = [
            verdict
            for verdict in bad
            if not verdict.by_rounding and verdict.outcome == "partial" and LOW <= verdict.gain <= HIGH
        ]
        if by_rounding:
            way = "merge with --dtype f32"
            if self.in_codes:
                way = "leave out --rounding nearest" if self.rounding == "nearest" else "write floats with --dtype bf16"
            sentences.append(
                f"note: in {len(by_rounding)} of them every bit is what this merge writes, and rounding takes the "
                f"rest: {way}, or serve the adapter unmerged: {some(by_rounding)}"
            )
        if unexplained:
            first = unexplained[0]
            gain = fixed(".4f")(first.gain)
            sentences.append(
                f"note: {first.module} has a gain of {gain}, where {self.rounding} rounding predicts "
                f"{first.predicted:.4f}: it was rounded otherwise, or changed since"
            )
        changed = len(self.others_changed)
        if changed:
            are = "is not that" if changed == 1 else "are not those"
            what = f"{count(changed, 'tensor')} that the adapter does not touch {are} of the base"
            sentences.append(f"note: {what}: {some(self.others_changed)}")
        return sentences

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "merged": self.merged,
            "base": self.base,
            "modules": self.listing()[0].records(),
            "others_changed": list(self.others_changed),
            "verdict": self.verdict,
        }
