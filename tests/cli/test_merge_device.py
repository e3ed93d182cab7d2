"""``--device``: torch makes the products, and not a bit is another; torch on the CPU stands for a GPU."""

from pathlib import Path

import numpy as np
import pytest

from loralens.linalg import device, exact
from tests.bases import contents, sharded, tensors
from tests.cli.test_merge import done, refused, run

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quiet_torch")


@pytest.fixture
def made_there(monkeypatch):
    """A name for torch on the CPU; how many products it has made."""
    count = []
    plain = exact._piece

    def counted(*args):
        count.append(args)
        return plain(*args)

    monkeypatch.setattr(device, "_cuda", lambda index: torch.device("cpu"))
    monkeypatch.setattr(exact, "_piece", counted)
    return count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merge_unmerge_and_verify_there_are_those_of_numpy(dtype: str, small: Path, tmp_path: Path, made_there) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    base = sharded(tmp_path / "base", tensors(kind, size=1.0))
    for name, where in (("here", "cpu"), ("there", "cuda:0")):
        done("merge", small, "--base", base, "-o", tmp_path / name, "--device", where)
        assert bool(made_there) == (name == "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")

    made_there.clear()
    done("unmerge", tmp_path / "here", "-o", tmp_path / "back", "--device", "cuda")
    assert made_there
    assert contents(tmp_path / "back") == contents(base)

    made_there.clear()
    found = done("verify", tmp_path / "here", "--base", base, "--adapter", small, "--device", "cuda")
    assert made_there
    assert found.stdout == done("verify", tmp_path / "here", "--base", base, "--adapter", small).stdout

    made_there.clear()
    for name, where in (("one", "cpu"), ("two", "cuda")):
        done("unmerge", tmp_path / "here", "--adapter", small, "-o", tmp_path / name, "--device", where)
    assert made_there
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("command", ["merge", "unmerge", "verify"])
def test_no_gpu_is_one_message_before_any_work(command: str, small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rest = {
        "merge": [small, "--base", tmp_path, "-o", tmp_path / "out"],
        "unmerge": [tmp_path, "-o", tmp_path / "out"],
        "verify": [tmp_path, "--base", tmp_path, "--adapter", small],
    }[command]
    assert refused(command, *rest, "--device", "cuda") == (
        "error: torch sees no CUDA device here\n  fix: leave out --device, or install a CUDA build of torch\n"
    )
    assert run(command, *rest, "--device", "tpu").stderr.startswith("error: no device is called 'tpu'")
