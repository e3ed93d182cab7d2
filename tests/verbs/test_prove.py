"""``prove`` without a server: local models, recorded log-probabilities, prompts to ask for, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import loralens
from loralens import Adapter, OptionError
from loralens.analysis.liveness import FaultFit, Interval
from loralens.verbs.served.prove import Findings, Proof, decide
from tests import models
from tests.cli.command import Command

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_torch")
KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")
prove = Command("prove", "--threads", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """A base, an adapter, another one, and texts."""
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "base")
    for name, seed in (("adapter", 0), ("other", 3)):
        models.saved(models.adapter(models.llama(), KINDS, seed=seed, scale=1.0), home / name)
    texts = [" ".join(np.random.default_rng(i).choice(models.WORDS, 24)) for i in range(12)]
    models.jsonl(home / "texts.jsonl", texts)
    return home


def with_update(adapter: Adapter, factors: dict[str, float]) -> tuple[Any, Any]:
    """A model in memory that has the update of an adapter in its weights, the modules of a kind at a strength."""
    model = models.llama()
    for name, module in adapter.items():
        factor = factors.get(name.rpartition(".")[2], factors.get("", 1.0))
        weight = model.get_submodule(name).weight
        weight.data += factor * module.scale * torch.from_numpy(module.B[...] @ module.A[...])
    return model, models.tokenizer()


def judged(home: Path, factors: dict[str, float], *, served: str = "adapter", **options: Any) -> Proof:
    against = with_update(loralens.load(home / served), factors)
    base, data = (models.llama(), models.tokenizer()), home / "texts.jsonl"
    found = loralens.prove(home / "adapter", base=base, data=data, against=against, threads=1, **options)
    assert found is not None
    return found


def test_a_merged_model_is_live_in_the_words_of_the_command_and_in_python(home: Path, tmp_path: Path) -> None:
    loralens.merge(home / "adapter", base=home / "base", output=tmp_path / "merged")
    words = (
        home / "adapter",
        "--base",
        home / "base",
        "--data",
        home / "texts.jsonl",
        "--against",
        tmp_path / "merged",
    )
    record = prove.told(*words)
    Draft202012Validator(loralens.schema("prove")).validate(record)
    assert record["verdict"] == "live"
    assert record["strength"]["low"] <= 1 <= record["strength"]["high"]
    assert record["unexplained"] < 1e-9
    assert [group["group"] for group in record["groups"]] == ["MLP", "attention"]
    told = prove.good(*words, "-v", "--plot", tmp_path / "points.png").stdout
    assert told.startswith("LIVE at 1.00")
    assert "strength in blocks" in told
    assert (tmp_path / "points.png").stat().st_size > 10_000
    line = prove.good(*words, "--metrics").stdout
    assert (
        line == f'loralens_adapter_strength{{adapter="{home}/adapter",server="{tmp_path}/merged",verdict="live"}} 1\n'
    )


@pytest.mark.parametrize(
    ("factors", "verdict", "words", "strengths"),
    [
        ({"": 0.0}, "ignored", "IGNORED: the answers are those of the base.", (0.0, 0.0)),
        ({"": 0.5}, "other-strength", "at half its strength", (0.5, 0.5)),
        ({"": 3**-0.5}, "other-strength", "divided by √r", (0.58, 0.58)),
        ({"": 3.0}, "other-strength", "α were not divided", (3.0, 3.0)),
        ({"gate_proj": 0.0, "down_proj": 0.0}, "partly", "without MLP (down_proj, gate_proj)", (0.0, 1.0)),
        ({"q_proj": 0.0, "o_proj": 0.0}, "partly", "without attention (o_proj, q_proj)", (1.0, 0.0)),
        ({"q_proj": 0.0, "o_proj": 0.0}, "partly", "without o_proj", None),
        ({"o_proj": 0.0}, "partly", "without o_proj", None),
    ],
)
def test_a_fault_is_named(
    home: Path, factors: dict[str, float], verdict: str, words: str, strengths: tuple[float, float] | None
) -> None:
    proof = judged(home, factors)
    assert (proof.verdict, proof.answer) == (verdict, False)
    assert words in proof.headline
    if strengths:
        assert [group.strength.value for group in proof.groups] == pytest.approx(strengths, abs=0.06)


def test_the_adapter_of_a_sibling_is_named_by_its_path_or_from_a_fleet(home: Path) -> None:
    alone = judged(home, {}, served="other")
    assert (alone.verdict, "not in the direction of this one" in alone.headline) == ("other-adapter", True)
    by_path = judged(home, {}, served="other", siblings=[home / "other"])
    loralens.Fleet.open(home).update(home)
    by_fleet = judged(home, {}, served="other", fleet=home)
    for proof in (by_path, by_fleet):
        assert proof.verdict == "other-adapter"
        assert proof.headline.endswith("other.")


@pytest.fixture(scope="module")
def asked(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The prompts that the command writes, with the log-probabilities of the base and of the base with the adapter."""
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    words = (home / "adapter", "--base", home / "base", "--data", home / "texts.jsonl")
    assert not prove.good(*words, "--write-prompts", path).stdout
    prove.refused(*words, "--write-prompts", path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sides = {"base_logprobs": models.llama(), "logprobs": with_update(loralens.load(home / "adapter"), {})[0]}
    for row in rows:
        for key, model in sides.items():
            ids = torch.tensor([row["ids"]])
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            row[key] = [None, *logs[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()]
    return rows


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_recorded_answers_are_judged_as_those_of_a_server(
    home: Path, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = (home / "adapter", "--base", home / "base", "--outputs")
    assert prove.told(*words, written(asked, tmp_path / "live.jsonl"))["verdict"] == "live"
    alone = [{key: row[key] for key in ("ids", "logprobs")} for row in asked]
    record = prove.told(*words, written(alone, tmp_path / "alone.jsonl"))
    assert (record["verdict"], record["base_distance"]) == ("live", None)
    assert "--base-name" in record["notes"][0]
    # Noise that is as large as the change leaves nothing to be told.
    rng = np.random.default_rng(0)
    for row in asked:
        for key in ("logprobs", "base_logprobs"):
            row[f"noisy_{key}"] = [
                None,
                *np.minimum(0, np.array(row[key][1:]) + 0.2 * rng.standard_normal(23)).tolist(),
            ]
    noisy = [
        {"ids": row["ids"], **{key: row[f"noisy_{key}"] for key in ("logprobs", "base_logprobs")}} for row in asked
    ]
    result = prove.run(*words, written(noisy, tmp_path / "noisy.jsonl"))
    assert result.exit_code == 3
    assert result.stdout.startswith("CANNOT TELL")
    ignored = [{**row, "logprobs": row["base_logprobs"]} for row in asked]
    assert prove.run(*words, written(ignored, tmp_path / "ignored.jsonl")).exit_code == 1


def test_prompts_without_the_head_are_a_finding_and_next_tokens_count(home: Path) -> None:
    """As vLLM answers for an adapter of lm_head: log-probabilities of prompts are those of the base."""
    from loralens.verbs.served.evidence import Evidence, choose
    from loralens.verbs.served.predictions import LocalModel
    from loralens.verbs.served.prove import judge

    local = LocalModel(home / "base", device="cpu", dtype="f32", threads=1)
    adapter = models.adapter(models.llama(), ("lm_head",), scale=1.0)
    texts = [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]
    questions = choose(local, adapter, texts, None, 16)
    plain, live = local.answers(questions, None), local.answers(questions, adapter)
    served = [
        np.concatenate([base[: len(one.ids) - 1], own[len(one.ids) - 1 :]])
        for one, base, own in zip(questions, plain, live, strict=True)
    ]
    evidence = Evidence(questions, served, 0.0, plain, 16, "here")
    proof = judge(local, adapter, evidence, siblings={}, adapter_label="adapter")
    assert proof.verdict == "live"
    assert "at 0.00 in the tokens of prompts, and at 1.00 in next tokens" in proof.notes[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no lines"),
        ("{", "is no JSON"),
        ('{"ids": [3, 4]}', "at least four tokens"),
        ('{"ids": [3, 4, 5, 999], "logprobs": [-1, -1, -1]}', "at least four tokens of the base"),
        ('{"ids": [3, 4, 5, 6], "logprobs": [-1, -1]}', "not one number for each token"),
        ('{"ids": [3, 4, 5, 6], "logprobs": [-1, 2, -1]}', "above 0"),
        ('{"ids": [3, 4, 5, 6], "logprobs": [null, null, null, null]}', "no log-probabilities"),
    ],
)
def test_what_is_no_record_of_answers_is_refused(home: Path, tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "served.jsonl"
    path.write_text(line)
    assert words in prove.refused(home / "adapter", "--base", home / "base", "--outputs", path)


def test_one_place_where_it_is_served_must_be_given(home: Path) -> None:
    words = (home / "adapter", "--base", home / "base")
    assert "nothing says where" in prove.refused(*words)
    assert "--outputs and --against" in prove.refused(*words, "--outputs", "x", "--against", home / "base")
    assert prove.refused(*words, "--against", "gone").startswith("error: gone: no such file")
    assert "--model is missing" in prove.refused(*words, "--server", "http://127.0.0.1:1")
    assert "exclude each other" in prove.refused(*words, "--json", "--metrics")
    fits_not = models.adapter(models.wide_llama(), KINDS)
    with pytest.raises(OptionError, match="no text has four tokens"):
        loralens.prove(home / "adapter", base=home / "base", data=["a"], against=home / "base")
    with pytest.raises(loralens.MismatchError):
        loralens.prove(fits_not, base=home / "base", against=home / "base")


def test_answers_that_lean_towards_the_adapter_are_not_called_ignored() -> None:
    names = ("ignored", "at half its strength", "live")
    fits = [FaultFit(name, 0.06, name != "live") for name in names]
    seen = Findings(
        strength=Interval(0.0, -0.1, 0.1), fits=fits, visible=set(names), groups=[], unexplained=0.9, predicted=0.06,
        served=0.06, noise=0.06, base_distance=0.06, partial=set(), fine=set(), siblings=set(), modules=2, prompts=7,
    )  # fmt: skip
    assert decide(seen)[0] == "ignored"
    verdict, sentence = decide(replace(seen, strength=Interval(0.23, 0.1, 0.36)))
    assert (verdict, "it may be ignored, or at half its strength" in sentence) == ("cannot-tell", True)
