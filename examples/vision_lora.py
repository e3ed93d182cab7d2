"""LoRA beyond language: a small convolutional net that reads digits learns digits that it cannot read.

    python examples/vision_lora.py out/vision            half a minute on one core
    python examples/vision_lora.py out/vision --quick    ten seconds

The base learns the 8 × 8 digits of scikit-learn (``pip install 'loralens[examples]'``), upright and bright on dark.
The two tasks use the same digits, turned by 90° or inverted; the base reads few of these. LoRA layers on the
convolutions and the last layer learn each task, and full fine-tuning learns it for comparison. Then the adapters are
examined, compressed, combined and merged with the tools of loralens. Equal seeds give equal files.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loralens
from loralens.core.attached import Attachment
from loralens.tables.numbers import fixed
from loralens.tables.text import lay_out
from loralens.training import Course, fit
from loralens.training.feed import shuffle_order

Images = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [0, 1], and the digits (n,)
TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda images: torch.rot90(images, 1, (2, 3)),
    "inverted": lambda images: 1 - images,
}
percent = fixed(".1%")
TARGETS = ("conv1", "conv2", "conv3", "head")
RANK, ALPHA = 4, 8.0
BATCH, HELD_OUT = 64, 500
BASE_LR, FULL_LR, LORA_LR = 3e-3, 6e-3, 1e-2  # each is among the best of a few values on a logarithmic grid


@dataclass(frozen=True)
class Size:
    """The size of the example: channels of the net, and training steps of the base and of each task."""

    channels: int = 32
    base_steps: int = 600
    steps: int = 300


QUICK = Size(channels=16, base_steps=200, steps=200)


class DigitNet(nn.Module):
    """Three convolutions, max pooling, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = torch.relu(conv(x))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def digits(shift: Callable[[Tensor], Tensor] = lambda images: images) -> tuple[Images, Images]:
    """The training digits and the held-out digits of a task; the split is always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f"the digits come with scikit-learn ({error}): pip install 'loralens[examples]'") from error
    found = load_digits()
    images = shift(torch.tensor(found.images[:, None] / 16, dtype=torch.float32))
    labels = torch.tensor(found.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    learned, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return (images[learned], labels[learned]), (images[held_out], labels[held_out])


def batches(learned: Images, seed: int) -> Callable[[int], Images]:
    """A function from the number of a batch to the batch; the digits are shuffled again in every epoch."""
    order = shuffle_order(len(learned[1]), size=BATCH, seed=seed)
    return lambda number: (learned[0][order(number)], learned[1][order(number)])


def loss(model: nn.Module, batch: Images) -> Tensor:
    """The mean of −ln p(digit)."""
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, held_out: Images) -> float:
    """The share of digits that are read correctly."""
    with torch.no_grad():
        return float((model(held_out[0]).argmax(-1) == held_out[1]).float().mean())


def trained_in_full(model: nn.Module, learned: Images, *, steps: int, lr: float) -> nn.Module:
    """The same model after training all its parameters; the learning rate falls linearly to 0."""
    optimiser, batch = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), batches(learned, 0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss(model, batch(step)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def net(size: Size, weights: Path | None = None) -> DigitNet:
    """A net with the weights of a file, or with random weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitNet(size.channels)
    if weights:
        model.load_state_dict(load_file(weights))
    return model.eval()


def base(size: Size, folder: Path) -> Path:
    """The weights of a net that reads upright digits, as a file."""
    model = trained_in_full(net(size), digits()[0], steps=size.base_steps, lr=BASE_LR)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def adapted(size: Size, weights: Path, learned: Images, *, seed: int) -> loralens.Adapter:
    """The adapter that LoRA layers on every convolution and the last layer learn for a task."""
    course = Course(steps=size.steps, lr=LORA_LR, schedule="linear")
    given: dict[str, Any] = {"targets": TARGETS, "rank": RANK, "alpha": ALPHA, "seed": seed}
    return fit(
        net(size, weights), batches(learned, seed), course=course, loss=loss, base_model="digits", **given
    ).adapter


def accuracy_with(size: Size, weights: Path, adapter: Path, held_out: Images) -> float:
    """The share of digits that the base reads correctly with the adapter of a file attached."""
    model = net(size, weights)
    with Attachment(model, loralens.load(adapter)).on():
        return accuracy(model, held_out)


def tool(verb: str, *inputs: Path | tuple[Path, float], **options: Any) -> Any:
    """Call a function of loralens, print the call and its tables, and return its result."""
    words = [*map(written, inputs), *(f"{name}={written(value)}" for name, value in options.items())]
    print(f"\n>>> loralens.{verb}({', '.join(words)})")
    result = getattr(loralens, verb)(*inputs, **options)
    tables = (f"{lay_out(table)}\n" for table in result.tables() if table.rows)
    print(*result.conclusion(), *tables, *result.sentences(), sep="\n")
    return result


