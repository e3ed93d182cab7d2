"""Train the small adapters of this folder: ``python -m tests.trained.make`` (a minute on two cores).

Every model is tiny, made from a configuration, and reads the project's own documents as bytes. What each module's ΔW is
was asked of the software that trained it (`get_delta_weight` of PEFT, or the layer's own arithmetic) and stands in
``expected.json`` as its norm, its singular values and some entries. loralens has no part in this file.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
TEXT = HERE.parents[1] / "LICENSE"
STEPS, BATCH, LENGTH = 40, 8, 32
ENTRIES = 6  # of a module that are kept one by one
Deltas = dict[str, Tensor]


def batches(seed: int) -> Iterator[Tensor]:
    """Windows of the text, as bytes."""
    data = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator).tolist()
        yield torch.stack([data[start : start + LENGTH] for start in starts])


def train(model: nn.Module, loss: Callable[[Tensor], Tensor], *, steps: int = STEPS, lr: float = 1e-2) -> None:
    """AdamW on what requires a gradient."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _, batch in zip(range(steps), batches(0), strict=False):
        value = loss(batch)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    print(f"  loss {float(value.detach()):.3f}")


def deltas(model: Any) -> Deltas:
    """ΔW of every module as PEFT computes it, in the orientation of the base's weight."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach().float()
            found[name] = delta.T if isinstance(layer.get_base_layer(), nn.Embedding) else delta
    return found


def causal(model: Any) -> Callable[[Tensor], Tensor]:
    """The loss of a causal language model."""
    return lambda batch: model(input_ids=batch, labels=batch).loss


def write_expected(folder: str, found: Mapping[str, Tensor]) -> None:
    """Add one folder to what is expected: in the orientation (out, in), as the files' B and A have it."""
    path = HERE / "expected.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[folder] = {name: described(delta) for name, delta in found.items()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def described(delta: Tensor) -> dict[str, Any]:
    """A matrix by its shape, norm, singular values and some entries."""
    matrix = delta.double().reshape(delta.shape[0], -1)
    s = torch.linalg.svdvals(matrix)
    places = np.random.default_rng(0).integers(matrix.numel(), size=ENTRIES).tolist()
    return {
        "shape": list(matrix.shape),
        "norm": float(matrix.norm()),
        "singular_values": [float(value) for value in s[s > 1e-5 * s[0].clamp(min=1e-30)]],
        "entries": {str(place): float(matrix.flatten()[place]) for place in places},
    }


def folder_of(name: str) -> Path:
    """An empty folder."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir(parents=True)
    return HERE / name


def clean(folder: Path) -> None:
    """Leave the weights and the configuration; the base was made here and has no name."""
    for path in folder.iterdir():
        if not path.name.startswith("adapter_") and path.name != "trainer_state.json":
            path.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny/made-here"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def gpt2_conv1d() -> None:
    """GPT-2 keeps its linear weights as (in, out); ranks and α differ between modules."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=24, n_layer=2, n_head=2))
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM",
        rank_pattern={"c_fc": 2}, alpha_pattern={"h.1.mlp.c_fc": 5},
    )  # fmt: skip
    model = get_peft_model(base, config)
    train(model, causal(model))
    folder = folder_of("gpt2-conv1d")
    model.save_pretrained(folder)
    clean(folder)
    write_expected(folder.name, {name: delta.T for name, delta in deltas(model).items()})


