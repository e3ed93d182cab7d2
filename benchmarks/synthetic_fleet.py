"""A synthetic fleet whose truth is known: families, runs, checkpoints, and copies in other forms.

    python -m benchmarks.synthetic_fleet FOLDER [FAMILIES] [near]

Twenty groups of families share a weak direction. A family shares a strong one, and has eight runs of six checkpoints
and two copies: 50 members. The A of a run stays near its random start. A copy is a checkpoint in another dtype, gauge,
rank or dialect, or with another α. Families are of three shapes. FOLDER/truth.csv says what each adapter is.

Exact cosines in this fleet (10 %, 50 % and 90 % of the pairs), and in 127 published adapters (docs/commands/fleet.md):

==================================================  ====================  =====================================
pairs                                               here                  published
==================================================  ====================  =====================================
of one run (published: one repository, one start)   0.91 / 0.97 / 1.00    0.81 / 0.98 / 1.00
of two runs of a family, equal modules              0.78 / 0.81 / 0.83    −0.02 / 0.00 / 0.57, at most 0.65
of two runs of a family, all and half of the kinds  0.55 / 0.58 / 0.59    none
of two families of a group                          0.17 / 0.24 / 0.26    −0.02 / 0.00 / 0.04, at most 0.44
==================================================  ====================  =====================================

So checkpoints are as alike as real ones, but the runs of a family are far more alike than those of one repository: all
families lie clearly above the level 0.5 at which they are cut, and an adjusted Rand index of 1 says that the grouping
finds such families among thousands, and not that real families are as clear. It was not so from the beginning. In an
earlier version (`NEAR`, the third argument ``near``) the narrow runs adapt only q, one of four kinds in the largest
shape. Their cosine with the other runs is 0.34 to 0.37 there, below the level. The index of all families was 0.955 at
the level 0.5, and 1 at 0.35. The strengths were then changed so that every family reaches the level.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

GROUPS, RUNS, CHECKPOINTS, COPIES = 20, 8, 6, 2
MEMBERS = RUNS * CHECKPOINTS + COPIES
RANK, ALPHA = 8, 16
COPYING = (("dtype", "gauge"), ("rank", "mlx"), ("alpha", "gauge"))  # by number of the family, in turn

NOISE = 0.12  # entries of B that are noise at the beginning of a run

Matrix = NDArray[np.float32]
Factors = dict[str, tuple[Matrix, Matrix]]


@dataclass(frozen=True)
class Model:
    """The adapted layers of a base, (name, out, in), and the first half of their kinds."""

    base: str
    layers: tuple[tuple[str, int, int], ...]
    first_half: tuple[str, ...]


def _model(base: str, blocks: int, width: int, kinds: tuple[str, ...]) -> Model:
    names = tuple((f"layers.{block}.self_attn.{kind}", width, width) for block in range(blocks) for kind in kinds)
    return Model(base, names, kinds[: -(-len(kinds) // 2)])


SMALL = _model("org/llama-768", 6, 768, ("q_proj", "v_proj"))
MIDDLE = _model("org/llama-640", 12, 640, ("q_proj", "k_proj", "v_proj"))
LARGE = _model("org/llama-640", 18, 640, ("q_proj", "k_proj", "v_proj", "o_proj"))


@dataclass(frozen=True)
class Strength:
    """How near the runs of a family are to each other.

    Attributes
    ----------
    own : float, float
        The weight of the directions of a run at its beginning, and how much it grows; the weight of the family is 0.9.
    start : float
        Entries of the random start of A over those of the directions in it.
    kinds : int, optional
        How many kinds of layers a narrow run adapts; by default the first half of them.
    """

    own: tuple[float, float]
    start: float
    kinds: int | None = None


CLEAR, NEAR = Strength((0.2, 0.15), 0.2), Strength((0.25, 0.2), 0.3, kinds=1)


@dataclass(frozen=True)
class Truth:
    """What an adapter is: its group, family and run, and the adapter that it copies, if any."""

    name: str
    group: int
    family: int
    run: int
    copy_of: str = ""


def make(folder: Path, *, families: int = 200, seed: int = 7, strength: Strength = CLEAR) -> list[Truth]:
    """Write the fleet, unless it is there already, and say what each adapter is."""
    listed = folder / "truth.csv"
    if listed.exists():
        with listed.open(newline="") as stream:
            known = [Truth(name, int(g), int(f), int(r), copy) for name, g, f, r, copy in csv.reader(stream)]
        if len(known) == families * MEMBERS:
            return known
    folder.mkdir(parents=True, exist_ok=True)
    shared = [_shared(group, seed) for group in range(GROUPS)]
    truth = []
    for family in range(families):
        for entry, factors, options in _family(family, *shared[family % GROUPS], seed, strength):
            write(folder / entry.name, factors, **options)
            truth.append(entry)
    with listed.open("w", newline="") as stream:
        csv.writer(stream).writerows((t.name, t.group, t.family, t.run, t.copy_of) for t in truth)
    return truth


def _shared(group: int, seed: int) -> tuple[Model, Factors]:
    """The model of a group, and the direction that its families share."""
    model = SMALL if group < 14 else MIDDLE if group < 18 else LARGE
    rng = np.random.default_rng([seed, group])
    return model, {name: _pair(rng, out, in_, 2) for name, out, in_ in model.layers}


def _pair(rng: np.random.Generator, out: int, in_: int, rank: int) -> tuple[Matrix, Matrix]:
    return rng.standard_normal((out, rank), np.float32), rng.standard_normal((rank, in_), np.float32)


def _family(
    family: int, model: Model, weak: Factors, seed: int, strength: Strength
) -> Iterator[tuple[Truth, Factors, Mapping[str, Any]]]:
    """The adapters of a family with their factors and how they are written."""
    rng = np.random.default_rng([seed, GROUPS, family])
    group = family % GROUPS
    strong = {name: _pair(rng, out, in_, 2) for name, out, in_ in model.layers}
    members = []
    for run in range(RUNS):
        # In every third family half of the runs adapt only some of the kinds.
        few = family % 3 == 0 and run % 2 == 1
        layers = [layer for layer in model.layers if not few or layer[0].endswith(model.first_half[: strength.kinds])]
        own = {name: _pair(rng, out, in_, 4) for name, out, in_ in layers}
        # Where A is turned, the directions that runs share are in no row of it, as in training.
        turns = {name: np.linalg.qr(rng.standard_normal((RANK, RANK)))[0].astype(np.float32) for name, *_ in layers}
        starts = {name: strength.start * rng.standard_normal((RANK, in_), np.float32) for name, _, in_ in layers}
        dtype = np.float16 if rng.random() < 0.8 else np.float32
        for checkpoint in range(CHECKPOINTS):
            share = (checkpoint + 1) / CHECKPOINTS
            factors = {}
            for name, *_ in layers:
                weights = (0.6, 0.9, strength.own[0] + strength.own[1] * share)
                parts = (weak[name], strong[name], own[name])
                B = np.concatenate([w * b for w, (b, _) in zip(weights, parts, strict=True)], axis=1) * share**0.5
                B = B + NOISE * (1 - share) * rng.standard_normal(B.shape, np.float32)
                A = np.concatenate([a for _, a in parts])
                turned = (B @ turns[name].T).astype(np.float32), turns[name] @ A + starts[name]
                factors[name] = (np.float32(0.01) * turned[0], np.float32(0.03) * turned[1])
            truth = Truth(f"f{family:03d}_r{run}_c{checkpoint}", group, family, family * RUNS + run)
            members.append((truth, factors))
            yield truth, factors, {"base": model.base, "dtype": dtype}
    for number, how in enumerate(COPYING[family % len(COPYING)]):
        original, factors = members[int(rng.integers(len(members)))]
        copy = Truth(f"f{family:03d}_dup{number}", group, family, original.run, original.name)
        yield copy, *_copied(how, factors, model.base, rng)


def _copied(how: str, factors: Factors, base: str, rng: np.random.Generator) -> tuple[Factors, Mapping[str, Any]]:
    """The same ΔW in another form."""
    if how == "dtype":
        return factors, {"base": base, "dtype": np.float32}
    if how == "mlx":
        return factors, {"base": base, "dtype": np.float16, "dialect": "mlx"}
    if how == "alpha":
        doubled = {name: (np.float32(2) * B, A) for name, (B, A) in factors.items()}
        return doubled, {"base": base, "dtype": np.float32, "alpha": ALPHA // 2}
    rank = 2 * RANK if how == "rank" else RANK
    turned = {}
    for name, (B, A) in factors.items():
        Q = np.linalg.qr(rng.standard_normal((rank, RANK)))[0].astype(np.float32)
        turned[name] = (B @ Q.T, Q @ A)
    return turned, {"base": base, "dtype": np.float32, "rank": rank, "alpha": 2 * rank}


def write(
    folder: Path,
    factors: Factors,
    *,
    base: str,
    dtype: Any,
    rank: int = RANK,
    alpha: int = ALPHA,
    dialect: str = "peft",
) -> None:
    """Write an adapter as PEFT or mlx-lm does, without any code of loralens."""
    folder.mkdir(exist_ok=True)
    kinds = sorted({name.rpartition(".")[2] for name in factors})
    tensors: dict[str, NDArray[Any]] = {}
    if dialect == "mlx":
        for name, (B, A) in factors.items():
            tensors[f"model.{name}.lora_a"] = np.ascontiguousarray(A.T.astype(dtype))
            tensors[f"model.{name}.lora_b"] = np.ascontiguousarray(B.T.astype(dtype))
        parameters = {"rank": rank, "scale": alpha / rank, "dropout": 0.0}
        config = {"fine_tune_type": "lora", "model": base, "num_layers": 99, "lora_parameters": parameters}
        save_file(tensors, folder / "adapters.safetensors")
    else:
        for name, (B, A) in factors.items():
            tensors[f"base_model.model.model.{name}.lora_A.weight"] = A.astype(dtype)
            tensors[f"base_model.model.model.{name}.lora_B.weight"] = B.astype(dtype)
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha}
        config |= {"target_modules": kinds, "task_type": "CAUSAL_LM"}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    chosen = NEAR if sys.argv[3:] == ["near"] else CLEAR
    made = make(Path(sys.argv[1]), families=int(sys.argv[2]) if len(sys.argv) > 2 else 200, strength=chosen)
    print(f"{len(made)} adapters")
