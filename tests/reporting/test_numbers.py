"""Every number and label of a report beside one that is computed here: dense, in float64, by definition.

Two adapters with a base, and three without, are written to disk and reported on as a user would. Nothing of the package
computes an expected value; the package only says what a page would show.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.core import Scaling
from loralens.tables import percent, signed, size
from tests import reference
from tests.bases import single
from tests.reporting.adapters import dense_of
from tests.reporting.reading import (
    HeatMap,
    Report,
    Slider,
    cells,
    cells_of,
    lines_of,
    number,
    numbers,
    numbers_behind,
    parts_of,
    picture,
    rows,
    sorted_by,
    tables,
    texts,
    tips_of,
)

KINDS = ("o_proj", "q_proj", "v_proj")
BLOCKS = 3
SHAPES = {"q_proj": (40, 32), "v_proj": (24, 32), "o_proj": (32, 40)}
NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(BLOCKS) for kind in KINDS]
CONFLICT = "model.layers.0.self_attn.q_proj"  # the two adapters are opposed here
AGREE = "model.layers.1.self_attn.v_proj"  # alike here
ALONG = "model.layers.1.self_attn.q_proj"  # and here the first lies along the strongest directions of the base
RANK = 6


def kind_of(name: str) -> str:
    return name.rsplit(".", 1)[1]


def block_of(name: str) -> int:
    return int(name.split(".")[2])


def pair(D: np.ndarray, rank: int, scale: float) -> LowRank:
    """The best pair of a dense update, its factors in float32."""
    U, s, Vh = np.linalg.svd(D / scale, full_matrices=False)
    B, A = U[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * Vh[:rank]
    return LowRank(
        B.astype(np.float32), A.astype(np.float32), scale, scaling=Scaling("alpha/r", int(scale * rank), rank)
    )


def graded(rng: np.random.Generator, shape: tuple[int, int], fall: float) -> np.ndarray:
    """An update whose singular values fall by a factor each."""
    U = np.linalg.qr(rng.standard_normal((shape[0], RANK)))[0]
    V = np.linalg.qr(rng.standard_normal((shape[1], RANK)))[0]
    return (U * fall ** np.arange(RANK)) @ V.T


@dataclass(frozen=True)
class Held:
    """What is on disk, and its dense updates: label → module → ΔW in float64."""

    report: Report
    dense: dict[str, dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    files: dict[str, Path]

    @property
    def energy(self) -> dict[str, dict[str, float]]:
        """label → module → ‖ΔW‖²."""
        return {label: {n: math.fsum((D * D).ravel()) for n, D in one.items()} for label, one in self.dense.items()}

    def whole(self, label: str) -> float:
        """‖ΔW‖² of the whole adapter."""
        return math.fsum(self.energy[label].values())

    def s(self, label: str, name: str) -> np.ndarray:
        return np.linalg.svd(self.dense[label][name], compute_uv=False)[:RANK]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Two adapters: opposed in one block and kind, alike in another, unrelated elsewhere; one is not even in norm."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(7)
    first, second = {}, {}
    for name in NAMES:
        shape = SHAPES[kind_of(name)]
        strength = {"q_proj": 4.0, "v_proj": 1.0, "o_proj": 0.3}[kind_of(name)] * (1 + block_of(name))
        D = strength * graded(rng, shape, 0.35)
        other = 0.8 * strength * graded(rng, shape, 0.7)
        if name == CONFLICT:
            other = -0.5 * D + 0.02 * other
        if name == AGREE:
            other = 0.7 * D + 0.1 * other
        first[name], second[name] = pair(D, RANK, 2.0), pair(other, RANK, 2.0)
    weights = {}
    for name in NAMES:
        W = rng.standard_normal(SHAPES[kind_of(name)])
        if name == ALONG:
            U, _, Vh = np.linalg.svd(first[name].B.astype(np.float64) @ first[name].A.astype(np.float64))
            W += 6 * U[:, :RANK] @ Vh[:RANK]
        weights[name] = W.astype(ml_dtypes.bfloat16)
    base = single(folder / "base", {f"{name}.weight": W for name, W in weights.items()})
    files, dense = {}, {}
    for label, modules in (("first", first), ("second", second)):
        adapter = loralens.Adapter(modules=modules, base_model="tiny/base")
        files[label] = folder / label
        loralens.save(adapter, files[label])
        dense[label] = dense_of(adapter)
    report = loralens.report(*files.values(), base=base, intruders=True).document
    return Held(report, dense, {name: W.astype(np.float64) for name, W in weights.items()}, files)


LABELS = ("first", "second")
PLACE = {label: i for i, label in enumerate(LABELS)}


# ---------------------------------------------------------------- spectra


@pytest.mark.parametrize("label", LABELS)
def test_modules_in_numbers(two: Held, label: str) -> None:
    (table,) = [one for one in tables(two.report, "modules", "") if one.table.title == label]
    printed, behind = rows(table), sorted_by(table)
    assert list(printed) == NAMES
    for name in NAMES:
        s, shape = two.s(label, name), SHAPES[kind_of(name)]
        said, values = printed[name], behind[name]
        assert said["out × in"] == f"{shape[0]} × {shape[1]}"
        assert (said["r"], said["scale"]) == (str(RANK), "2")
        assert values["‖ΔW‖F"] == pytest.approx(reference.frobenius(s), rel=1e-9)
        assert values["σ₁"] == pytest.approx(s[0], rel=1e-9)
        assert values["stable"] == pytest.approx(reference.stable_rank(s), rel=1e-9)
        assert values["effective"] == pytest.approx(reference.effective_rank(s), rel=1e-9)
        assert (values["E90"], values["E99"]) == (reference.energy_rank(s, 0.9), reference.energy_rank(s, 0.99))
        assert values["energy"] == pytest.approx(two.energy[label][name] / two.whole(label), rel=1e-9)
        for heading in ("‖ΔW‖F", "σ₁", "energy"):  # what is printed is what it is sorted by, to the digits printed
            assert number(said[heading]) == pytest.approx(values[heading], rel=6e-3)


@pytest.mark.parametrize("label", LABELS)
def test_kinds_and_blocks(two: Held, label: str) -> None:
    for title, key_of, keys in (
        ("By kind", kind_of, set(KINDS)),
        ("By block", lambda name: str(block_of(name)), {str(b) for b in range(BLOCKS)}),
    ):
        behind = sorted_by(tables(two.report, "spectra", title)[PLACE[label]])
        printed = rows(tables(two.report, "spectra", title)[PLACE[label]])
        assert set(printed) == keys
        for key in keys:
            members = [name for name in NAMES if key_of(name) == key]
            energy = math.fsum(two.energy[label][name] for name in members)
            ranks = [reference.effective_rank(two.s(label, name)) for name in members]
            assert behind[key]["modules"] == len(members)
            assert behind[key]["‖ΔW‖F"] == pytest.approx(math.sqrt(energy), rel=1e-9)
            assert behind[key]["energy"] == pytest.approx(energy / two.whole(label), rel=1e-9)
            assert behind[key]["effective"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-9)
            assert printed[key]["energy"] == f"{100 * (energy / two.whole(label)):.1f} %"


def fewest_with_half(shares: list[float]) -> int:
    """The fewest modules that hold half, by trying all sets of each size."""
    for count in range(1, len(shares) + 1):
        if max(math.fsum(chosen) for chosen in itertools.combinations(shares, count)) >= 0.5:
            return count
    raise AssertionError


@pytest.mark.parametrize("label", LABELS)
def test_where_the_energy_sits(two: Held, label: str) -> None:
    shares = {name: energy / two.whole(label) for name, energy in two.energy[label].items()}
    shown = picture(two.report, f"shares-{PLACE[label] + 1}")
    values = cells_of(shown.charts[0])
    for name in NAMES:
        assert values[kind_of(name), str(block_of(name))] == pytest.approx(shares[name], rel=1e-9)
    few = fewest_with_half(list(shares.values()))
    assert shown.remark == f"{few} of {len(NAMES)} modules hold half of it."
    assert number(shown.chance) == pytest.approx(1 / len(NAMES), rel=1e-2)
    assert any(f"{NAMES[0]}: {percent(shares[NAMES[0]])} of the energy" in tip for tip in tips_of(shown.charts[0]))
    (own,) = [text for text in two.report.summary if text.startswith(f"{label}: ")]
    assert f"{few} of {len(NAMES)} modules hold half of the energy" in own
    strongest = max(KINDS, key=lambda kind: sum(shares[n] for n in NAMES if kind_of(n) == kind))
    part = sum(shares[n] for n in NAMES if kind_of(n) == strongest)
    assert part > 0.5  # so it is said
    assert f"and {strongest} alone holds {percent(part)}" in own
    ranks = [reference.effective_rank(two.s(label, name)) for name in NAMES]
    assert f"The mean effective rank is {sum(ranks) / len(ranks):.1f} at a nominal rank of {RANK}." in own


@pytest.mark.parametrize("label", LABELS)
def test_curves_of_energy_and_spectra(two: Held, label: str) -> None:
    chart = picture(two.report, f"energy-{PLACE[label] + 1}").charts[0]
    curves = lines_of(chart)
    assert set(curves) == {*KINDS, "all modules"}
    for key, curve in curves.items():
        members = [name for name in NAMES if key in (kind_of(name), "all modules")]
        squares = np.array([two.s(label, name) ** 2 for name in members]).sum(axis=0)
        kept = [0.0, *(squares.cumsum() / squares.sum())]
        assert list(curve.values()) == pytest.approx(kept, rel=1e-9)
        assert list(curve) == list(range(RANK + 1))
    panels = picture(two.report, f"spectra-{PLACE[label] + 1}").charts
    drawn = {name: line for panel in panels for name, line in lines_of(panel).items()}
    for name in NAMES:
        assert list(drawn[name].values()) == pytest.approx(list(two.s(label, name)), rel=1e-9)
    ranks = cells_of(picture(two.report, f"ranks-{PLACE[label] + 1}").charts[0])
    values = {name: reference.effective_rank(two.s(label, name)) for name in NAMES}
    for name in NAMES:
        assert ranks[kind_of(name), str(block_of(name))] == pytest.approx(values[name], rel=1e-9)


# ---------------------------------------------------------------- ranks


def cut_error(two: Held, label: str, rank: int) -> float:
    """‖ΔW − ΔW'‖/‖ΔW‖ of one rank for all modules."""
    lost = math.fsum(float((two.s(label, name)[rank:] ** 2).sum()) for name in NAMES)
    return math.sqrt(lost / two.whole(label))


