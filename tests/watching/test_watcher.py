"""`Watcher`: its measures beside the careful analyses, its log, and the verbs that read the log."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loralens
from loralens import FormatError, OptionError
from loralens.analysis import compare_subspaces
from loralens.training import Course, Watch, fit
from loralens.watching import Watcher, read_watch_log
from tests import models
from tests.marks import when_used

peft = when_used("peft")


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(models.llama(), config)


def train(model: Any, watcher: Watcher, steps: int = 6, lr: float = 1e-2) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 24, (2, 8), generator=draws)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        watcher.step()
        optimiser.zero_grad()


def test_a_look_measures_what_the_analyses_measure(tmp_path: Path) -> None:
    model = adapted()
    watcher = Watcher(model, every=2, keep=tmp_path / "kept", log=tmp_path / "log.jsonl")
    train(model, watcher)
    kept = {step: loralens.load(tmp_path / "kept" / f"checkpoint-{step}") for step in (0, 2, 4, 6)}
    last = watcher.last
    assert last is not None
    assert last.step == 6
    spectra = loralens.spectrum(kept[6])
    for name, snapshot in last.modules.items():
        exact = spectra[name].s
        assert np.allclose(snapshot.spectrum.s, exact[: snapshot.spectrum.s.size], atol=1e-6 * exact[0])
    # ΔW was 0 at step 0, so that the first snapshot with directions is the second.
    for turn_of, before in (("previous", 4), ("first", 2)):
        for name, pair in compare_subspaces(kept[before], kept[6]).items():
            turn = getattr(last.modules[name], turn_of)
            assert turn.cosine == pytest.approx(pair.cosine, abs=1e-5)
            assert turn.norm == pytest.approx(pair.norms[0], rel=1e-5)
            for side in ("in", "out"):
                assert turn.phi[side] == pytest.approx(pair.spans[side], abs=1e-4)
                n = kept[6][name].shape[0 if side == "out" else 1]
                assert turn.chance[side] == 4 / n
            length = np.linalg.norm(kept[6][name].dense() - kept[before][name].dense())
            assert turn.length == pytest.approx(length, rel=1e-3)
            start = kept[0][name].A
            drift = np.linalg.norm(kept[6][name].A - start) / np.linalg.norm(start)
            assert last.modules[name].drift == pytest.approx(drift, rel=1e-5)
    whole = loralens.trajectory(*(kept[step] for step in (2, 4, 6)))
    assert last.total["step_length"] == pytest.approx(whole.trajectory.points[-1].length, rel=1e-3)
    assert last.total["previous_cosine"] == pytest.approx(whole.trajectory.points[-1].previous_cosine, abs=1e-5)
    # The log says the same.
    logged = loralens.trajectory(tmp_path / "log.jsonl")
    assert [row.step for row in logged] == [0, 2, 4, 6]
    row = logged.rows[-1]
    for mine, theirs in (("frobenius", "frobenius"), ("effective_rank", "effective_rank"), ("drift", "drift")):
        assert getattr(row, mine) == pytest.approx(last.total[theirs], rel=1e-4)
    assert row.cosine == pytest.approx(last.total["previous_cosine"], abs=1e-4)
    assert row.step_length == pytest.approx(last.total["step_length"], rel=1e-4)
    assert row.phi_out == pytest.approx(last.total["previous_phi_out"], rel=1e-4)


def test_gradients_are_those_of_the_factors() -> None:
    model = adapted()
    watcher = Watcher(model, every=2, gradients=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    for step in (1, 2):
        ids = torch.tensor([[3, 4, 5, 6, 7]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        snapshot = watcher.step()
        if step == 2:
            assert snapshot is not None
            layer = model.base_model.model.model.layers[1].self_attn.q_proj
            measured = snapshot.modules["model.layers.1.self_attn.q_proj"].gradients
            for name, weight in (("B", layer.lora_B["default"].weight), ("A", layer.lora_A["default"].weight)):
                gradient = weight.grad.double().numpy() if name == "B" else weight.grad.double().numpy().T
                assert measured[name].norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
                B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                U, s, Vh = np.linalg.svd((B @ A).detach().double().numpy())
                rank = int((s > 1e-6 * s[0]).sum())
                columns = U[:, :rank] if name == "B" else Vh[:rank].T
                inside = np.linalg.norm(columns.T @ gradient) ** 2 / np.linalg.norm(gradient) ** 2
                assert measured[name].overlap == pytest.approx(inside, abs=1e-4)
                assert measured[name].chance == rank / len(gradient)
        optimiser.zero_grad()


def test_fit_is_watched(tmp_path: Path) -> None:
    watcher = Watcher(every=2, log=tmp_path / "log.jsonl", gradients=True)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    batches = [{"input_ids": ids, "labels": ids}] * 5
    norms: list[float] = []
    watch = Watch(watcher=watcher, on_step=lambda step: norms.append(step.norm))
    fitted = fit(models.llama(), batches, rank=2, course=Course(steps=5, clip=0.0), watch=watch)
    snapshots = read_watch_log(tmp_path / "log.jsonl")
    assert [snapshot.step for snapshot in snapshots] == [0, 2, 4, 5]
    last = watcher.last
    assert last is not None
    for name, snapshot in last.modules.items():
        assert snapshot.spectrum.frobenius == pytest.approx(np.linalg.norm(fitted.adapter[name].dense()), rel=1e-5)
    # The loss and the gradient are means since the snapshot before; the last snapshot has one step.
    assert [snapshot.loss for snapshot in snapshots[1:]] == pytest.approx(
        [np.mean(fitted.losses[:2]), np.mean(fitted.losses[2:4]), fitted.losses[4]], rel=1e-5
    )
    assert snapshots[3].gradient_norm == pytest.approx(norms[-1], rel=1e-5)
    # The gradients are those of the last step.
    both = np.hypot(last.total["gradient_B_norm"], last.total["gradient_A_norm"])
    assert both == pytest.approx(norms[-1], rel=1e-4)
    # The training itself is not changed by it.
    plain = fit(models.llama(), batches, rank=2, course=Course(steps=5, clip=0.0))
    assert plain.losses == fitted.losses


def test_every_kth_module_of_each_kind(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "v_proj", "down_proj"])
    watcher = Watcher(model, every_module=2, log=tmp_path / "log.jsonl")
    assert watcher.last is not None
    assert list(watcher.last.modules) == [
        "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"
    ]  # fmt: skip
    assert set(read_watch_log(tmp_path / "log.jsonl")[0].modules) == set(watcher.last.modules)
    with pytest.raises(OptionError, match="every_module 0"):
        Watcher(model, every_module=0)


def test_nan_is_a_warning_and_not_the_end_of_the_run() -> None:
    model, told = adapted(), []
    watcher = Watcher(model, every=1, on_warning=told.append)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = torch.nan
    snapshot = watcher.step()
    assert snapshot is not None
    assert len(snapshot.modules) == 3
    assert [(warning.code, warning.modules) for warning in told] == [
        ("not-finite", ("model.layers.1.self_attn.q_proj",))
    ]


def test_what_is_there_is_not_overwritten_and_a_run_is_resumed(tmp_path: Path) -> None:
    model, log = adapted(), tmp_path / "log.jsonl"
    train(model, Watcher(model, every=2, log=log))
    with pytest.raises(OptionError):
        Watcher(model, log=log)
    train(model, Watcher(model, every=2, log=log, start=4, resume=True), steps=4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 0, 2, 4, 6, 6, 8]
    assert [snapshot.step for snapshot in read_watch_log(log)] == [0, 2, 4, 6, 8]
    # A line that a kill cut off is left out.
    log.write_text(log.read_text()[:-40])
    assert [snapshot.step for snapshot in read_watch_log(log)] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"watch": "x"}\n', "not the log of a watched run"),
        ('{"watch": 9, "modules": {}}\n', "version 9"),
        (
            '{"watch": 1, "modules": {"a": {"shape": [4, 4], "rank": 2}}}\n{"step": 1, "modules": {"b": {"s": []}}}\n',
            "does not name",
        ),
        (
            '{"watch": 1, "modules": {"a": {"shape": [4, 4], "rank": 2}}}\n'
            '{"step": 1, "modules": {"a": {"s": [1, 2]}}}\n',
            "are not numbers that fall",
        ),
    ],
)
def test_a_damaged_log_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(FormatError, match=message):
        loralens.trajectory(log)
