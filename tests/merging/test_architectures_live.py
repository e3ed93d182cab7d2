"""Bases as transformers saves them, adapters as PEFT saves them: a merge of the files is what PEFT merges in memory."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.architectures import ARCHITECTURES, Architecture
from tests.bases import stored
from tests.cli.command import Command
from tests.marks import slow_except, when_used
from tests.tolerances import MERGED_BY_PEFT

torch = pytest.importorskip("torch")
peft = when_used("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore"),  # of models with two layers and odd sizes
]
run, done = Command().run, Command().good


def merged_alike(folder: Path, **options: str) -> dict[str, np.ndarray]:
    """Our merge of the files, held against the merged model that PEFT saved."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done("merge", folder / "adapter", "--base", folder / "base", "-o", folder / "ours", *flags)
    ours, theirs = stored(folder / "ours"), stored(folder / "merged")
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        scale = max(np.abs(array).max(), 1e-30)
        np.testing.assert_allclose(ours[key], array, rtol=0, atol=MERGED_BY_PEFT * scale, err_msg=key)
    return theirs


# One of each way to name and to store layers; the others take long together.
QUICK = tuple(one for one in ARCHITECTURES if one.name in {"llama", "gpt2", "t5", "vit", "llava", "mixtral", "gpt-oss"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base, an adapter and what PEFT merges, by the name of the architecture."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        named(name).save(folder)
        return folder

    return save


@pytest.mark.some(4)
@pytest.mark.parametrize("architecture", slow_except(ARCHITECTURES, *QUICK), ids=str)
def test_a_merge_of_the_files_is_peft_s_and_comes_off_again(
    architecture: Architecture, saved: Callable[[str], Path]
) -> None:
    folder = saved(architecture.name)
    theirs, before = merged_alike(folder), stored(folder / "base")
    changed = {key for key, array in theirs.items() if not np.array_equal(array, before[key])}
    assert changed
    if architecture.experts:
        assert any("expert" in key or "put_linear" in key for key in changed)
    beside = ("--base", folder / "base", "--adapter", folder / "adapter")
    verdict = json.loads(done("verify", folder / "ours", *beside, "--json").stdout)
    assert {module["verdict"] for module in verdict["modules"]} == {"exact"}, verdict
    done("unmerge", folder / "ours", "-o", folder / "back")
    for file in (folder / "base").glob("*.safetensors"):
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes()


def named(name):
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


@pytest.mark.some(2)
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


@pytest.mark.some(2)
@pytest.mark.parametrize(("to", "file"), [("mlx", "mlx"), ("gguf", "a.gguf")])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_a_round_through_other_names_is_loaded_by_peft(name, to, file, tmp_path: Path) -> None:
    """PEFT puts single experts together; gate and up, which others hold apart, come back with twice the rank."""
    architecture = named(name)
    architecture.save(tmp_path, target_modules=["q_proj"])
    done("convert", tmp_path / "adapter", "--to", to, "--base", tmp_path / "base", "-o", tmp_path / file)
    done("convert", tmp_path / file, "--to", "peft", "-o", tmp_path / "back")
    (tmp_path / "adapter").rename(tmp_path / "first")
    (tmp_path / "back").rename(tmp_path / "adapter")
    merged_alike(tmp_path)
    model = getattr(transformers, architecture.model).from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    state = adapted.merge_and_unload().state_dict()
    wanted = getattr(transformers, architecture.model).from_pretrained(tmp_path / "merged").state_dict()
    assert set(state) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


EXTRACTED = ["vit", "dinov2-swiglu", "llava", "qwen2-vl", "mixtral", "phimoe", "granitemoe", "jamba", "gpt-oss"]


@pytest.mark.parametrize("name", slow_except(EXTRACTED, "vit", "mixtral"))
def test_peft_loads_what_is_extracted_of_two_stored_models(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, found = saved(name), tmp_path / "extracted"
    done("extract", "--base", folder / "base", "--tuned", folder / "merged", "--rank", 4, "--uniform", "-o", found)
    model = getattr(transformers, named(name).model)
    adapted = peft.PeftModel.from_pretrained(model.from_pretrained(folder / "base"), found)
    state, wanted = adapted.merge_and_unload().state_dict(), model.from_pretrained(folder / "merged").state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
