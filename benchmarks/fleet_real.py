"""Published adapters: how far the cosines of sketches are from exact ones, and whether they find the best neighbour.

    python -m benchmarks.fleet_real FOLDER

The exact cosines are computed here, from the factors and with no code of `loralens.fleet` but the keys of modules.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GOALS = {"error_mean": 0.013, "error_max": 0.06, "neighbours_within_001": 0.95}
NEAR = 0.01  # loss of cosine of the best neighbour by sketch that does not count


def run(folder: Path) -> dict[str, object]:
    """The errors of all pairs of adapters with ΔW ≠ 0, and the share of neighbours that are as good as the best."""
    import loralens

    with tempfile.TemporaryDirectory() as home:
        fleet = loralens.Fleet.open(Path(home) / "index")
        fleet.update(folder)
        members, sketches = fleet.snapshot()
        rows = [i for i, member in enumerate(members) if member.frobenius > 0]
        directions = sketches.directions(rows=rows)
        pairs = [factors(fleet.adapter(members[i]), fleet) for i in rows]
    exact = cosines(pairs)
    estimated = (directions @ directions.T).astype(np.float64)
    upper = np.triu_indices(len(rows), 1)
    errors = np.abs(estimated - exact)[upper]
    for matrix in (estimated, exact):
        np.fill_diagonal(matrix, -2)
    chosen = exact[np.arange(len(rows)), estimated.argmax(axis=1)]
    return {
        "goals": GOALS,
        "adapters": len(rows),
        "pairs": len(errors),
        "error_mean": round(float(errors.mean()), 4),
        "error_max": round(float(errors.max()), 4),
        "neighbours_within_001": round(float(np.mean(exact.max(axis=1) - chosen <= NEAR)), 3),
    }


Factors = dict[tuple[str, int, int], tuple[NDArray[np.float64], NDArray[np.float64]]]


def factors(adapter: object, fleet: object) -> Factors:
    """Key and shape → scale·B and A, or ΔW and the identity where there are no factors."""
    found: Factors = {}
    for key, name in fleet.modules(adapter).items():  # type: ignore[attr-defined]
        module = adapter.modules[name]  # type: ignore[attr-defined]
        try:
            B, A = module.scale * module.B.astype(np.float64), module.A.astype(np.float64)
        except Exception:  # noqa: BLE001  # an update that is kept in another form has no factors
            B, A = module.dense(), np.eye(module.shape[1])
        found[key, *module.shape] = B, A
    return found


def cosines(pairs: list[Factors]) -> NDArray[np.float64]:
    """The exact cosines of whole updates: a module that one of two adapters lacks counts as 0."""
    inner = np.zeros((len(pairs), len(pairs)))
    having: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for i, each in enumerate(pairs):
        for key in each:
            having[key].append(i)
    for key, members in having.items():
        B = np.hstack([pairs[i][key][0] for i in members])
        A = np.vstack([pairs[i][key][1] for i in members])
        starts = np.cumsum([0, *(pairs[i][key][1].shape[0] for i in members)])[:-1]
        products = (B.T @ B) * (A @ A.T)
        inner[np.ix_(members, members)] += np.add.reduceat(np.add.reduceat(products, starts, 0), starts, 1)
    lengths = np.sqrt(np.diag(inner))
    return inner / np.outer(lengths, lengths)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1])), indent=1))