def written(value: Any) -> str:
    """A value as it is written in Python code; a path is written as a string."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))})"
    return repr(str(value) if isinstance(value, Path) else value)


def learn(size: Size, out: Path) -> dict[str, float]:
    """Train the base and the adapters, and print their accuracies."""
    weights = base(size, out / "base")
    whole = sum(p.numel() for p in net(size).parameters())
    upright = digits()[1]
    found = {"base on upright": accuracy(net(size, weights), upright)}
    print(f"The base, {whole:,} parameters, reads {percent(found['base on upright'])} of {HELD_OUT} upright digits.\n")
    print(f"{'':10s}{'base':>8s}{'full fine-tuning':>18s}{'LoRA':>8s}")
    for task, shift in TASKS.items():
        learned, held_out = digits(shift)
        full = trained_in_full(net(size, weights), learned, steps=size.steps, lr=FULL_LR)
        adapter = adapted(size, weights, learned, seed=0)
        loralens.save(adapter, out / task, overwrite=True)
        scores = {
            "base": accuracy(net(size, weights), held_out),
            "full": accuracy(full, held_out),
            "lora": accuracy_with(size, weights, out / task, held_out),
        }
        found |= {f"{who} on {task}": score for who, score in scores.items()}
        print(f"{task:10s}{percent(scores['base']):>8s}{percent(scores['full']):>18s}{percent(scores['lora']):>8s}")
    trained = sum(module.B.size + module.A.size for module in adapter.modules.values())
    print(f"{'trained':10s}{'':8s}{whole:18,}{trained:8,}  parameters")
    loralens.save(adapted(size, weights, digits(TASKS["turned"])[0], seed=1), out / "turned-1", overwrite=True)
    return found | {"parameters": whole, "trained": trained}


def look(out: Path) -> None:
    """Examine the adapters, and their effect on the base."""
    base_folder = out / "base"
    print("\nHow large is ΔW, and how many directions does it have? A convolution is a matrix (out, in · k · k).")
    tool("spectrum", out / "turned", base=base_folder)
    print("\nDo two seeds find the same update? z: how far the cosine is from chance, in standard deviations.")
    tool("similarity", out / "turned", out / "turned-1")
    print("\nIs W stronger along the directions of ΔW than along random ones (excess above 1)? Are they its strongest?")
    tool("amplify", out / "turned", base=base_folder)
    print("\nDoes W + ΔW have leading directions that W does not have?")
    tool("intruders", out / "turned", base=base_folder, cache=out / "cache")
    print("\nIs anything wrong with it?")
    tool("doctor", out / "turned", base=base_folder)


def remake(size: Size, out: Path) -> dict[str, float]:
    """Compress and combine the adapters, merge one and unmerge it; return the accuracies."""
    weights, found = out / "base" / "model.safetensors", {}
    held_out = {task: digits(shift)[1] for task, shift in TASKS.items()}

    def read(adapter: str, task: str) -> float:
        return accuracy_with(size, weights, out / adapter, held_out[task])

    print("\nIs half the rank enough?")
    tool("compress", out / "turned", rank=RANK // 2, output=out / "turned-half", overwrite=True)
    found["half on turned"] = read("turned-half", "turned")
    print(f"It reads {percent(found['half on turned'])} of the turned digits.")

    print("\nOne adapter for both tasks?")
    tool("combine", (out / "turned", 0.5), (out / "inverted", 0.5), output=out / "both", overwrite=True)
    found |= {f"both on {task}": read("both", task) for task in TASKS}
    print(
        f"It reads {percent(found['both on turned'])} of the turned digits and {percent(found['both on inverted'])} of "
        "the inverted ones. The two updates hardly overlap,\n"
        "but each is about as large as the weights that it changes, so their effects on the output do not add up."
    )

    print("\nCan it be merged into the base, verified, and removed again?")
    tool("merge", out / "turned", base=out / "base", output=out / "merged", overwrite=True)
    tool("verify", out / "merged", adapter=out / "turned", base=out / "base")
    found["merged on turned"] = accuracy(net(size, out / "merged" / "model.safetensors"), held_out["turned"])
    tool("unmerge", out / "merged", output=out / "restored", overwrite=True)
    same = digest(out / "restored" / "model.safetensors") == digest(weights)
    said = "equals the base bit for bit" if same else "differs from the base"
    print(f"The merged model reads {percent(found['merged on turned'])}; the unmerged one {said}.")
    return found | {"restored": same}


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def main(out: Path, size: Size) -> dict[str, float]:
    """Run the whole example, print it, and return the scores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the net is small, and sums do not depend on the number of cores
    try:
        found = learn(size, out)
        look(out)
        return found | remake(size, out)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/vision"))
    parser.add_argument("--quick", action="store_true", help="a smaller net, fewer steps")
    given = parser.parse_args()
    main(given.out, QUICK if given.quick else Size())
