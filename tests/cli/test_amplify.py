"""``loralens amplify``: exact output on a small adapter and base, the JSON contract, figures, both error exits."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.command import Command
from tests.conftest import small_adapter

MODULE_KEYS = {
    "name", "rank", "delta_norm", "weight_norm", "projected_norm", "top_norm", "random_norm", "amplification",
    "excess", "z", "far_chance", "curve",
}  # fmt: skip
QUERY = "model.layers.0.self_attn.q_proj"

run, told = Command().run, Command().told


def small_base(folder: Path) -> Path:
    """W = diag(8, 4, 2, 1) under two rows of zeros, for every module; the directions of ΔW are the first two."""
    W = np.vstack([np.diag([8, 4, 2, 1]), np.zeros((2, 4))]).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": W.copy() for name in small_adapter()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("bases") / "base")


def test_json_keeps_its_contract(small: Path, base: Path) -> None:
    record = told("amplify", small, "--base", base)
    assert (record["adapter"], record["base"], record["device"]) == (str(small), str(base), "cpu")
    assert [module["name"] for module in record["modules"]] == list(small_adapter())
    assert all(set(module) >= MODULE_KEYS for module in record["modules"])
    query = record["modules"][0]
    assert query["amplification"] == pytest.approx(20**0.5 / 80**0.5)
    assert query["relative_norm"] == pytest.approx(20**0.5 / 85**0.5)
    assert query["curve"][-1] == {key: query[key] for key in query["curve"][-1]}
    assert query["top"]["sigma"] == pytest.approx([8, 4])
    np.testing.assert_allclose(query["phi"]["out"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(query["phi"]["chance_out"], [[1 / 6, 2 / 6], [2 / 6, 2 / 6]])
    zero = record["modules"][-1]
    assert (zero["rank"], zero["delta_norm"], zero["amplification"], zero["z"], zero["curve"]) == (0, 0, None, None, [])
