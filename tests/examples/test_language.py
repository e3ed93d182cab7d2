"""A language model in the studies: its texts, what the alternatives to LoRA train in it, what it writes, BLEU."""

from collections.abc import Iterator
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest

from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

D, M, BLOCKS, KEYS = 16, 24, 2, 8  # of `tests.models.llama`; keys and values are narrower
LINES = {
    "e2e_valid.txt": [f"name : Inn {i} | area : city||Inn {i} is in the {w} ." for i in range(12) for w in "ab"],
    "e2e_test.txt": [f"name : Café {i}||Café {i} is {'very ' * i}{w} ." for i in range(5) for w in ("good", "bad")],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, lines in LINES.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("LORALENS_TEXTS", str(tmp_path))
    return tmp_path


def test_the_parts_of_the_texts_share_no_prompt(texts: Path) -> None:
    from language.texts import read_pairs

    found = read_pairs(1000)
    parts = [{pair.prompt for pair in part} for part in (found.train, found.validation, found.held_out)]
    assert [len(part) for part in parts] == [10, 2, 5]
    assert len(set().union(*parts)) == 17
    assert len(found.train) == 20
    assert found.references["name : Café 3 =>"] == ["Café 3 is very very very good .", "Café 3 is very very very bad ."]
    assert all(pair.completion.strip() in found.references[pair.prompt] for pair in found.held_out)


def test_bleu_is_that_of_its_formula() -> None:
    pytest.importorskip("sacrebleu")
    from language.bleu import bleu

    sentence, other = "the cat sat on the mat .", "a dog ran ."
    assert bleu([sentence, other], [["no .", sentence], [other]])["bleu"] == pytest.approx(100)
    # 6 of 7 words, 4 of 6 pairs, 2 of 5 triples and 1 of 4 quadruples are in the reference, which is one word longer.
    found = bleu(["the cat sat on a mat ."], [["the cat sat on the big mat ."]])
    precisions = (6 / 7) * (4 / 6) * (2 / 5) * (1 / 4)
    assert found["bleu"] == pytest.approx(100 * precisions**0.25 * exp(1 - 8 / 7))
    assert "tok:13a" in found["signature"]


def recipe(**changes: Any) -> Any:
    from language.recipe import Recipe

    small = Recipe(
        steps=3, batch=2, characters=99, length=20, schedule="linear", validation=3, judged=3, written=2, longest=6
    )  # fmt: skip
    return replace(small, **changes)


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    from language.bench import Bench
    from language.texts import Pair, Pairs

    words = [text.split() for text in models.TEXTS * 3]
    pairs = [
        Pair(f"{' '.join(text[:2])} {number % 2 * 'and'}", " " + " ".join(text)) for number, text in enumerate(words)
    ]
    references = {pair.prompt: [pair.completion.strip(), "it ran"] for pair in pairs}
    folder = models.folder(models.llama(), tmp_path / "model")
    return Bench(str(folder), Pairs("made up", pairs, pairs[:4], pairs[4:8], references), recipe())


@pytest.mark.slow
def test_the_table_of_methods_from_end_to_end(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("peft")
    from language.bench import Bench
    from language.nlg_report import write
    from nlg_study import QUICK, study

    plan = replace(QUICK, recipe=bench.recipe, ranks=(1, 8), model=bench.source)
    found = study(plan, bench, tmp_path / "runs") | {"command": "this"}
    assert {(run["method"], run["lr"], run["seed"]) for run in found["runs"] if run["method"] == "full"} >= {
        ("full", lr, 0) for lr in plan.rates["full"]
    }
    text = write(found, tmp_path / "reports").read_text()
    assert text.startswith("    this\n\n# Table 3")
    assert text.count("| LoRA r = 8, q and v |") == 2
    assert "## What is missing" not in text
    assert "**3 steps of 2 texts**" in text
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert study(plan, bench, tmp_path / "runs") | {"command": "this"} == found  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")} == files
    # What is missing is named, and trained only where it is asked for.
    (tmp_path / "runs" / "rivals" / "bitfit.lr0.003.seed0.json").unlink()
    for path in (tmp_path / "runs" / "rivals").glob("prefix.*.seed1.json"):
        path.unlink()
    looking = Bench(bench.source, bench.pairs, bench.recipe, only_done=True)
    partly = study(plan, looking, tmp_path / "runs") | {"command": "this"}
    assert len(partly["runs"]) == len(found["runs"]) - 2
    assert "- prefix of 16 tokens: seed 1" in write(partly, tmp_path / "reports").read_text()
