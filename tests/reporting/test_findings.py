"""Every finding that a report shows beside one that is computed here: dense, in float64, by its definition.

One adapter has a module for each thing that can be wrong, the other is random and began from the same A. Which modules
are named, how serious that is, in which order, and every number of the evidence are computed from the factors alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.core import Scaling
from tests import reference
from tests.bases import single
from tests.reporting.reading import Notice, Notices, Paragraph, Report, numbers, parts_of

BLOCKS, RANK, SCALE = 8, 6, 128
SHAPES = {"q_proj": (40, 32), "v_proj": (24, 32)}
MISSING = "model.layers.7.self_attn.v_proj"
NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(BLOCKS) for kind in SHAPES]
NAMES.remove(MISSING)
ZERO, BROKEN, ROWS, COLUMNS = (
    f"model.layers.{i}.self_attn.{k}_proj" for i, k in ((0, "q"), (0, "v"), (1, "q"), (1, "v"))
)
TAKEN, COPY, SPIKE, HUGE = (f"model.layers.{i}.self_attn.{k}_proj" for i, k in ((2, "v"), (3, "v"), (4, "q"), (5, "v")))
TINY, SMALL = (f"model.layers.{i}.self_attn.q_proj" for i in (6, 7))
LEARNED = "model.layers.3.self_attn.q_proj"  # the one module of the random adapter that is not random
STRENGTH = {HUGE: 1.7, TINY: 2e-4, SMALL: 5e-3, SPIKE: 0.03}  # ‖ΔW‖/‖W‖; of the others 0.02


@dataclass(frozen=True)
class Seen:
    """The notices of a report by adapter and code, and what they are about in float64."""

    report: Report
    notices: dict[tuple[str, str], Notice]
    dense: dict[str, dict[str, np.ndarray]]
    factors: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    weights: dict[str, np.ndarray]

    def s(self, name: str, label: str = "ill") -> np.ndarray:
        return np.linalg.svd(self.dense[label][name], compute_uv=False)[:RANK]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(3)
    shape = {name: SHAPES[name.rsplit(".", 1)[1]] for name in NAMES}
    weights = {name: rng.standard_normal(shape[name]).astype(ml_dtypes.bfloat16) for name in NAMES}
    single(folder / "base", {f"{name}.weight": W for name, W in weights.items()})
    A = {name: rng.standard_normal((RANK, shape[name][1])) for name in NAMES}
    factors: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {"ill": {}, "noisy": {}}
    for name in NAMES:
        fall = (0.07 if name == SPIKE else 0.35) ** np.arange(RANK)
        for label, B in (
            ("ill", rng.standard_normal((shape[name][0], RANK)) * fall),
            ("noisy", rng.standard_normal((shape[name][0], RANK)) * (fall if name == LEARNED else 1)),
        ):
            length = np.linalg.norm(weights[name].astype(float)) / np.linalg.norm(B @ A[name])
            B *= (STRENGTH.get(name, 0.02) if label == "ill" else 0.02) * length / (SCALE if label == "ill" else 2)
            factors[label][name] = B.astype(np.float32), A[name].astype(np.float32)
    ill = factors["ill"]
    ill[ZERO][0][:] = 0
    ill[BROKEN][1][1, 2:5] = np.nan, np.inf, 1
    ill[ROWS][0][[1, 7, 8, 30]] = 0
    ill[COLUMNS][1][:, [0, 9, 31]] = 0
    ill[COPY] = ill[TAKEN]
    dense = {}
    for label, scale in (("ill", SCALE), ("noisy", 2)):
        scaling = Scaling("alpha/r", scale * RANK, RANK)
        modules = {name: LowRank(B, A, float(scale), scaling=scaling) for name, (B, A) in factors[label].items()}
        loralens.save(loralens.Adapter(modules=modules, base_model="tiny/base"), folder / label)
        dense[label] = {n: scale * B.astype(np.float64) @ A.astype(np.float64) for n, (B, A) in factors[label].items()}
    paths = [str(folder / label) for label in factors]
    report = loralens.report(*paths, base=folder / "base", intruders=False).document
    (held,) = [part for part in parts_of(report, "findings") if isinstance(part, Notices)]
    each = [own for one in held.notices for own in one.each or [one]]
    # The findings of one code stand under one heading, whichever adapter has them.
    assert len({(one.level, one.code) for one in held.notices}) == len(held.notices) < len(each)
    notices = {(one.place.split(" · ")[0], one.code): one for one in each}
    assert len(notices) == len(each)
    return Seen(report, notices, dense, factors, {name: W.astype(np.float64) for name, W in weights.items()})


def test_what_is_found_and_how_serious_it_is(seen: Seen) -> None:
    expected = {
        ("ill", "non-finite"): "error",
        **{
            ("ill", code): "warning"
            for code in (
                "zero-update", "module-missing", "module-copied", "dead-rows", "dead-columns", "scale-large",
                "update-dominates", "below-rounding", "merge-lossy", "outlier",
            )
        },
        ("noisy", "module-missing"): "warning",
        ("noisy", "random-spectrum"): "warning",
        **{("ill", code): "note" for code in ("spike", "rank-unused", "shared-initialisation")},
    }  # fmt: skip
    assert {key: one.level for key, one in seen.notices.items()} == expected
    levels = [one.level for one in seen.notices.values()]
    assert levels == sorted(levels, key=("error", "warning", "note").index)
    section = next(section for section in seen.report.sections if section.key == "findings")
    assert section.lead.startswith("1 error, 12 warnings, 3 notes, checked against ")
    left_out = [part.text for part in parts_of(seen.report, "findings") if isinstance(part, Paragraph)]
    assert left_out == [f"Left out of everything below because they hold NaN or Inf: ill: {BROKEN}."]


def one(seen: Seen, code: str, name: str, label: str = "ill") -> str:
    """The evidence of a finding about one module."""
    notice = seen.notices[label, code]
    assert notice.place == f"{label} · {name}"
    (evidence,) = notice.evidence
    return evidence


def test_findings_that_are_counted(seen: Seen) -> None:
    assert one(seen, "non-finite", BROKEN) == f"A holds 2 values that are NaN or Inf, of {RANK * 32}"
    assert one(seen, "zero-update", ZERO) == "B is all zero"
    assert one(seen, "dead-rows", ROWS) == "4 of 40 rows of B are zero"
    assert one(seen, "dead-columns", COLUMNS) == "3 of 32 columns of A are zero"
    assert one(seen, "module-copied", COPY) == f"its B and A are those of {TAKEN}, number for number"
    for label in ("ill", "noisy"):
        evidence = f"{BLOCKS - 1} of {BLOCKS} blocks have self_attn_v_proj, and this one does not"
        assert one(seen, "module-missing", MISSING, label) == evidence
    (evidence,) = seen.notices["ill", "scale-large"].evidence
    assert evidence.startswith(f"scale {SCALE}, ")
    assert evidence.endswith(f" in all {len(NAMES)} modules")
    assert numbers(evidence) == [SCALE, SCALE * RANK, RANK, len(NAMES)]


def finite(seen: Seen) -> list[str]:
    return [name for name in NAMES if name != BROKEN]


def alive(seen: Seen) -> list[str]:
    return [name for name in finite(seen) if name != ZERO]


def landed(seen: Seen, name: str) -> tuple[float, float, float]:
    """Gain, error and unmoved share of W + ΔW in bfloat16, of all entries."""
    W, D = seen.weights[name], seen.dense["ill"][name]
    merged = (W.astype(np.float32) + D.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float64)
    return reference.rounding_gain_and_errors(W, merged, D)[:3]


def cost(seen: Seen, name: str) -> str:
    gain, error, unmoved = landed(seen, name)
    ratio = np.linalg.norm(seen.dense["ill"][name]) / np.linalg.norm(seen.weights[name])
    return (
        f"a merge into bfloat16 keeps {100 * gain:.0f} % of its strength with an error of {100 * error:.0f} %, and "
        f"leaves {100 * unmoved:.0f} % of the weights unchanged (‖ΔW‖/‖W‖ {100 * ratio:.2f} %)"
    )


def test_what_a_merge_would_swallow(seen: Seen) -> None:
    norm = {name: np.linalg.norm(seen.dense["ill"][name]) for name in alive(seen)}
    W = seen.weights[TINY]
    steps = 2.0 ** (np.floor(np.log2(np.abs(W))) - 7)  # bfloat16 has 7 bits behind the leading one
    noise = math.sqrt((steps**2).sum() / 12)
    assert norm[TINY] < noise
    evidence = one(seen, "below-rounding", TINY)
    assert evidence == f"‖ΔW‖ is {norm[TINY] / noise:.2g} times the rounding error of W in bfloat16; {cost(seen, TINY)}"
    lossy = [
        name for name in alive(seen) if name != TINY and (landed(seen, name)[1] > 0.2 or landed(seen, name)[0] < 0.95)
    ]
    assert lossy == [SMALL]
    out, in_ = seen.weights[SMALL].shape
    told = int((seen.s(SMALL) > landed(seen, SMALL)[1] * norm[SMALL] / (out * in_) ** 0.25).sum())
    assert 0 < told < RANK
    assert one(seen, "merge-lossy", SMALL) == f"{cost(seen, SMALL)}; {told} of {RANK} directions rise above the noise"


def test_several_modules_of_one_finding(tmp_path: Path) -> None:
    """Four modules: three are shown and the rest counted; where they are is said by their number and kind."""
    rng = np.random.default_rng(4)
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(6)]
    modules = {}
    for i, name in enumerate(names):
        B = rng.standard_normal((20, 4)).astype(np.float32)
        B[: 0 if i > 3 else 2 + i] = 0  # 2, 3, 4 and 5 rows
        A = rng.standard_normal((4, 20)).astype(np.float32)
        modules[name] = LowRank(B, A, 1.0, scaling=Scaling("alpha/r", 4, 4))
    loralens.save(loralens.Adapter(modules=modules, base_model="tiny/base"), tmp_path / "a")
    report = loralens.report(tmp_path / "a").document
    (held,) = [part for part in parts_of(report, "findings") if isinstance(part, Notices)]
    (notice,) = [notice for notice in held.notices if notice.code == "dead-rows"]
    assert notice.place == "4 of 6 modules, all q_proj"
    most = [f"{names[i]}: {2 + i} of 20 rows of B are zero" for i in (3, 2, 1)]
    assert list(notice.evidence) == [*most, "and 1 more like these"]
    warnings = [notice.code for notice in held.notices if notice.level == "warning"]
    assert warnings[0] == "dead-rows"
    assert report.summary[0].startswith(f"a has {len(warnings)} warning")
