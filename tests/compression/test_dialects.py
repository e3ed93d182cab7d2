"""Every dialect in and out, on adapters made here and on real ones: what is read back is what was reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens import Adapter
from loralens.compression import losses
from tests.cli.command import Command
from tests.compression.truncation import total_error
from tests.conftest import real_adapters
from tests.draws import draw_factors
from tests.tolerances import LOSS_FLOAT32

DIALECTS = ("peft", "kohya", "diffusers", "comfyui", "mlx", "loralib", "gguf")
ONLY_READ = ("safeloras", "plain", "xlabs", "litgpt", "torchtune", "lycoris")


def compressed(source: Path, target: Path, *arguments: object) -> dict[str, object]:
    result = Command().good("compress", source, "-o", target, "--json", *arguments)
    return json.loads(result.stdout)


def graded() -> Adapter:
    rng = np.random.default_rng(0)
    modules = {}
    for block in (0, 1):
        for kind, decades in (("q_proj", 1), ("v_proj", 2)):
            B, A = draw_factors(rng, 16, 12, 4, "f4")
            B *= np.logspace(0, -decades, 4, dtype="f4")
            modules[f"model.layers.{block}.self_attn.{kind}"] = loralens.LowRank(B, A, 0.5 + block)
    return Adapter(modules=modules, base_model="tiny/base")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_in_and_out(dialect: str, tmp_path: Path) -> None:
    options = {"arch": "qwen2"} if dialect == "gguf" else {}
    loralens.save(graded(), tmp_path / "in", format=dialect, **options)
    uniform = ["--uniform"] if dialect == "mlx" else []
    record = compressed(tmp_path / "in", tmp_path / "out", "--energy", 0.95, *uniform)
    assert record["format"] == dialect
    before, after = (loralens.load(tmp_path / name) for name in ("in", "out"))
    assert after.format == dialect
    assert {name: module.shape for name, module in after.items()} == {n: m.shape for n, m in before.items()}
    # It is noted while the factors are computed, and in another order of sums than from the files.
    assert record["total"]["relative_error"] == pytest.approx(total_error(losses(before, after)), rel=1e-12)
    assert 0.05 < record["total"]["relative_error"] < 0.25
    for name, module in after.items():
        if dialect not in ("mlx", "gguf"):  # these fold one scale of many into B
            alpha = before[name].scale * module.rank
            assert module.scale * module.rank == pytest.approx(max(1, round(alpha)), rel=LOSS_FLOAT32)


def names() -> list[str]:
    folder = real_adapters()
    if folder is None:
        return ["none here"]
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("neg-"))


@pytest.mark.some(3)
@pytest.mark.parametrize("name", names())
def test_real_adapters_from_and_to_their_own_format(name: str, real: Path, tmp_path: Path) -> None:
    known = ["--alpha", "16"] if "loralib" in name else []
    reading = {"alpha": 16 if "loralib" in name else None}
    adapter = loralens.load(real / name, **reading)
    more = ["--to", "kohya"] if adapter.format in ONLY_READ else []
    more += ["--uniform"] if adapter.format == "mlx" else []
    if adapter.format == "safeloras":  # it has word embeddings beside its pairs
        arguments = ["compress", str(real / name), "-o", str(tmp_path / "out"), "--rank", "1", "--to", "peft"]
        result = Command().run(*arguments)
        assert (result.exit_code, "no place for" in result.stderr) == (2, True)
        return
    record = compressed(real / name, tmp_path / "out", "--energy", 0.9, *known, *more)
    total = record["total"]
    after = loralens.load(tmp_path / "out")
    assert total["relative_error"] == pytest.approx(total_error(losses(adapter, after)), rel=1e-9)
    assert total["relative_error"] <= 0.1**0.5 * 1.001
    assert total["bytes_after"] <= total["bytes_before"] or more
    assert total["parameters_after"] < total["parameters_before"]
    assert len(after.extra) == len(adapter.extra)
    budget = total["bytes_before"] * 19 // 20
    assert compressed(real / name, tmp_path / "less", "--size", budget, *known, *more)["total"]["bytes_after"] <= budget


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """Old PEFT's MergedLinear: q and v of one weight (24, 20) adapted, two blocks of rank 4 each."""
    rng = np.random.default_rng(1)
    folder, key = tmp_path / "fused", "base_model.model.h.0.attn"
    folder.mkdir()
    tensors = {
        f"{key}.lora_A.weight": rng.standard_normal((8, 20)).astype(np.float32),
        f"{key}.lora_B.weight": rng.standard_normal((16, 4, 1)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["attn"],
              "enable_lora": [True, False, True]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "rule", [["--rank", 6], ["--error", 0.01], ["--parameters", 1], ["--parameters", 0.99, "--drop-dead"]]
)
def test_fused_projections_are_kept_whole_where_a_pair_would_be_no_smaller(
    rule: list[object], fused: Path, tmp_path: Path
) -> None:
    record = compressed(fused, tmp_path / "out", *rule)
    total = record["total"]
    assert total["parameters_after"] <= total["parameters_before"] == 8 * 20 + 16 * 4
    if 0.99 in rule:
        assert record["notes"] == []
        assert 0 < total["relative_error"] < 1
        return
    assert record["notes"] == ["1 modules of fused projections kept whole, in blocks"]
    assert total["relative_error"] == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (fused / name).read_bytes()
