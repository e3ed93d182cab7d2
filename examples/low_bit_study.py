"""How much of an adapter survives a merge into a base of 4 bits: SmolLM2-135M, six adapters, six ways to merge.

    python examples/low_bit_study.py            trains what is missing under out/low_bit; an hour or two on two cores
    python examples/low_bit_study.py --quick    one adapter, few texts

Every adapter is trained once, with `loralens train`, on the decoded weights of the base, and merged into the codes of
the base in each way. A way that draws random numbers is repeated with three seeds. The reference is the base with the
adapter beside its weights (unmerged), in float32. *Kept* is the share of the adapter's benefit on held-out texts of
its domain: (loss of the base − loss of the merged model) / (loss of the base − loss unmerged). KL is the divergence
KL(unmerged ‖ merged) for each token, on held-out texts of the domain and on Python's help, which no adapter was
trained on. Everything that was measured is kept, and an interrupted study continues.

Writes reports/low_bit.md, its numbers in reports/low_bit.json, and a figure.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runs import asked, quiet

os.environ.update(quiet())  # before torch is there

from low_bit_bases import MODEL, base
from low_bit_merges import Sums, Way, merge
from low_bit_texts import FOLDER, domain, elsewhere, general

import loralens


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Attributes
    ----------
    texts : str
        Its domain.
    length : int
        Tokens after which a text is cut.
    """

    texts: str
    targets: str
    rank: int
    lr: float
    steps: int
    length: int = 64
    batch: int = 4

    @property
    def name(self) -> str:
        """Of the folder of what was measured."""
        kinds = self.targets.replace("_proj", "").replace(",", "-").replace("all-linear", "all")
        return f"{self.texts}-{kinds}-r{self.rank}-lr{self.lr:g}"

    def axes(self, texts: Path) -> dict[str, Any]:
        """The options in which it differs from the other recipes."""
        return {
            "data": texts / f"{self.texts}.jsonl",
            "targets": [self.targets.split(",")],
            "rank": self.rank,
            "alpha": 2 * self.rank,
            "steps": self.steps,
            "batch": self.batch,
            "length": self.length,
            "lr": self.lr,
        }


RECIPES = (
    Recipe("restaurants", "all-linear", 16, 1e-3, 120),
    Recipe("problems", "all-linear", 8, 5e-4, 100, length=96),
    Recipe("news", "q_proj,v_proj", 4, 5e-3, 50),
    Recipe("news", "gate_proj,up_proj,down_proj", 32, 1e-3, 40),
    Recipe("restaurants", "all-linear", 8, 1e-4, 30),
    Recipe("news", "q_proj,v_proj", 2, 5e-4, 40),
)
SEEDS = (0, 1, 2)
SEEDED = ("stochastic",)
PLAIN = ("nearest", "fresh", "gptq", "sweep", "bf16")
PROBES = (
    Way("sweep", damping=0.1),
    Way("sweep", damping=0.001),
    Way("sweep", moments="adapted"),
)


@dataclass(frozen=True)
class Task:
    """One adapter and one base, and the ways to merge that are judged."""

    recipe: Recipe
    base: str
    ways: Sequence[Way]


@dataclass(frozen=True)
class Plan:
    """What is trained, merged and judged.

    Attributes
    ----------
    judged : int
        Texts of a part to judge on.
    calibrated : int
        Texts of the domain for the moments, and as many general ones.
    coded : sequence of str
        Bases other than Q4_1, for the first adapters.
    probes : sequence of Way
        What the sweep depends on, for the first adapters.
    """

    recipes: Sequence[Recipe] = RECIPES
    seeds: Sequence[int] = SEEDS
    judged: int = 16
    length: int = 64
    calibrated: int = 32
    coded: Sequence[str] = ("nf4", "q4_k")
    probes: Sequence[Way] = PROBES

    def tasks(self) -> Iterator[Task]:
        """Every adapter with every base."""
        drawn = [Way(method, seed) for seed in self.seeds for method in SEEDED]
        given_back = [Way("stochastic", seed, give_back=True) for seed in self.seeds[:1]]
        for recipe in self.recipes:
            yield Task(recipe, "q4_1", [*(Way(method) for method in PLAIN), *drawn, *given_back])
        for name in self.coded:
            for recipe in self.recipes[:1]:
                yield Task(recipe, name, [Way("nearest"), *drawn, Way("sweep")])
        for recipe in self.recipes[:1] if self.probes else ():
            yield Task(recipe, "q4_1", self.probes)


QUICK = Plan(
    (Recipe("news", "q_proj,v_proj", 4, 5e-3, 8, length=32),),
    seeds=(0, 1),
    judged=4,
    length=32,
    calibrated=8,
    coded=(),
    probes=(),
)