def bert_rslora_run() -> None:
    """Three checkpoints of a run with rsLoRA, biases and a classifier, as pickles with the trainer's state."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=256, max_position_embeddings=LENGTH, **shape))
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, bias="lora_only", target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config)

    def loss(batch: Tensor) -> Tensor:  # does the window hold a capital letter early?
        labels = ((batch[:, :4] > 64) & (batch[:, :4] < 91)).any(dim=1).long()
        found: Tensor = model(input_ids=batch, labels=labels).loss
        return found

    shutil.rmtree(HERE / "bert-rslora-run", ignore_errors=True)
    history = []
    for step in (20, 40, 60):
        train(model, loss, steps=20, lr=2e-2)
        folder = folder_of(f"bert-rslora-run/checkpoint-{step}")
        model.save_pretrained(folder, safe_serialization=False)
        history.append({"step": step, "loss": 1 / step, "epoch": step / 20})
        state = {"global_step": step, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state) + "\n")
        clean(folder)
        write_expected(f"bert-rslora-run/checkpoint-{step}", deltas(model))


class Merged(nn.Module):
    """A fused projection of n blocks of which some are adapted by one grouped pair, as old PEFT and loralib have it."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, enabled: list[bool]) -> None:
        super().__init__()
        self.base, self.enabled, self.scale = base, enabled, alpha / r
        blocks, height = sum(enabled), base.out_features // len(enabled)
        self.lora_A = nn.Parameter(torch.randn(r * blocks, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(height * blocks, r, 1))

    def delta(self) -> Tensor:
        """ΔW of the whole projection, zero where a block is not adapted."""
        height = self.base.out_features // len(self.enabled)
        found = torch.zeros(self.base.out_features, self.base.in_features)
        which = [block for block, here in enumerate(self.enabled) if here]
        r = self.lora_B.shape[1]
        for i, block in enumerate(which):
            B, A = self.lora_B[i * height : (i + 1) * height, :, 0], self.lora_A[i * r : (i + 1) * r]
            found[block * height : (block + 1) * height] = self.scale * (B @ A)
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + x @ self.delta().T
        return found


def bloom_merged() -> None:
    """BLOOM's fused query, key and value with two of three adapted, as PEFT 0.1 saved them: B has three dimensions."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(3)
    base = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=16, n_layer=2, n_head=2))
    base.requires_grad_(requires_grad=False)
    for block in base.transformer.h:
        fused = block.self_attention.query_key_value
        block.self_attention.query_key_value = Merged(fused, 2, 8, [True, False, True])
    train(base, causal(base))
    folder = folder_of("bloom-merged")
    tensors, found = {}, {}
    for i, block in enumerate(base.transformer.h):
        layer = block.self_attention.query_key_value
        name = f"transformer.h.{i}.self_attention.query_key_value"
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().clone()
        found[name] = layer.delta().detach()
    torch.save(tensors, folder / "adapter_model.bin")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["query_key_value"], "bias": "none",
        "enable_lora": [True, False, True], "merge_weights": False, "fan_in_fan_out": True, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    clean(folder)
    write_expected(folder.name, found)


def llama(folder: str, **more: Any) -> tuple[Any, Path]:
    """A tiny Llama with a trained adapter, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    shape = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=1, **shape))
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | more))
    train(model, causal(model))
    path = folder_of(folder)
    model.save_pretrained(path)
    clean(path)
    write_expected(folder, deltas(model))
    return model, path


def llama_dora() -> None:
    """DoRA, with an embedding that is adapted too."""
    llama("llama-dora", use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])


