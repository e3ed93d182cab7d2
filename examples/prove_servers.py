"""How surely `loralens prove` finds an adapter that a server does not apply as it is: reports/prove.md.

    python examples/prove_servers.py HOME FIRST.jsonl SECOND.jsonl     measure; a run that was interrupted continues
    python examples/prove_servers.py HOME --report                     write the page again, in seconds

Two adapters of SmolLM2-135M are trained on the texts, and an earlier state of the first one; they are kept in HOME. The
servers are in this process and compute in bfloat16: the base as it is, which is a GGUF file (Q4_1) that ``--base``
decodes too, and the base with its matrices rounded to four bits once more. The latter is compared with the base as it
is, and with the rounded one as ``--base``, as if the server's own file were given. Every server answers to ten faults
of an adapter, and to the adapter as it is (healthy runs) for other choices of prompts. Weak adapters are the same two
at a fraction of their strength.

Every answer of a model is kept in HOME/answers and every verdict in HOME/verdicts.jsonl, and nothing is measured twice.
After a change of the statistics, ``--again`` decides anew from the answers that are kept.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

import loralens
from loralens import Adapter
from loralens.core.names import block
from loralens.requirements import LANGUAGE_MODEL
from loralens.serving.server import Question
from loralens.verbs.served.evidence import REQUESTS, Evidence, choose
from loralens.verbs.served.predictions import MLP, LocalModel, bank, fine_faults, groups_of, vary
from loralens.verbs.served.prove import Proof, judge

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "reports" / "prove.md"
POOL, TOKENS, OFFERED = 16, 32, 10  # prompts in all, their tokens, and how many a run may choose from
STRENGTHS = (1.0, 0.3, 0.1, 0.03)
HEALTHY = 9  # healthy runs of each of two adapters at four strengths on three servers: 216
SERVERS = {  # the server's base, and --base
    "bf16": ("bf16", "float"),
    "4-bit": ("rounded in bf16", "float"),
    "4-bit, its file as --base": ("rounded in bf16", "rounded"),
}
# The verdict that each fault must get; the words that must be in the sentence.
FAULTS = {
    "ignored": ("ignored", ""),
    "half": ("other-strength", "half"),
    "rsLoRA wrong": ("other-strength", "√r"),
    "attention only": ("partly", "without MLP"),
    "one block missing": ("partly", "without block 17"),
    "transposed": ("partly", "transposed"),
    "sibling": ("other-adapter", "second"),
    "stale": ("other-adapter", ""),
    "scale 2": ("other-strength", "twice"),
    "merged twice": ("other-strength", "twice"),
}


class KeptModel(LocalModel):
    """A local model whose answers are kept in a folder, one file for a variant of the adapter."""

    def __init__(self, dtype: str, folder: Path, name: str) -> None:
        super().__init__(LANGUAGE_MODEL, device="cpu", dtype=dtype, threads=1)
        self.folder, self.name = folder, name

    def answers(self, questions: Sequence[Question], adapter: Adapter | None) -> list[NDArray[np.float64]]:
        """Those that are kept, and the others after they have been computed."""
        keys = [hashlib.sha256(repr((one.ids, one.next_ids)).encode()).hexdigest()[:16] for one in questions]
        path = self.folder / f"{self.name}-{fingerprint(adapter)}.npz"
        kept = dict(np.load(path)) if path.exists() else {}
        missing = [i for i, key in enumerate(keys) if key not in kept]
        if missing:
            found = super().answers([questions[i] for i in missing], adapter)
            kept |= {keys[i]: one for i, one in zip(missing, found, strict=True)}
            np.savez(path.with_suffix(".part.npz"), **kept)
            path.with_suffix(".part.npz").rename(path)
        return [kept[key] for key in keys]


def fingerprint(adapter: Adapter | None) -> str:
    """A name for what an adapter adds to the weights."""
    seen = hashlib.sha256()
    for name, module in (adapter or {}).items():
        sums = [float(np.abs(np.asarray(one, np.float64)).sum()) for one in (module.A, module.B)]
        seen.update(repr((name, module.shape, round(module.scale, 9), sums, float(module.A[0, -1]))).encode())
    return seen.hexdigest()[:20]


def round_weights(model: LocalModel, group: int = 32) -> None:
    """Round the matrices of all blocks to 16 values between the extremes of each group of numbers.

    The groups are shifted by half, since those of the file have been rounded so already.
    """
    import torch

    for name, layer in model.loaded.model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            weight = layer.weight.data.float().flatten().roll(group // 2).reshape(-1, group)
            low = weight.amin(1, keepdim=True)
            step = ((weight.amax(1, keepdim=True) - low) / 15).clamp_min(1e-12)
            values = ((weight - low) / step).round() * step + low
            layer.weight.data.copy_(values.flatten().roll(-(group // 2)).reshape(layer.weight.shape))


class PromptServer:
    """What `choose` must know of a server: it gives the log-probabilities of prompts."""

    gives_prompt = True


@dataclass(frozen=True)
class Case:
    """One run of ``prove``. ``fault`` is empty for a healthy one."""

    server: str
    adapter: str
    strength: float
    fault: str
    seed: int

    @property
    def key(self) -> str:
        """The words that name it in the file of verdicts."""
        return f"{self.server} | {self.adapter} | {self.strength:g} | {self.fault} | {self.seed}"


def cases(strengths: Sequence[float]) -> Iterator[Case]:
    """All cases, the strong ones first; those that need the same predictions stand together."""
    for strength in strengths:
        for adapter in ("first", "second"):
            for server in SERVERS:
                for fault in FAULTS if adapter == "first" else ():
                    yield Case(server, adapter, strength, fault, 0)
                for seed in range(HEALTHY):
                    yield Case(server, adapter, strength, "", seed)


class Bench:
    """The models, the adapters, and the verdicts so far."""

    def __init__(self, home: Path, texts: Sequence[Path]) -> None:
        self.home = home
        folder = home / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        self.models = {
            "float": KeptModel("f32", folder, "float"),
            "rounded": KeptModel("f32", folder, "rounded"),
            "bf16": KeptModel("bf16", folder, "bf16"),
            "rounded in bf16": KeptModel("bf16", folder, "rounded-bf16"),
        }
        round_weights(self.models["rounded"])
        # The same weights: rounded anew after a cast to bfloat16, many would fall on another value.
        self.models["rounded in bf16"].loaded.model.load_state_dict(self.models["rounded"].loaded.model.state_dict())
        self.adapters = {name: self._adapter(name, texts) for name in ("first", "second", "stale")}
        local = self.models["float"]
        ids = [local.ids(text, TOKENS) for text in bank()]
        self.pool = [text for one in ids if len(one) == TOKENS and (text := local.text(one))][:POOL]

    def _adapter(self, name: str, texts: Sequence[Path]) -> Adapter:
        folder = self.home / "adapters" / name
        if not folder.exists():
            # An earlier state of the first one has seen half of its steps.
            steps, data = (7 if name == "stale" else 14), texts[1 if name == "second" else 0]
            loralens.train(
                model=LANGUAGE_MODEL, task="causal-lm", data=data, output=folder, rank=8, alpha=16, steps=steps,
                batch=8, length=64, lr=0.002, targets="all-linear", threads=1,
            )  # fmt: skip
        return loralens.load(folder)

    def run(self, case: Case) -> Proof:
        """The verdict of one case."""
        served, local = (self.models[name] for name in SERVERS[case.server])
        own = self.adapters[case.adapter]
        adapter = vary(own, case.strength)
        chosen = np.random.default_rng(case.seed).permutation(len(self.pool))[:OFFERED]
        texts = [self.pool[i] for i in sorted(chosen)]
        questions = choose(local, adapter, texts, PromptServer(), REQUESTS)  # type: ignore[arg-type]
        variant = self._fault(case.fault, adapter, case.strength)
        evidence = Evidence(
            questions, served.answers(questions, variant), 0.0, served.answers(questions, None), REQUESTS, case.server
        )
        other = "second" if case.adapter == "first" else "first"
        siblings = {other: vary(self.adapters[other], case.strength)}
        return judge(local, adapter, evidence, siblings=siblings, adapter_label=case.adapter)

    def _fault(self, fault: str, adapter: Adapter, strength: float) -> Adapter | None:
        """What the server applies in place of the adapter."""
        off = dict.fromkeys(groups_of(adapter)[MLP], 0.0)
        missing = {name: 0.0 for name in adapter if (found := block(name)) and found.number == 17}
        return {
            "": adapter,
            "ignored": None,
            "half": vary(adapter, 0.5),
            "rsLoRA wrong": vary(adapter, 8**-0.5),
            "attention only": vary(adapter, off),
            "one block missing": vary(adapter, missing),
            "transposed": fine_faults(adapter)["with square updates transposed"],
            "sibling": vary(self.adapters["second"], strength),
            "stale": vary(self.adapters["stale"], strength),
            "scale 2": vary(adapter, 2.0),
            "merged twice": vary(adapter, 2.0),
        }[fault]


def measure(home: Path, texts: Sequence[Path], strengths: Sequence[float], *, again: bool) -> None:
    """All cases that have no verdict yet; each is written at once."""
    bench = Bench(home, texts)
    path = home / "verdicts.jsonl"
    if again:
        path.unlink(missing_ok=True)
    done = verdicts(home)
    for case in cases(strengths):
        if case.key in done:
            continue
        proof = bench.run(case)
        strength = proof.strength
        row = {
            "case": case.key, "verdict": proof.verdict, "headline": proof.headline,
            "strength": [strength.value, strength.low, strength.high], "unexplained": proof.unexplained,
            "predicted": proof.predicted, "served": proof.served, "base_distance": proof.base_distance,
            "notes": proof.notes,
        }  # fmt: skip
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{case.key}: {proof.headline}", flush=True)


def verdicts(home: Path) -> dict[str, Mapping[str, Any]]:
    """The verdicts that were kept, by the key of their case."""
    path = home / "verdicts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["case"]: row for row in map(json.loads, lines)}


def report(home: Path) -> None:
    """Write the page, its numbers, and a figure of one healthy and one faulty server."""
    found = verdicts(home)
    page = [
        "# What `loralens prove` finds",
        "",
        "For readers who ask how far they can trust a verdict. `python examples/prove_servers.py HOME FIRST.jsonl "
        "SECOND.jsonl` injects ten faults into an adapter of SmolLM2-135M that a server in the process applies."
        f" It asks {REQUESTS} times ({TOKENS} tokens each); its first lines say how. A fault is *named* if its name is "
        "among those that the sentence prints, and *refused* if the adapter is called not live in other words.",
        "",
        f"Measured on {platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, transformers {version('transformers')}, loralens {loralens.__version__}.",
        "",
        *(_named_of(found, server) for server in SERVERS),
        "",
        "## Faults",
        "",
        f"| fault | strength | {' | '.join(SERVERS)} |",
        "| --- | --- |" + " --- |" * len(SERVERS),
    ]
    for strength in STRENGTHS:
        for fault in FAULTS:
            row = [_outcome(found.get(Case(server, "first", strength, fault, 0).key), fault) for server in SERVERS]
            if any(one != "–" for one in row):
                page.append(f"| {fault} | {strength:g} | {' | '.join(row)} |")
    page += [
        "",
        "## Healthy servers",
        "",
        "| server | strength | nats a token | runs | live | cannot tell | accused | strength found, mean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs = accused = 0
    for server in SERVERS:
        for strength in STRENGTHS:
            keys = [Case(server, name, strength, "", n).key for name in ("first", "second") for n in range(HEALTHY)]
            rows = [found[key] for key in keys if key in found]
            if rows:
                told = [row["verdict"] for row in rows]
                wrong = len(rows) - told.count("live") - told.count("cannot-tell")
                runs, accused = runs + len(rows), accused + wrong
                means = [np.mean([row["predicted"] for row in rows]), np.mean([row["strength"][0] for row in rows])]
                page.append(
                    f"| {server} | {strength:g} | {means[0]:.2f} | {len(rows)} | {told.count('live')} | "
                    f"{told.count('cannot-tell')} | {wrong} | {means[1]:.2f} |"
                )
    bound = beta.ppf(0.95, accused + 1, runs - accused) if runs > accused else 1.0
    page += [
        "",
        f"{accused} of {runs} healthy runs were accused; with 95 % confidence fewer than {bound:.1%} are (one-sided, "
        "Clopper and Pearson; runs of one adapter share prompts, so they are not quite independent).",
    ]
    page += [
        "",
        "![Strengths that were found on healthy servers, with their 95 % intervals](prove.png)",
        "",
        "Where the server's base is quantised and `--base` is not, the rounding of the base is too large for a verdict "
        "of *live* with 16 requests; with the server's own file as `--base` it is not.",
    ]
    planned = sum(1 for _ in cases(STRENGTHS))
    if len(found) < planned:
        page += ["", f"{planned - len(found)} of {planned} planned cases have not been run."]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    rows = [found[case.key] for case in cases(STRENGTHS) if case.key in found]
    PAGE.with_suffix(".json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    strengths_figure(found)


def strengths_figure(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the strengths of healthy runs, with their intervals, against the change of a token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, server in enumerate(SERVERS):
        rows = [row for key, row in found.items() if key.startswith(f"{server} | ") and " |  | " in key]
        values = np.array([row["strength"] for row in rows]).reshape(-1, 3)
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        changes = [row["predicted"] * 1.02**colour for row in rows]
        axes.errorbar(changes, values[:, 0], errors, fmt="o", ms=3, lw=0.7, color=f"C{colour}", label=server)
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set(xscale="log", ylim=(0, 2), xlabel="predicted change of a token (nats)", ylabel="strength found")
    axes.legend()
    figure.savefig(PAGE.with_suffix(".png"), dpi=150)


def _named_of(found: Mapping[str, Mapping[str, Any]], server: str) -> str:
    """How many faults of the adapter at its full strength were named, and what became of the others."""
    outcomes = {fault: _outcome(found.get(Case(server, "first", 1.0, fault, 0).key), fault) for fault in FAULTS}
    others = [f"{fault}: {outcome}" for fault, outcome in outcomes.items() if outcome != "named"]
    named = f"{len(FAULTS) - len(others)} of {len(FAULTS)} faults of the adapter at full strength are named"
    left = f" ({', '.join(others)})" if others else ""
    return f"- {server}: {named}{left}."


def _outcome(row: Mapping[str, Any] | None, fault: str) -> str:
    """What was said of a fault."""
    if row is None:
        return "–"
    verdict, words = FAULTS[fault]
    if row["verdict"] == verdict and words in row["headline"]:
        return "named"
    if row["verdict"] == "cannot-tell":
        return "cannot tell"
    if row["verdict"] == "live" and any(note.startswith("Too small to be missed") for note in row["notes"]):
        return "live, but not surely in each block"
    return "**missed**" if row["verdict"] == "live" else f"refused ({row['verdict']})"


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--again", action="store_true", help="decide anew from the answers that are kept")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    given = parser.parse_args()
    if not given.report:
        measure(given.home, given.texts, given.strengths, again=given.again)
    report(given.home)


if __name__ == "__main__":
    main()