def make(plan: Plan, folder: Path, jobs: int) -> dict[Recipe, Path]:
    """The folder of every adapter; those that are missing are trained."""
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for name in {recipe.texts for recipe in plan.recipes}:
        lines = [json.dumps({"text": text}) for text in domain(name).train]
        (texts / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    grid = loralens.train(
        model=MODEL,
        task="causal-lm",
        schedule="linear",
        threads=1,
        grid=[recipe.axes(texts) for recipe in plan.recipes],
        output=folder / "adapters",
        jobs=jobs,
    )
    return {recipe: run.output for recipe, run in zip(plan.recipes, grid, strict=True)}


def moments(plan: Plan, folder: Path, made: Mapping[Recipe, Path], recipe: Recipe, name: str) -> Path:
    """The file of second moments for an adapter; measured if it is missing.

    ``name`` says which texts: ``both``, ``task`` or ``general``. ``adapted`` means both, with the adapter added to the
    weights of the model. Behind a colon comes the number of texts.
    """
    kind, _, number = name.partition(":")
    count, of = int(number or plan.calibrated), recipe.name if kind == "adapted" else recipe.texts
    target = folder / "moments" / f"{of}-{name.replace(':', '-')}.safetensors"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        data, mixed_in = domain(recipe.texts).train[:count], general()[:count]
        loralens.calibrate(
            model=adapted(made[recipe]) if kind == "adapted" else MODEL,
            data=mixed_in if kind == "general" else data,
            general="none" if kind in ("task", "general") else mixed_in,
            inputs=True,
            output=target,
            length=plan.length,
            threads=1,
        )
    return target


def adapted(path: Path) -> tuple[Any, Any]:
    """The model with an adapter added to its weights, and its tokenizer."""
    import torch

    from loralens.verbs.inputs.models import load_model

    loaded = load_model(MODEL, device="cpu", dtype="f32", threads=1)
    for name, update in loralens.load(path).items():
        weight: Any = loaded.model.get_submodule(name).weight
        weight.data += torch.from_numpy(update.dense()).float()
    return loaded.model, loaded.tokenizer


def examine(plan: Plan, folder: Path, made: Mapping[Recipe, Path], task: Task) -> None:
    """Merge in all ways of a task and judge; what is there is not judged again. ``made`` has the adapters."""
    kept = folder / "found" / task.recipe.name / task.base
    kept.mkdir(parents=True, exist_ok=True)
    missing = [way for way in task.ways if not (kept / f"{way.name}.json").exists()]
    if not missing:
        return
    from low_bit_judge import Judge

    texts, weights = domain(task.recipe.texts), base(task.base)
    adapter = loralens.load(made[task.recipe])
    judge = Judge({"in": texts.held_out[: plan.judged], "out": elsewhere(plan.judged)}, plan.length)
    if task.base != "q4_1":
        for key, weight in weights.weights.items():
            judge.put(key.removesuffix(".weight"), weight.decode(0, weight.shape[0]))
    unmerged = judge.refer(adapter)
    ends = {"unmerged": unmerged, "base": judge.look()}
    _write(kept / "ends.json", {end: {part: asdict(one) for part, one in ends[end].items()} for end in ends})
    for way in missing:
        # Another process may have been faster.
        if (kept / f"{way.name}.json").exists():
            continue
        measured = moments(plan, folder, made, task.recipe, way.moments) if way.needs_moments else None
        sums = Sums()
        for name, merged in merge(weights, adapter, way, measured):
            if isinstance(merged, Sums):
                sums = merged
            else:
                judge.put(name, merged)
        looked = {part: asdict(one) for part, one in judge.look().items()}
        _write(kept / f"{way.name}.json", {"way": asdict(way), **looked, **sums.record()})


def _write(path: Path, found: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)


def gather(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Everything that was measured: one object for each adapter and base."""
    found = []
    for task in plan.tasks():
        kept = folder / "found" / task.recipe.name / task.base
        ways = [json.loads((kept / f"{way.name}.json").read_text()) for way in task.ways]
        recipe = {"name": task.recipe.name, **asdict(task.recipe), "source": domain(task.recipe.texts).source}
        found.append(
            {"adapter": recipe, "base": task.base, "ends": json.loads((kept / "ends.json").read_text()), "ways": ways}
        )
    return found


def main() -> None:
    """Train what is missing, merge, judge, and write the report."""
    given = asked("low_bit_study", __doc__, "out/low_bit")
    plan, folder = QUICK if given.quick else Plan(), given.runs
    made = make(plan, folder, given.jobs)
    for recipe in plan.recipes:
        moments(plan, folder, made, recipe, "both")
    with ProcessPoolExecutor(given.jobs) as pool:
        for job in [pool.submit(examine, plan, folder, made, task) for task in plan.tasks()]:
            job.result()
    from low_bit_report import write  # matplotlib only now

    # Other texts, where the folder with those of two domains is missing, give other numbers.
    command = f"{FOLDER}=FOLDER {given.command}" if os.environ.get(FOLDER) else given.command
    print(write(plan, gather(plan, folder), given.reports, command, reading=not given.quick).read_text())


if __name__ == "__main__":
    main()