def cut_bytes(two: Held, label: str, rank: int, tmp_path: Path) -> int:
    """The size of the file of weights when the adapter is cut and written."""
    modules = {name: pair(D, rank, 2.0) for name, D in two.dense[label].items()}
    loralens.save(loralens.Adapter(modules=modules, base_model="tiny/base"), tmp_path / f"{label}-{rank}")
    return (tmp_path / f"{label}-{rank}" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("label", LABELS)
def test_every_rank(two: Held, label: str, tmp_path: Path) -> None:
    table = tables(two.report, "ranks", "Every rank")[PLACE[label]]
    printed, behind = rows(table), sorted_by(table)
    assert list(printed) == [str(rank) for rank in range(RANK, 0, -1)]
    chart = picture(two.report, f"curve-{PLACE[label] + 1}").charts[0]
    uniform = lines_of(chart)["one rank everywhere"]
    for rank in range(1, RANK + 1):
        error, bytes_ = cut_error(two, label, rank), cut_bytes(two, label, rank, tmp_path)
        said, values = printed[str(rank)], behind[str(rank)]
        assert values["peft file"] == bytes_
        assert said["peft file"] == size(bytes_)
        assert values["energy kept"] == pytest.approx(1 - error**2, rel=1e-9)
        assert values["error"] == pytest.approx(error, rel=1e-6, abs=1e-7)
        assert said["energy kept"] == percent(1 - error**2, 4)
        assert uniform[bytes_ / 1e3] == pytest.approx(100 * error, rel=1e-6, abs=1e-5)
        assert values["by budget"] <= error + 1e-7


@pytest.mark.parametrize("label", LABELS)
def test_the_slider(two: Held, label: str, tmp_path: Path) -> None:
    """Every stop has the rank and the budget that compress takes, and what they cost."""
    data = [part for part in parts_of(two.report, "ranks") if isinstance(part, Slider)][PLACE[label]].data
    for rank, stop in enumerate(data["stops"], start=1):
        kilobytes, error = stop["rank"]["at"]
        assert kilobytes * 1000 == pytest.approx(cut_bytes(two, label, rank, tmp_path))
        assert error == pytest.approx(100 * cut_error(two, label, rank), rel=1e-4, abs=1e-4)
        assert number(stop["rank"]["kept"]) == pytest.approx(1 - cut_error(two, label, rank) ** 2, rel=6e-3, abs=1e-6)
        assert stop["rank"]["option"] == f"--rank {rank}"
        budget = int(stop["budget"]["option"].removeprefix("--parameters "))
        total = loralens.compress(two.files[label], output=tmp_path / f"{rank}", parameters=budget).record()["total"]
        assert stop["budget"]["at"][1] == pytest.approx(100 * total["relative_error"], rel=1e-4, abs=1e-4)


def best_rank(two: Held, label: str) -> int:
    """The least rank that loses at most 1 % of the energy."""
    return next(rank for rank in range(1, RANK + 1) if cut_error(two, label, rank) ** 2 <= 0.01)


def test_the_advice_on_ranks(two: Held, tmp_path: Path) -> None:
    rank = best_rank(two, "first")
    assert 1 < rank < RANK
    error = cut_error(two, "first", rank)
    small, whole = (cut_bytes(two, "first", r, tmp_path) for r in (rank, RANK))
    said = (
        f"Rank {rank} of {RANK} for all modules keeps {percent(1 - error**2)} of the energy (error {percent(error)}) "
        f"in {size(small)}, {percent(1 - small / whole)} less than now."
    )
    (own,) = [text for text in two.report.summary if text.startswith("first: ")]
    assert said in own
    # Of several adapters the first table has the recommendation, and no paragraph repeats it for each of them.
    assert not [text for text in texts(two.report, "ranks") if said in text]
    sliders = [part for part in parts_of(two.report, "ranks") if isinstance(part, Slider)]
    assert [one.share for one in sliders] == ["energy kept"] * 2
    assert [one.data["start"] + 1 for one in sliders] == [best_rank(two, label) for label in LABELS]


def test_keeping_the_rank_says_what_less_would_lose(two: Held) -> None:
    assert best_rank(two, "second") == RANK  # by construction: its singular values fall slowly
    error = cut_error(two, "second", RANK - 1)
    said = (
        f"Keep rank {RANK} for all modules: rank {RANK - 1} would lose {percent(error**2)} of the energy "
        f"(error {percent(error)}), more than the 1 % allowed here."
    )
    assert f"second: {said}" in texts(two.report, "ranks")


# ---------------------------------------------------------------- base


def projected(two: Held, label: str, name: str) -> tuple[float, float]:
    """‖ΔW‖ and ‖UᵀWV‖ over all directions."""
    D, W = two.dense[label][name], two.weights[name]
    U, s, Vh = np.linalg.svd(D, full_matrices=False)
    return reference.frobenius(s[:RANK]), reference.frobenius((U[:, :RANK].T @ W @ Vh[:RANK].T).ravel())


def random_projection(W: np.ndarray, rank: int, draws: int = 3000) -> tuple[float, float]:
    """Mean and standard deviation of ‖UᵀWV‖² over drawn U and V."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((draws, W.shape[0], rank)))[0]
    V = np.linalg.qr(rng.standard_normal((draws, W.shape[1], rank)))[0]
    values = ((U.transpose(0, 2, 1) @ W @ V) ** 2).sum(axis=(1, 2))
    return float(values.mean()), float(values.std())


@pytest.fixture(scope="module")
def chance(two: Held) -> dict[str, tuple[float, float]]:
    return {name: random_projection(W, RANK) for name, W in two.weights.items()}


@pytest.mark.parametrize("label", LABELS)
def test_amplification(two: Held, label: str, chance: dict[str, tuple[float, float]]) -> None:
    z, excess, factor = {}, {}, {}
    for name in NAMES:
        delta, inside = projected(two, label, name)
        mean, spread = chance[name]
        factor[name], z[name] = delta / inside, (inside**2 - mean) / spread
        W = two.weights[name]
        excess[name] = inside / (RANK * np.linalg.norm(W) / math.sqrt(W.size))
    shown = picture(two.report, f"amplification-{PLACE[label] + 1}")
    by_title = {chart.title: cells_of(chart) for chart in shown.charts}
    for name in NAMES:
        cell = kind_of(name), str(block_of(name))
        assert by_title["z-score of ‖UᵀWV‖²"][cell] == pytest.approx(z[name], rel=0.06, abs=0.1)
        assert by_title["excess of ‖UᵀWV‖ over random"][cell] == pytest.approx(
            math.log2(excess[name]), rel=1e-6, abs=1e-9
        )
    (table,) = [one for one in tables(two.report, "modules", "") if one.table.title == label]
    for name, values in sorted_by(table).items():
        assert values["amplification"] == pytest.approx(factor[name], rel=1e-6)
        assert values["z"] == pytest.approx(z[name], rel=0.06, abs=0.1)
    far = [name for name in NAMES if abs(z[name]) > 3]
    assert not [name for name in NAMES if 2.8 < abs(z[name]) < 3.2], "the count must not hang on the draws"
    assert shown.remark.startswith(f"{len(far)} of {len(NAMES)} modules are more than 3 standard deviations")
    (own,) = [text for text in two.report.summary if text.startswith(f"{label}: ")]
    assert f"In {len(far)} of {len(NAMES)} modules" in own
    behind = sorted_by(tables(two.report, "base", "Amplification by kind")[PLACE[label]])
    for kind in KINDS:
        members = [name for name in NAMES if kind_of(name) == kind]
        assert behind[kind]["modules"] == len(members)
        assert behind[kind]["amplification"] == pytest.approx(np.median([factor[n] for n in members]), rel=1e-6)
        assert behind[kind]["excess"] == pytest.approx(np.median([excess[n] for n in members]), rel=1e-6)
        assert behind[kind]["z"] == pytest.approx(np.median([z[n] for n in members]), rel=0.06, abs=0.1)
        assert behind[kind]["|z| > 3"] == sum(name in far for name in members)


@pytest.mark.parametrize("label", LABELS)
def test_intruders(two: Held, label: str) -> None:
    counts, looked, energy, kept = {}, {}, {}, {}
    for name in NAMES:
        W, D = two.weights[name], two.dense[label][name]
        s, scores = reference.intruder_scores(W, D, 10)
        new = scores < 0.5
        assert not np.any(np.abs(scores - 0.5) < 1e-4)
        counts[name], looked[name] = int(new.sum()), len(scores)
        energy[name], kept[name] = float((s[new] ** 2).sum()), float((s**2).sum())
    shown = picture(two.report, f"intruders-{PLACE[label] + 1}")
    assert sum(counts.values()) > 0
    assert shown.remark == f"{sum(counts.values())} of {sum(looked.values())} leading directions are intruders."
    assert "of 0.5 or more" in shown.caption
    (own,) = [text for text in two.report.summary if text.startswith(f"{label}: ")]
    assert (
        f"{sum(counts.values())} of the {sum(looked.values())} leading directions of W + ΔW are intruder dimensions"
        in own
    )
    values = cells_of(shown.charts[0])
    for name in NAMES:
        assert values[kind_of(name), str(block_of(name))] == counts[name]
    table = tables(two.report, "base", "Intruders by kind")[PLACE[label]]
    behind, printed = sorted_by(table), rows(table)
    for kind in KINDS:
        members = [name for name in NAMES if kind_of(name) == kind]
        told = f"{sum(counts[n] for n in members)}/{sum(looked[n] for n in members)}"
        assert printed[kind]["intruders"] == told
        share = sum(energy[n] for n in members) / sum(kept[n] for n in members)
        assert behind[kind]["energy"] == pytest.approx(share, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("label", LABELS)
def test_what_a_merge_makes_of_it(two: Held, label: str) -> None:
    """The merge itself, in bfloat16: nearest of W + ΔW in float32, and what of it arrived."""
    error, gain, unmoved, ratio = {}, {}, {}, {}
    for name in NAMES:
        W, D = two.weights[name], two.dense[label][name]
        merged = (W.astype(np.float32) + D.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float64)
        arrived = merged - W
        error[name] = np.linalg.norm(arrived - D) / np.linalg.norm(D)
        gain[name] = float((arrived * D).sum() / (D * D).sum())
        unmoved[name] = float((arrived == 0).mean())
        ratio[name] = np.linalg.norm(D) / np.linalg.norm(W)
    behind = sorted_by(tables(two.report, "base", "Merge by kind")[PLACE[label]])
    for kind in KINDS:
        members = [name for name in NAMES if kind_of(name) == kind]
        assert behind[kind]["‖ΔW‖/‖W‖"] == pytest.approx(np.median([ratio[n] for n in members]), rel=1e-3)
        assert behind[kind]["largest error"] == pytest.approx(max(error[n] for n in members), rel=0.25)
        assert behind[kind]["least strength"] == pytest.approx(min(gain[n] for n in members), abs=0.01)
        assert behind[kind]["unmoved"] == pytest.approx(np.median([unmoved[n] for n in members]), abs=0.02)
    shown = picture(two.report, f"merge-{PLACE[label] + 1}")
    predicted = cells_of(shown.charts[0])
    told = {name: predicted[kind_of(name), str(block_of(name))] for name in NAMES}
    worst = max(told, key=lambda name: told[name])
    assert shown.remark == f"The largest error, {percent(told[worst])}, is that of {worst}."
    assert "a merge into bfloat16 weights" in shown.caption
    (own,) = [text for text in two.report.summary if text.startswith(f"{label}: ")]
    median = float(np.median(list(told.values())))
    if told[worst] >= 0.005:
        assert (
            f"an error of {percent(median)} of ‖ΔW‖ in the median module and of {percent(told[worst])} in the worst"
            in own
        )
    else:
        assert f"would preserve ΔW: its largest error in any module is {percent(told[worst])}." in own


# ---------------------------------------------------------------- together


def flat(dense: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [dense[name] for name in NAMES]


def phi_all(X: np.ndarray, Y: np.ndarray, side: str) -> float:
    """φ of all directions."""
    left, right = (reference.leading_columns(D, RANK, side) for D in (X, Y))
    return reference.subspace_phi(left, right, RANK, RANK)


def dimension(name: str, side: str) -> int:
    return SHAPES[kind_of(name)][0 if side == "out" else 1]


def test_pairs(two: Held) -> None:
    first, second = flat(two.dense["first"]), flat(two.dense["second"])
    cosine = reference.whole_cosine(first, second)
    z = cosine / reference.whole_cosine_spread(first, second)
    (table,) = tables(two.report, "together", "Pairs")
    headings = [column.title for column in table.table.shown]
    (values,), (printed,) = numbers_behind(table), cells(table)
    assert headings == [
        "adapter", "and", "modules", "cosine", "z", "φ out", "by chance", "φ in", "by chance", "cosine of A",
    ]  # fmt: skip
    assert printed[:3] == ["first", "second", str(len(NAMES))]
    assert values[3] == pytest.approx(cosine, rel=1e-6)
    assert values[4] == pytest.approx(z, rel=1e-6)
    for column, side in ((5, "out"), (7, "in")):
        mean = np.mean([phi_all(D, E, side) for D, E in zip(first, second, strict=True)])
        level = np.mean([RANK / dimension(name, side) for name in NAMES])
        assert values[column] == pytest.approx(mean, rel=1e-6)
        assert values[column + 1] == pytest.approx(level, rel=1e-9)
        assert number(printed[column]) == pytest.approx(mean, abs=6e-4)
        assert number(printed[column + 1]) == pytest.approx(level, abs=6e-4)
    starts = [
        reference.first_rows_cosine(*(loralens.load(file)[name].A for file in two.files.values())) for name in NAMES
    ]
    assert values[9] == pytest.approx(np.mean(starts), abs=1e-6)
    assert f"(cosine {signed(cosine)})" in two.report.headline


def test_conflicts_module_by_module(two: Held) -> None:
    shown = picture(two.report, "conflicts")
    assert shown.title == "Cosine by module"
    values = cells_of(shown.charts[0])
    cosines = {n: reference.dense_cosine(two.dense["first"][n], two.dense["second"][n]) for n in NAMES}
    for name in NAMES:
        assert values[kind_of(name), str(block_of(name))] == pytest.approx(cosines[name], rel=1e-6, abs=1e-9)
    spread = max(1 / math.sqrt(D.size) for D in flat(two.dense["first"]))
    assert number(shown.chance.removeprefix("0 ± ")) == pytest.approx(spread, rel=0.05)
    assert f"{NAMES[0]}: cosine {signed(cosines[NAMES[0]])} of first and second" in tips_of(shown.charts[0])


def test_who_fights_and_who_agrees(two: Held) -> None:
    first, second = two.dense["first"], two.dense["second"]
    whole = math.sqrt(two.whole("first") * two.whole("second"))
    for verb, name in (("work against each other", CONFLICT), ("agree", AGREE)):
        (table,) = tables(two.report, "together", f"Where two adapters {verb}")
        where = f"block {block_of(name)}, {kind_of(name)}"
        (values,) = [line for line in numbers_behind(table) if line[2] == where]
        inner = math.fsum((first[name] * second[name]).ravel())
        assert values[:2] == ["first", "second"]
        assert values[3] == 1
        assert values[4] == pytest.approx(reference.dense_cosine(first[name], second[name]), rel=1e-6)
        assert values[5] == pytest.approx(inner / whole, rel=1e-6)
        assert (values[4] < 0) == (name == CONFLICT)


def test_interference(two: Held) -> None:
    """The energy of each adapter inside the directions of the other on both sides, mean over a block."""
    shown = picture(two.report, "interference")
    values = cells_of(shown.charts[0])
    levels = []
    for label, other in (LABELS, LABELS[::-1]):
        for block in range(BLOCKS):
            shares = []
            for name in NAMES:
                if block_of(name) != block:
                    continue
                inside, _, out, in_ = reference.divided_energy(two.dense[label][name], [two.dense[other][name]], 1e-6)
                shares.append(inside)
                levels.append(out * in_ / two.dense[label][name].size)
            assert values[f"{label} {PLACE[label] + 1}", str(block)] == pytest.approx(np.mean(shares), rel=1e-5)
    assert number(shown.chance) == pytest.approx(np.mean(levels), rel=6e-3)
    assert shown.charts[0].scale.chance == pytest.approx([np.mean(levels)], rel=1e-9)


@pytest.mark.parametrize("side", ["out", "in"])
def test_maps_of_phi(two: Held, side: str) -> None:
    shown = picture(two.report, f"phi-1-2-{side}")
    assert f"{side} side: first and second" in shown.title
    charts = {chart.title: chart for chart in shown.charts if isinstance(chart, HeatMap)}
    assert len(charts) == len(NAMES)
    assert not [text for text in texts(two.report, "together") if "is drawn for the" in text]
    levels = []
    for name in NAMES:
        chart = charts[f"{kind_of(name)}, block {block_of(name)}"]
        X, Y = (reference.leading_columns(two.dense[label][name], RANK, side) for label in LABELS)
        phi = reference.phi_of(X, Y)
        np.testing.assert_allclose(chart.values, phi, atol=1e-6)
        n = dimension(name, side)
        levels += [1 / n, RANK / n]
        first, full = chart.note.splitlines()
        assert first == f"φ(1,1) {phi[0, 0]:.2f}"
        assert numbers(full) == pytest.approx([phi[-1, -1], RANK / n], abs=6e-3)
    assert numbers(shown.chance.split("here ")[1])[:2] == pytest.approx([min(levels), max(levels)], rel=0.05)


# ---------------------------------------------------------------- three


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Three adapters: the first two are somewhat alike, the third is the opposite of the first."""
    folder = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(11)
    dense: dict[str, dict[str, np.ndarray]] = {"x": {}, "y": {}, "z": {}}
    modules: dict[str, dict[str, LowRank]] = {"x": {}, "y": {}, "z": {}}
    for name in NAMES:
        one, two, three = (graded(rng, SHAPES[kind_of(name)], 0.6) for _ in range(3))
        for label, D in (("x", one), ("y", 0.3 * one + two), ("z", -0.7 * one + 0.8 * three)):
            modules[label][name] = pair(D, RANK, 2.0)
    files = {label: folder / label for label in modules}
    for label, held in modules.items():
        adapter = loralens.Adapter(modules=held, base_model="tiny/base")
        loralens.save(adapter, files[label])
        dense[label] = dense_of(adapter)
    report = loralens.report(*files.values()).document
    return Held(report, dense, {}, files)


def test_the_nearest_of_three_is_told_by_its_size_whatever_its_sign(three: Held) -> None:
    cosine = {
        (a, b): reference.whole_cosine(flat(three.dense[a]), flat(three.dense[b]))
        for a, b in itertools.combinations("xyz", 2)
    }
    assert cosine["x", "z"] < 0 < cosine["x", "y"] < -cosine["x", "z"]
    assert three.report.headline.startswith("x and z ")
    assert f"(cosine {signed(cosine['x', 'z'])})" in three.report.headline
    (table,) = tables(three.report, "together", "Pairs")
    assert [tuple(line[:2]) for line in cells(table)] == sorted(cosine, key=lambda both: -abs(cosine[both]))


def test_the_fewest_modules_that_hold_half_of_nearly_even_energy(three: Held) -> None:
    """Where energy is spread evenly, a half is not a quarter."""
    for label in ("x", "y", "z"):
        shares = [energy / three.whole(label) for energy in three.energy[label].values()]
        assert fewest_with_half(shares) == 5
        (own,) = [text for text in three.report.summary if text.startswith(f"{label}: ")]
        assert own.startswith(f"{label}: 5 of {len(NAMES)} modules hold half of the energy")
