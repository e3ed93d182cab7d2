"""Bases as transformers saves them, adapters as PEFT saves them: a merge of the files is what PEFT merges in memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.architectures import ARCHITECTURES
from tests.cli.command import Command
from tests.cli.test_merge import loaded
from tests.formats.conftest import quiet_torch
from tests.tolerances import MERGED_BY_PEFT

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

__all__ = ["quiet_torch"]
pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore"),  # of models with two layers and odd sizes
]
run, done = Command().run, Command().good


def merged_alike(folder: Path, **options: str) -> dict[str, np.ndarray]:
    """Our merge of the files, held against the merged model that PEFT saved."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done("merge", folder / "adapter", "--base", folder / "base", "-o", folder / "ours", *flags)
    ours, theirs = loaded(folder / "ours"), loaded(folder / "merged")
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        scale = max(np.abs(array).max(), 1e-30)
        np.testing.assert_allclose(ours[key], array, rtol=0, atol=MERGED_BY_PEFT * scale, err_msg=key)
    return theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_merge_of_the_files_is_peft_s_and_comes_off_again(architecture, tmp_path: Path) -> None:
    architecture.save(tmp_path)
    theirs, before = merged_alike(tmp_path), loaded(tmp_path / "base")
    changed = {key for key, array in theirs.items() if not np.array_equal(array, before[key])}
    assert changed
    if architecture.experts:
        assert any("expert" in key or "put_linear" in key for key in changed)
    verdict = json.loads(
        done(
            "verify", tmp_path / "ours", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--json"
        ).stdout
    )
    assert {module["verdict"] for module in verdict["modules"]} == {"exact"}, verdict
    done("unmerge", tmp_path / "ours", "-o", tmp_path / "back")
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def named(name):
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"bias": "all"}),
        ("vit", {"use_dora": True}),
        ("vit", {"modules_to_save": ["classifier"], "target_modules": ["q_proj", "fc2"]}),
        ("llava", {"bias": "lora_only"}),
        ("mixtral", {"target_parameters": ["gate.weight", "down_proj"], "target_modules": ["q_proj"]}),
        ("mixtral", {"target_parameters": ["gate_up_proj"], "target_modules": [], "use_rslora": True}),
        ("qwen3-moe", {"target_parameters": ["down_proj"], "target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_else_an_adapter_carries_goes_to_the_stored_names_too(name, changes, tmp_path: Path) -> None:
    named(name).save(tmp_path, **changes)
    merged_alike(tmp_path)
