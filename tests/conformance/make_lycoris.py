"""Tiny adapters made by lycoris-lora 4.1.3 itself, and what its own forward pass adds to the weights.

Run by hand: ``python tests/conformance/make_lycoris.py``. All numbers are sixteenths: float32 and float64 agree.
"""

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
OUT, IN, CHANNELS = 8, 12, 6

CASES = {  # folder → arguments of create_lycoris
    "kohya-locon": {"algo": "lora"},
    "kohya-dora": {"algo": "lora", "dora_wd": True},
    "kohya-dora-input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "lycoris-locon-tucker": {"algo": "lora", "use_tucker": True},
    "lycoris-locon-norm": {"algo": "lora", "train_norm": True},
    "lycoris-loha": {"algo": "loha"},
    "lycoris-loha-tucker": {"algo": "loha", "use_tucker": True},
    "lycoris-loha-wide": {"algo": "loha", "linear_dim": 3},
    "lycoris-loha-dora": {"algo": "loha", "dora_wd": True},
    "lycoris-lokr": {"algo": "lokr", "factor": 2, "linear_dim": 1},
    "lycoris-lokr-wide": {"algo": "lokr", "factor": 2},
    "lycoris-lokr-decomposed": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lycoris-lokr-tucker": {"algo": "lokr", "factor": 2, "linear_dim": 1, "use_tucker": True},
    "lycoris-lokr-full": {"algo": "lokr", "full_matrix": True},
    "lycoris-lokr-dora-input": {"algo": "lokr", "factor": 2, "dora_wd": True, "wd_on_output": False},
    "lycoris-full": {"algo": "full"},
}
FOREIGN = {name: {"algo": name} for name in ("glora", "ia3", "diag-oft", "boft", "tlora")}


def sixteenths(shape, generator):
    return (torch.randn(shape, generator=generator) * 8).round() / 16


def base(generator):
    """A linear layer, a 3 × 3 convolution and a norm."""
    model = nn.ModuleDict(
        {"linear": nn.Linear(IN, OUT), "conv": nn.Conv2d(CHANNELS, OUT, 3), "norm": nn.LayerNorm(OUT)}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(sixteenths(parameter.shape, generator))
    return model.double()


def probes():
    """Inputs of which the outputs are the columns of a weight."""
    columns = CHANNELS * 9
    return {
        "linear": torch.eye(IN, dtype=torch.float64),
        "conv": torch.eye(columns, dtype=torch.float64).reshape(columns, CHANNELS, 3, 3),
    }


@torch.no_grad()
def outputs(model):
    """Module → its weight, as its forward pass has it: outputs of the probes less those of zeros, the bias."""
    return {name: (model[name](x) - model[name](0 * x)).reshape(len(x), OUT).T for name, x in probes().items()}


def network(arguments, seed=0):
    """A base model, its outputs, and LyCORIS' network over it, every parameter drawn anew."""
    logging.disable(logging.WARNING)
    from lycoris import LycorisNetwork, create_lycoris

    generator = torch.Generator().manual_seed(seed)
    model = base(generator)
    before = outputs(model)
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d", "LayerNorm"]})
    arguments = {"linear_dim": 2, "linear_alpha": 3, **arguments}
    over = create_lycoris(model, 1.0, arguments.pop("linear_dim"), arguments.pop("linear_alpha"), **arguments)
    over.apply_to()
    over.double()
    with torch.no_grad():
        for name, parameter in over.named_parameters():
            drawn = sixteenths(parameter.shape, generator)
            parameter.copy_(drawn.abs() + 0.5 if "dora_scale" in name else drawn)
    logging.disable(logging.NOTSET)
    return model, before, over


def stored(over):
    """The network's own state dict, as it is saved: float32."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for key, tensor in over.state_dict().items()
    }


def added(model, before, over, *, dora=False):
    """Module → what the forward pass adds to its weight, (out, in · k²); without DoRA's rescaling unless asked for."""
    for module in over.loras:
        if getattr(module, "wd", False):
            module.wd = dora
    after = outputs(model)
    return {f"lycoris_{name}": (after[name] - before[name]).contiguous() for name in before}


def main():
    for case, arguments in CASES.items():
        model, before, over = network(arguments)
        folder = HERE / case
        folder.mkdir(exist_ok=True)
        save_file(stored(over), folder / "adapter_model.safetensors", {"ss_network_module": "lycoris.kohya"})
        save_file(added(model, before, over), folder / "expected.safetensors")
        for file in folder.iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
