"""A look of ``loralens.watching.Watcher`` at an adapter in memory, beside reading its factors once with torch.

    python -m benchmarks.watch

The adapter has the shape of one for a model of 7 B: 224 modules of rank 16, float32, in a torch module. Each look moves
every factor first, so that nothing can be reused. The quantity to compare is a copy of all factors, which no look can
do without.
"""

import json
import statistics
import time

GOAL = 0.5  # seconds of a look without gradients, on two cores
SQUARE = [(4096, 4096)] * 224
LLAMA = [*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)] * 32


def measure(shapes: list[tuple[int, int]], *, looks: int = 7, gradients: bool = False) -> dict[str, float]:
    """Medians of the seconds of a look and of a copy of the factors, by turns."""
    import torch
    from torch import nn

    from loralens.training.initialisation import Pair
    from loralens.training.layers.layer import LinearLayer
    from loralens.watching import Watcher

    torch.manual_seed(0)

    def layer(out: int, in_: int) -> nn.Module:
        # The weight is not read, so that it need not have numbers of its own.
        base = nn.Linear(1, 1, bias=False)
        base.weight = nn.Parameter(torch.zeros(1).expand(out, in_), requires_grad=False)
        # Ill-conditioned, as the factors of trained adapters are: three decades.
        decay = torch.logspace(0, -3, 16)
        return LinearLayer(base, Pair(torch.randn(out, 16) * decay, torch.randn(16, in_)), scale=1.0)

    model = nn.ModuleList(layer(*shape) for shape in shapes)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watcher = Watcher(model, gradients=gradients)
    seconds: dict[str, list[float]] = {"look": [], "copy": [], "cpu": []}
    for step in range(1, looks + 1):
        with torch.no_grad():
            for factor in factors:
                factor.add_(1e-3 * torch.randn(1))
                if gradients:
                    factor.grad = torch.randn_like(factor)
        begun, cpu = time.perf_counter(), time.process_time()
        watcher.look(step)
        seconds["look"].append(time.perf_counter() - begun)
        seconds["cpu"].append(time.process_time() - cpu)
        begun = time.perf_counter()
        _ = [factor.detach().clone() for factor in factors]
        seconds["copy"].append(time.perf_counter() - begun)
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def run(*, runs: int) -> dict[str, object]:
    """Seconds of a look, of its CPU time and of a copy of the factors, and their ratio; in this process."""
    report: dict[str, object] = {"goal_seconds": GOAL}
    for name, shapes, gradients in (
        ("4096 wide", SQUARE, False),
        ("Llama 7 B", LLAMA, False),
        ("4096 wide, with gradients", SQUARE, True),
    ):
        seconds = measure(shapes, looks=runs, gradients=gradients)
        report[name] = {**seconds, "ratio_to_copy": round(seconds["look"] / seconds["copy"], 2)}
    return report


if __name__ == "__main__":
    print(json.dumps(run(runs=7), indent=1))
