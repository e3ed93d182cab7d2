"""DoRA: that ΔW = scale·B·A alone is measured is said where it is so, and not where the magnitudes are applied."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from tests import models
from tests.cli.command import Command
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("quiet_torch")

call = Command()
ALONE = "what is measured is ΔW = scale·B·A alone"
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("dora")
    llama = models.llama()
    models.folder(llama, home / "base")
    made = models.adapter(llama, ("q_proj",))
    extra = {
        f"base_model.model.{Q.format(i)}.lora_magnitude_vector": Extra(
            "magnitude", Q.format(i), LazyArray.of(np.linspace(0.5, 1.5, 16).astype(np.float32))
        )
        for i in (0, 1)
    }
    models.saved(Adapter(modules=made.modules, extra=extra), home / "dora")
    models.saved(made, home / "plain")
    models.jsonl(home / "texts.jsonl")
    call.good("merge", home / "dora", "--base", home / "base", "-o", home / "merged")
    name = f"diffusion_model.{Q.format(0)}"
    ones = {"lora_up.weight": (16, 1), "lora_down.weight": (1, 16), "diff_b": (16,)}
    tensors = {f"{name}.{part}": np.ones(shape, np.float32) for part, shape in ones.items()}
    save_file(
        {**tensors, f"diffusion_model.{Q.format(1)}.diff": np.ones((16, 16), np.float32)}, home / "full.safetensors"
    )
    return home


APPLIED = (
    "merge {dora} --base {base} --dry-run",
    "verify {home}/merged --base {base} --adapter {dora}",
    "behave --threads 1 --model {base} --adapters {dora} --data {home}/texts.jsonl",
    "calibrate --threads 1 --model {base} --adapter {dora} --data {home}/texts.jsonl -o {out} --dry-run",
    "evaluate {dora} --threads 1 --model {base} --task causal-lm --data {home}/texts.jsonl",
    "combine {dora} {home}/plain --base {base} -o {out} --dry-run",
)
ALONE_MEASURED = ("spectrum {dora}", "amplify {dora} --base {base} --no-top", "inspect {dora}", "doctor {dora}")


def said(command: str, home: Path, out: Path) -> str:
    words = command.format(dora=home / "dora", base=home / "base", home=home, out=out / "x.safetensors").split()
    return call.good(*words).output


@pytest.mark.parametrize("command", APPLIED, ids=lambda words: words.split()[0])
def test_where_magnitudes_are_applied_nothing_is_said_of_ΔW_alone(command: str, home: Path, tmp_path: Path) -> None:
    assert "alone" not in said(command, home, tmp_path)


@pytest.mark.parametrize("command", ALONE_MEASURED, ids=lambda words: words.split()[0])
def test_where_ΔW_alone_is_measured_it_is_said(command: str, home: Path, tmp_path: Path) -> None:
    assert ALONE in said(command, home, tmp_path)


def test_full_differences_too(home: Path, tmp_path: Path) -> None:
    file = home / "full.safetensors"
    assert "kept and not measured" in call.good("spectrum", file).stderr
    merged = call.good("merge", file, "--base", home / "base", "--allow-missing", "--dry-run")
    assert "not measured" not in merged.output
