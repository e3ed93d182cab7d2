"""What ``doctor --base`` foretells of a merge, and the report shows, is what ``merge`` does with the same options."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.analysis import examine_all
from loralens.verbs.shared.examination import open_base
from loralens.verbs.spectra.doctor import DTYPES
from tests import bases
from tests.cli.command import Command

call = Command()
SIZE = 192  # squared: few enough entries that all are looked at
NAMES = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.q_proj", "mlp.up_proj")]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FP8 = ml_dtypes.float8_e4m3fn
STORED: dict[str, Any] = {
    "f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "fp8 alone": FP8, "fp8 under scales": FP8,
}  # fmt: skip
ASKED = (None, "f32", "bf16", "f16")


def held(stored: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    W = {f"{name}.weight": 0.02 * rng.standard_normal((SIZE, SIZE)).astype(np.float32) for name in NAMES}
    if stored == "fp8 alone":
        return {key: (100 * array).astype(FP8) for key, array in W.items()}
    if stored != "fp8 under scales":
        return {key: array.astype(STORED[stored]) for key, array in W.items()}
    scales = {f"{key}_scale": np.abs(array).max(axis=1, keepdims=True) / 448 for key, array in W.items()}
    return {key: (array / scales[f"{key}_scale"]).astype(FP8) for key, array in W.items()} | scales


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("foretold")
    for stored in STORED:
        bases.single(home / stored.replace(" ", "_"), held(stored), config=CONFIG)
    rng = np.random.default_rng(0)
    strength = dict(zip(NAMES, (0.001, 0.003, 0.01, 0.1), strict=True))  # ‖ΔW‖/‖W‖: lost in bfloat16, and not
    modules = {
        name: loralens.LowRank(
            (share * 0.02 / 2 * rng.standard_normal((SIZE, 4))).astype(np.float32),
            rng.standard_normal((4, SIZE)).astype(np.float32),
        )
        for name, share in strength.items()
    }
    loralens.save(loralens.Adapter(modules=modules), home / "lora")
    return home


def merged(adapter: Path, base: object, dtype: str | None, rounding: str) -> dict[str, Any]:
    words = ["merge", adapter, "--base", base, "--dry-run", "--json", "--rounding", rounding]
    words += ["--dtype", dtype] if dtype else []
    return {one["name"]: one for one in json.loads(call.good(*words).stdout)["modules"]}


def foretold(adapter: Path, base: object, dtype: str | None, rounding: str) -> dict[str, Any]:
    (patient,) = examine_all(
        {"a": loralens.load(adapter)},
        base=open_base(base),
        dtype=DTYPES[dtype] if dtype else None,
        stochastic=rounding == "stochastic",
    )
    return {
        name: {"gain": one.rounding.gain, "relative_error": one.rounding.error, "unmoved": one.rounding.unmoved}
        for name, one in patient.merge_effects.items()
    }


@pytest.mark.some(5)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("stored", STORED)
def test_every_module_as_merge_measures_it(stored: str, asked: str | None, home: Path) -> None:
    base = home / stored.replace(" ", "_")
    told, true = (of(home / "lora", base, asked, "nearest") for of in (foretold, merged))
    assert sorted(told) == sorted(NAMES)
    for name in NAMES:
        for measure, value in told[name].items():
            near = 5e-4 if measure == "unmoved" else 2e-5  # −0 that becomes 0 has moved for merge, which looks at bits
            assert value == pytest.approx(true[name][measure], rel=1e-4, abs=near), (name, measure)
