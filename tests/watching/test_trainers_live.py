"""The callbacks inside the trainers themselves: transformers, TRL and Lightning."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import loralens
from loralens.watching import ExactMergeCallback, SpectralCallback, lightning_callback, read_watch_log
from tests import models
from tests.marks import when_used
from tests.watching.test_watcher import adapted

peft = when_used("peft")
pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]

STEPS = 6
LOGGED = {"lora/frobenius", "lora/effective_rank", "lora/drift"}


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=2,
        report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, **options,
    )  # fmt: skip


def check(log: Path, *, gradients: bool = True) -> None:
    snapshots = read_watch_log(log)
    assert [snapshot.step for snapshot in snapshots] == [0, 2, 4, 6]
    assert snapshots[0].total["frobenius"] == 0
    norms = [snapshot.total["frobenius"] for snapshot in snapshots]
    assert norms[1] > 0
    assert all(snapshot.total["drift"] > 0 for snapshot in snapshots[1:])
    assert len(snapshots[0].modules) == 4
    if gradients:
        # The snapshot is before the gradients are set to 0.
        assert all(
            m.measures["gradients"]["B"]["norm"] > 0 for snapshot in snapshots[1:3] for m in snapshot.modules.values()
        )


def test_transformers_trainer_with_and_without_its_logging(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
    trainer = transformers.Trainer(adapted(), arguments(transformers.TrainingArguments, tmp_path), train_dataset=data)
    SpectralCallback(2, gradients=True).attach(trainer)
    trainer.train()
    check(tmp_path / "watch.jsonl")
    history = [entry for entry in trainer.state.log_history if set(entry) >= LOGGED]
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    # The snapshots know the losses that the trainer logs, of which none is lost.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    snapshots = read_watch_log(tmp_path / "watch.jsonl")
    assert [snapshot.loss for snapshot in snapshots[1:]] == pytest.approx(losses, abs=1e-4)
    assert all(snapshot.gradient_norm > 0 for snapshot in snapshots[1:])
    assert "training_step" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    # Given to the constructor, it watches too, and a second run gets a log of its own.
    trainer = transformers.Trainer(
        adapted(), arguments(transformers.TrainingArguments, tmp_path), train_dataset=data,
        callbacks=[SpectralCallback(2)],
    )  # fmt: skip
    trainer.train()
    check(tmp_path / "watch-2.jsonl", gradients=False)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert read_watch_log(tmp_path / "watch-2.jsonl")[2].loss == pytest.approx(logged[0], abs=1e-4)
    assert [entry["step"] for entry in trainer.state.log_history if set(entry) >= LOGGED] == [0, 2, 4, 6]


def grpo(folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"prompt": ["the cat", "a dog", "it ran", "the tree"] * 4})
    return trl.GRPOTrainer(
        models.llama(),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        args=arguments(trl.GRPOConfig, folder, num_generations=2, max_completion_length=6, bf16=False),
        train_dataset=data,
        processing_class=models.tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        **options,
    )


def test_trl_grpo(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    SpectralCallback(2, gradients=True).attach(trainer)
    trainer.train()
    check(tmp_path / "watch.jsonl", gradients=False)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]


def test_trl_grpo_sends_merged_weights_without_drift(tmp_path: Path) -> None:
    """TRL's own code for sending weights to vLLM, called in every step of its GRPO trainer."""
    from trl.generation.vllm_generation import VLLMGeneration

    transformers = pytest.importorskip("transformers")

    class Sender(transformers.TrainerCallback):
        """Sends the weights as `sync_weights` does, and keeps the last."""

        sent: dict[str, torch.Tensor]

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            generation = object.__new__(VLLMGeneration)
            generation.model, generation._dist, generation.mode = kwargs["model"], distribution, "server"
            self.sent = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
            self.adapter = loralens.live(kwargs["model"]).load()

    class Alone:
        is_fsdp, fsdp_version = False, 0

        def gather_params(self, _: Any) -> Any:
            return nullcontext()

    distribution, sender = Alone(), Sender()
    trainer = grpo(tmp_path / "run", callbacks=[ExactMergeCallback(budget=2.0), sender])
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)
    assert "merge_adapter" not in vars(trainer.model)
    # What was sent last is what `loralens merge` writes, whose certificate verifies.
    models.llama().save_pretrained(tmp_path / "base")
    loralens.merge(sender.adapter, base=tmp_path / "base", output=tmp_path / "merged")
    assert loralens.verify(tmp_path / "merged").answer
    from safetensors.torch import load_file

    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(sender.sent[key], tensor) for key, tensor in written.items())
    assert any(
        not torch.equal(written[key], tensor) for key, tensor in models.llama().state_dict().items() if key in written
    )


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    callbacks = [lightning_callback(2, gradients=True)]
    data = torch.utils.data.DataLoader([torch.tensor([3, 4, 5, 6])] * 16, batch_size=2)
    from lightning.pytorch.loggers import CSVLogger

    trainer = lightning.Trainer(
        max_steps=STEPS, logger=CSVLogger(tmp_path, name="", version=""), callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Module(), data)
    check(tmp_path / "watch.jsonl")
    assert "lora/frobenius" in (tmp_path / "metrics.csv").read_text()
    assert all(snapshot.loss > 0 < snapshot.gradient_norm for snapshot in read_watch_log(tmp_path / "watch.jsonl")[1:])
