"""`loralens.training` against PEFT on one GPU: a Llama made from a configuration, all linear layers, bf16 autocast.

    python -m benchmarks.train_card
    python -m benchmarks.train_card alone peft

The operations of one of our steps, forward and backward, are those that torch's FlopCounterMode counts. Their rate is
reported as a fraction of the card's nominal dense bf16 rate, and of the rate that a product of two 8192 × 8192 matrices
reaches on this card.
"""

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.train_sides import Setting

# The rate of dense bf16 operations, in 10¹² per second, as the maker states it; by a part of torch's name for the card.
# The first match counts, so that "H100 PCIe" must come before "H100".
NOMINAL = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "A10": 125}
GOALS = {"throughput_over_peft": 1.03, "saved_activations_ratio": 1.0, "peak_ratio": 1.03}


@dataclass(frozen=True)
class Size:
    """A Llama and its batch. The default: 1.1 billion parameters, 4 × 1024 tokens."""

    hidden: int = 2048
    inner: int = 5632
    blocks: int = 22
    heads: int = 32
    shared: int = 4  # heads of keys and values
    vocabulary: int = 32000
    batch: int = 4
    length: int = 1024
    product: int = 8192


TINY = Size(hidden=32, inner=48, blocks=2, heads=4, shared=2, vocabulary=64, batch=2, length=16, product=64)


def run(*, runs: int) -> dict[str, object]:
    """The figures, each measured in a process of its own; without a GPU, a note that they are owed."""
    from benchmarks.train import process

    module = "benchmarks.train_card"
    found = process("in-turn", "--turns", str(3 * runs), module=module)
    if "owed" in found:
        return found
    peaks = {side: process("alone", side, module=module)["peak_mib"] for side in ("ours", "peft")}
    return found | {"peak_mib": peaks, "peak_ratio": round(peaks["ours"] / peaks["peft"], 3), "goals": GOALS}


def setting(device: str, size: Size) -> "Setting":
    """A Llama with random weights in bf16, and random tokens: neither changes what a step costs."""
    import torch
    import transformers

    from benchmarks.train_sides import Setting
    from loralens.training.own_loss import own_loss

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.shared,
        max_position_embeddings=size.length,
        use_cache=False,
    )

    def make() -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(size.vocabulary, (size.batch, size.length), generator=generator) for _ in range(4)]
    batches = [{"input_ids": ids.to(device), "labels": ids.to(device)} for ids in drawn]
    tokens = [size.batch * size.length] * len(batches)
    return Setting(make, batches, own_loss, "all-linear", tokens, rank=16, alpha=32.0, lr=2e-4, device=device)


def in_turn(*, turns: int, device: str = "cuda", size: Size | None = None) -> dict[str, object]:
    """The times of all sides, the bytes that a forward pass keeps, and how much of the card's peak rate is used."""
    import peft
    import torch

    from benchmarks import train_sides

    if device == "cuda" and not torch.cuda.is_available():
        return {"owed": "still owed: there is no GPU here that torch can use"}
    size = size or Size()
    one = setting(device, size)
    found = train_sides.in_turn(one, turns=turns).record()
    kept = train_sides.kept(one)
    return {
        "card": torch.cuda.get_device_name(device) if one.cuda else device,
        **found,
        "saved_activations_mib": {side: round(count / 2**20, 2) for side, count in kept.items()},
        "saved_activations_ratio": round(kept["ours"] / kept["peft"], 4),
        **work(one, size, found["milliseconds"]["ours"] / 1e3),  # type: ignore[index]
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def work(one: "Setting", size: Size, seconds: float) -> dict[str, object]:
    """The operations of one of our steps, their number per second, and its fraction of the peak."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.train_sides import by_hand, injected

    model = one.make()
    injected(one, model)
    act = by_hand(one, model)
    with FlopCounterMode(display=False) as counter:
        act(one.batches[0])
    rate, reached = counter.get_total_flops() / seconds / 1e12, product_rate(one, size.product)
    found = {
        "tera_operations_of_a_step": round(counter.get_total_flops() / 1e12, 3),
        "tera_operations_per_second": round(rate, 2),
        "fraction_of_one_large_product": round(rate / reached, 3),
    }
    nominal = nominal_rate(one)
    return found | ({"fraction_of_nominal_bf16_peak": round(rate / nominal, 3)} if nominal else {})


def product_rate(one: "Setting", n: int) -> float:
    """10¹² operations per second in bf16 products of two n × n matrices: the best of five series of ten products."""
    import torch

    X = torch.randn(n, n, device=one.device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        begun = one.wait()
        for _ in range(10):
            X @ X
        best = min(best, (one.wait() - begun) / 10)
    return 2 * n**3 / best / 1e12


def nominal_rate(one: "Setting") -> float | None:
    """The rate that the maker of the card states, or None for a card that `NOMINAL` lacks."""
    import torch

    name = torch.cuda.get_device_name(one.device) if one.cuda else ""
    return next((rate for part, rate in NOMINAL.items() if part in name), None)


def main() -> None:
    """Run everything, or the one measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "in-turn", "alone"), default="all")
    parser.add_argument("side", nargs="?", choices=("ours", "peft"), default="ours")
    parser.add_argument("--turns", type=int, default=21)
    given = parser.parse_args()
    if given.what == "all":
        print(json.dumps(run(runs=max(1, given.turns // 3)), indent=2))
    elif given.what == "in-turn":
        print(json.dumps(in_turn(turns=given.turns)))
    else:
        from benchmarks.train_sides import alone

        print(json.dumps({"peak_mib": round(alone(setting("cuda", Size()), given.side, steps=4), 1)}))


if __name__ == "__main__":
    main()
