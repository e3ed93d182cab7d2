"""Rank that a module cannot use or does not use."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.groups import mean_effective_rank
from loralens.tables.numbers import whole_percent

CODES = {
    "rank-impossible": "The rank is larger than the number of rows or columns of the weight, so that some directions "
    "can never have an effect.",
    "rank-unused": "Nearly all of the energy lies in far fewer directions than the rank allows. A smaller file, and "
    "cheaper products, would have the same effect.",
}
ENERGY = 0.99  # the share of Σσ² that a truncation must keep
LEAST = 0.3  # the share of the parameters that truncation must save to be worth a note


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report ranks above that of the weight, and what ``compress --energy 0.99`` would save."""
    for name, reading in exam.readings.items():
        rank, most = reading.module.rank, min(reading.module.shape)
        if rank > most:
            out, in_ = reading.module.shape
            cut = exam.compress("cut", "--energy 1")
            fix = f"train it with r = {most}; `{cut}` drops them"
            yield Diagnosis("note", "rank-impossible", f"r = {rank} for a weight of {out} × {in_}", fix, name)
    before = after = 0
    for reading in exam.readings.values():
        if reading.A is None or reading.spectrum is None:
            continue
        stored = reading.module.parameters
        before += stored
        # A module that is 0 keeps one direction. A fused projection is stored as blocks, and may grow when truncated.
        after += min(stored, max(1, reading.spectrum.energy_rank(ENERGY)) * sum(reading.module.shape))
    # The whole adapter counts, because that is what the suggested command makes smaller.
    saved = 1 - after / before if before else 0.0
    ranks = [one.module.rank for one in exam.pairs.values()]
    if saved < LEAST or not ranks:
        return
    mean = mean_effective_rank(one.spectrum for one in exam.pairs.values() if one.spectrum)
    ranks_text = f"r={ranks[0]}" if len(set(ranks)) == 1 else f"r={min(ranks)}–{max(ranks)}"
    evidence = (
        f"{ranks_text}, effective rank {mean:.1f} on average: {ENERGY} of the energy needs {whole_percent(1 - saved)} "
        "of the parameters"
    )
    fix = f"`{exam.compress('e99', f'--energy {ENERGY}')}`"
    # The file has a header and other tensors too, so that its share is another one than that of the parameters.
    if exam.saving and (share := exam.saving(exam, ENERGY)) is not None:
        fix += f" saves {whole_percent(share)} of the file"
    yield Diagnosis("note", "rank-unused", evidence, fix)
