"""The comparison with other tools at a tiny size: its judge knows the answers, its rows say what is missing."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import loralens
from benchmarks import judge, synthetic_pair
from benchmarks.others import combine

HIDDEN, INNER = 64, 96


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_pair.make(tmp_path_factory.mktemp("pair"), hidden=HIDDEN, inner=INNER, blocks=1)


def test_the_judge_reads_what_loralens_reads(pair: Path) -> None:
    for name in ("one", "two-rslora"):
        ours = {module: one.dense() for module, one in loralens.load(pair / name).modules.items()}
        assert judge.error(judge.updates(pair / name), ours) < 1e-12


def test_ties_by_hand() -> None:
    stack = np.array([[[3.0, -1.0, 0.1, 2.0]], [[-2.0, -4.0, 5.0, 0.2]]])
    # kept: 3 and 2, −4 and 5; nobody disagrees, so each stands alone
    np.testing.assert_array_equal(judge._ties(stack, 0.5), [[3.0, -4.0, 5.0, 2.0]])
    # all: 3 over −2, −1 with −4, 0.1 with 5, 2 with 0.2
    np.testing.assert_allclose(judge._ties(stack, 1.0), [[3.0, -2.5, 2.55, 1.1]])


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("peft") and find_spec("transformers")), reason="pip install peft")
def test_peft_does_what_its_row_says(pair: Path, tmp_path: Path) -> None:
    jobs = {name: job for one in (combine.SUM, combine.RSLORA) for name, job in one.jobs().items()}
    done = subprocess.run(combine.peft_process(pair, tmp_path, jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exact = combine.SUM.exact(pair)
    rows = {name: combine._record(tmp_path / name, exact) for name in combine.SUM.theirs}
    assert all("seconds_of_the_call" in row for row in rows.values())
    assert 1e-4 < rows["peft_cat"]["error"] < 5e-3  # exact, but the new pair takes the dtype of the base, bf16
    least = judge.least_error(exact, synthetic_pair.RANK)
    for name in ("peft_svd", "peft_svd_thin"):
        assert rows[name]["error"] == pytest.approx(least, rel=1e-3)
    assert rows["peft_linear"]["error"] > 0.5  # cross terms
    assert (tmp_path / "peft_rslora_cat").exists()
