"""What `inspect --for peft` says, and what PEFT does with the same folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.bases import edit_config
from tests.cli.command import Command
from tests.marks import when_used

torch = pytest.importorskip("torch")
peft = when_used("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys while loading the checkpoint"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor.s. have invalid shape"),  # a bias on B
]
PREFIX = "base_model.model."
run = Command().run
Tensors = dict[str, Any]


def model() -> Any:
    torch.manual_seed(0)
    parts = {"lin": torch.nn.Linear(6, 6), "act": torch.nn.Tanh(), "head": torch.nn.Linear(6, 3)}
    made = torch.nn.Sequential()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def adapter(folder: Path, **options: Any) -> tuple[Path, Any]:
    """A folder as PEFT writes it, with random numbers in all that it trained, and the outputs of its model."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["lin"], **options}
    trained = peft.get_peft_model(model(), peft.LoraConfig(**options))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += torch.rand_like(parameter)
    trained.eval().save_pretrained(folder)
    return folder, outputs(trained)


def outputs(trained: Any) -> Any:
    with torch.no_grad():
        return trained(torch.linspace(-1, 1, 6)[None])


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def bare(tensors: Tensors) -> Tensors:
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


# name → options of PEFT, a change of the tensors, fields of the configuration, and the code of the refusal
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors] | None, dict[str, Any], str | None]] = {
    "as it was written": ({}, None, {}, None),
    "with a head": ({"modules_to_save": ["head"]}, None, {}, None),
    "no prefix": ({}, bare, {}, "prefix-missing"),
    "no peft_type": ({}, None, {"peft_type": ...}, "config"),
    "DoRA": ({"use_dora": True}, None, {}, None),
    "magnitudes beside use_dora: false": ({"use_dora": True}, None, {"use_dora": False}, "switched-off"),
    "a bias on B beside lora_bias: false": ({"lora_bias": True}, None, {"lora_bias": ...}, "switched-off"),
    "a lost head": ({"modules_to_save": ["head"]}, without("head"), {}, "head-missing"),
    "a head that the base does not have": ({"modules_to_save": ["head"]}, None,
                                           {"modules_to_save": ["head", "classifier", "score"]}, None),
    "another r": ({}, None, {"r": 4}, "rank-disagrees"),
    "a module that is no target": ({"target_modules": ["lin", "head"]}, None, {"target_modules": ["lin"]},
                                   "module-untargeted"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_what_peft_does(case: str, tmp_path: Path) -> None:
    options, change, fields, code = CASES[case]
    folder, trained = adapter(tmp_path / "a", **options)
    if change:
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    edit_config(folder, **fields)
    try:
        applied = torch.allclose(outputs(peft.PeftModel.from_pretrained(model(), folder).eval()), trained, atol=1e-5)
    except (KeyError, RuntimeError, ValueError):
        applied = False
    assert applied == (code is None)
    result = run("inspect", folder, "--for", "peft", "--json")
    errors = [each["code"] for each in json.loads(result.stdout)["adapters"][0]["findings"] if each["level"] == "error"]
    assert (result.exit_code, errors) == ((0, []) if applied else (1, [code]))