def llama_mlx() -> None:
    """The same kind of adapter as mlx-lm keeps a run: factors transposed, a raw scale, a file every so many steps."""
    model, path = llama("llama-mlx", target_modules=["q_proj", "v_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    shutil.rmtree(path)
    path.mkdir()
    stored = {}
    for key, tensor in tensors.items():
        name, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        stored[f"{name}.{half.lower()}"] = tensor.T.contiguous()
    save_file(stored, path / "adapters.safetensors")
    for step, part in ((10, 0.4), (20, 0.8)):
        early = {key: part * tensor if key.endswith("lora_b") else tensor for key, tensor in stored.items()}
        save_file(early, path / f"{step:07}_adapters.safetensors")
    config = {
        "fine_tune_type": "lora", "num_layers": 2, "model": "tiny/made-here",
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_expected("llama-mlx", deltas(model))


def opt_bf16_partly_zero() -> None:
    """bfloat16, an adapter of which one block was never trained: its B is zero."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(5)
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = OPTForCausalLM(OPTConfig(vocab_size=256, max_position_embeddings=LENGTH, word_embed_proj_dim=16, **shape))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(requires_grad=False)
    train(model, causal(model))
    model = model.to(torch.bfloat16)
    folder = folder_of("opt-bf16-partly-zero")
    model.save_pretrained(folder)
    clean(folder)
    found = {}
    for name, layer in model.base_model.model.named_modules():  # float32: PEFT's own product would be rounded to bf16
        if hasattr(layer, "lora_A"):
            B, A = layer.lora_B["default"].weight.float(), layer.lora_A["default"].weight.float()
            found[name] = (layer.scaling["default"] * (B @ A)).detach()
    write_expected(folder.name, found)


def unet() -> None:
    """A UNet's attention and convolutions, trained once and kept by kohya's names and by diffusers'."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(6)
    base = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"])
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)

    def loss(batch: Tensor) -> Tensor:
        noise = torch.randn((2, 4, 8, 8), generator=generator)
        words = torch.nn.functional.one_hot(batch[:2, :5] % 12, 12).float()
        found: Tensor = (model(noise, 10, encoder_hidden_states=words).sample - 0.3 * noise.flip(2)).pow(2).mean()
        return found

    train(model, loss)
    kohya: dict[str, Tensor] = {}
    diffusers: dict[str, Tensor] = {}
    named: Deltas = {}
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        short = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{short}.lora_down.weight": A.half(), f"{short}.lora_up.weight": B.half()}
        kohya[f"{short}.alpha"] = torch.tensor(3.0)
        diffusers |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
        halves = [x.half().double().flatten(1) for x in (B, A)]
        named[short] = layer.scaling["default"] * (halves[0] @ halves[1])
    write_expected("unet-kohya", named)
    write_expected("unet-diffusers", {f"unet.{name}": delta.flatten(1) for name, delta in deltas(model).items()})
    save_file(
        {key: tensor.contiguous() for key, tensor in kohya.items()},
        folder_of("unet-kohya") / "trained.safetensors",
        metadata={"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3"},
    )
    rows = {"r": 2, "lora_alpha": 3, "target_modules": sorted(config.target_modules)}
    save_file(
        {key: tensor.contiguous() for key, tensor in diffusers.items()},
        folder_of("unet-diffusers") / "pytorch_lora_weights.safetensors",
        metadata={"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in rows.items()})},
    )


def mixtral_experts() -> None:
    """Expert stacks, adapted as PEFT's ``target_parameters``."""
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=256, num_key_value_heads=1, num_local_experts=3, **shape))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=parameters))
    train(model, causal(model))
    folder = folder_of("mixtral-experts")
    model.save_pretrained(folder)
    clean(folder)
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, ParamWrapper):
            module = name.replace(".base_layer", "")
            for expert, delta in enumerate(layer.get_delta_weight("default").detach()):
                found[f"{module}.{layer.parameter_name}[{expert}]"] = delta
    write_expected(folder.name, found)


def roberta_loralib() -> None:
    """loralib's state dict: no scale in it, and a head that rides along."""
    torch.manual_seed(8)
    tensors, found = {}, {}
    layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)]).requires_grad_(requires_grad=False)
    A = nn.ParameterList([torch.randn(4, 16) / 4 for _ in range(4)])
    B = nn.ParameterList([torch.zeros(16, 4) for _ in range(4)])
    head, embed = nn.Linear(16, 256), nn.Embedding(256, 16).requires_grad_(requires_grad=False)

    def loss(batch: Tensor) -> Tensor:
        x = embed(batch[:, :-1])
        for layer, a, b in zip(layers, A, B, strict=True):
            x = x + torch.tanh(layer(x) + 2.0 * x @ a.T @ b.T)
        found: Tensor = nn.functional.cross_entropy(head(x).flatten(0, 1), batch[:, 1:].flatten())
        return found

    train(nn.ModuleList([A, B, head]), loss)
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        name = f"roberta.encoder.layer.{i // 2}.attention.self.{('query', 'value')[i % 2]}"
        tensors |= {f"{name}.lora_A": a.detach().clone(), f"{name}.lora_B": b.detach().clone()}
        found[name] = 2.0 * (b @ a).detach()
    tensors |= {
        "classifier.out_proj.weight": head.weight.detach()[:2],
        "classifier.out_proj.bias": head.bias.detach()[:2],
    }
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    torch.save(tensors, folder_of("roberta-loralib") / "roberta_lora.bin")
    write_expected("roberta-loralib", found)


def main() -> None:
    """All of them."""
    torch.set_num_threads(1)
    (HERE / "expected.json").unlink(missing_ok=True)
    for make in (
        gpt2_conv1d, bert_rslora_run, bloom_merged, llama_dora, llama_mlx, opt_bf16_partly_zero, unet, mixtral_experts,
        roberta_loralib,
    ):  # fmt: skip
        print(make.__name__)
        make()


if __name__ == "__main__":
    main()
