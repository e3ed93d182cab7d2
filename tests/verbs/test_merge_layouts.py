"""`merge --bits keep` into every layout of safetensors: codes alone move, the update arrives, the base comes back."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

import loralens
from loralens import Adapter
from loralens.formats import open_checkpoint
from tests.bases import contents
from tests.draws import draw_adapter
from tests.formats.low_bit.cases import CASES, Case, bitsandbytes
from tests.formats.low_bit.test_layouts import write

# Stacks of experts need an adapter of experts, and have a test of their own.
STACKS = [name for name in CASES if "stack" in name or "gpt-oss" in name]
BASES = CASES | {
    # 17 bytes of codes and one byte that is left over.
    "nf4, padded": lambda: padded((17, 2)),
    "nf4, padded, rows that end within a byte": lambda: padded((3, 11)),
}
MATRICES = [name for name in BASES if name not in STACKS]


def padded(shape: tuple[int, int]) -> Case:
    """NF4 stored as numbers of 16 bits, the last of which holds one byte of codes."""
    case = bitsandbytes("nf4", shape)
    data = np.append(case.tensors[case.codes].reshape(-1), np.uint8(0xAB))
    assert data.size % 2 == 0
    case.tensors[case.codes] = data.view(ml_dtypes.bfloat16).reshape(-1, 1)
    return case


def adapter_for(W: Any, module: str) -> Adapter:
    """A pair whose entries have a share of the spread of the weight."""
    return draw_adapter(1, {module: W.shape}, 2, 0.3 * float(np.std(W)) / 2**0.5)


def tensors(folder: Path) -> dict[str, Any]:
    """Dtype, shape and bytes of every stored tensor."""
    return dict(deserialize((folder / "model.safetensors").read_bytes()))


def read(folder: Path, key: str) -> Any:
    return open_checkpoint(folder).tensors[key].read().astype(np.float64)


@pytest.mark.some(8)
@pytest.mark.parametrize("name", MATRICES)
def test_the_update_arrives_and_the_base_comes_back(name: str, tmp_path: Path) -> None:
    case = BASES[name]()
    beside = {"norm.weight": np.ones(4, np.float16)}
    base = write(tmp_path / "base", case.tensors | beside, case.config)
    module, out = case.key.removesuffix(".weight"), tmp_path / "out"
    adapter = adapter_for(case.W, module)
    result = loralens.merge(adapter, base=base, output=out, bits="keep")
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] != after[key]] == [case.codes]
    assert contents(out)["config.json"] == contents(base)["config.json"]
    D = adapter[module].dense()
    moved = read(out, case.key) - case.W.astype(np.float64)
    (row,) = result.modules
    assert row.fidelity.gain == pytest.approx(np.sum(moved * D) / np.sum(D**2), abs=1e-5)
    assert row.fidelity.codes is not None
    assert row.fidelity.codes.changed == pytest.approx(np.mean(moved != 0), abs=1e-9)
    # Random bytes lie at the ends of the grid more often than the codes of a weight, and have scales of all sizes.
    assert 0.3 < row.fidelity.gain < 1.3
    assert loralens.verify(out).answer
    replayed = loralens.verify(out, base=base, adapter=adapter)
    assert all(verdict.different == 0 for verdict in replayed.modules)
    loralens.unmerge(out, output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


# What gptqmodel 7.7.0 (`dequantize_weight`, for "gptq" after `_correct_gptq_v1_qzeros`) and autoawq 0.2.9
# (`dequantize_gemm`) give for the merged tensors with scales in float32: the first digits of their SHA-256.
ORACLES = {
    "gptq": "4925fe592ef61f1b", "gptq v2": "31ccf48f48829b58", "gptq, 2 bits": "8b0f7e8102ca05a7",
    "gptq, 8 bits": "c940a93dd7d96c44", "awq": "21a9f1ac1d437b59",
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_gptqmodel_and_autoawq_read_these_numbers(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    base = write(tmp_path / "base", case.tensors, case.config)
    loralens.merge(adapter_for(case.W, "a"), base=base, output=tmp_path / "out", bits="keep")
    W = open_checkpoint(tmp_path / "out").tensors["a.weight"].read()
    assert sha256(W.tobytes()).hexdigest()[:16] == ORACLES[name]
