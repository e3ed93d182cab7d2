"""Calibration: the moments that hooks sum up are those of the inputs, in every kind of model and layer."""

import copy
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank, MismatchError, OptionError, fingerprint
from loralens.compression import measure_moments
from loralens.compression.calibration import label_loss, next_token_loss
from loralens.core import Attachment, Dense, LazyArray, Structured
from tests import models
from tests.draws import draw_adapter
from tests.marks import when_used
from tests.tolerances import MOMENTS, MOMENTS_32

torch = pytest.importorskip("torch")
peft = when_used("peft")
nn = torch.nn

pytestmark = pytest.mark.usefixtures("quiet_torch")

QV = ("q_proj", "v_proj")


def ids(rows: int = 3, length: int = 7, seed: int = 0) -> Any:
    return torch.randint(2, 24, (rows, length), generator=torch.Generator().manual_seed(seed))


def masked() -> list[dict[str, Any]]:
    """Two batches padded on the right, of different sizes."""
    batches = []
    for rows, length in ((3, 7), (2, 5)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, 3:] = 0
        batches.append({"input_ids": ids(rows, length) * mask, "attention_mask": mask})
    return batches


def inputs_of(model: Any, adapter: Adapter, batches: list[Any]) -> dict[str, np.ndarray]:
    """x at every module of the adapted model, in float64, positions that do not count left out: with hooks of our own
    on a model whose weights have ΔW added."""
    model = copy.deepcopy(model).double()
    found: dict[str, list[np.ndarray]] = {name: [] for name in adapter}
    for name, module in adapter.items():
        model.get_submodule(name).weight.data += torch.from_numpy(module.dense())
    for name in adapter:

        def keep(_layer: Any, args: Any, name: str = name) -> None:
            found[name].append(args[0][batch["attention_mask"].bool()].numpy())

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: np.concatenate(x) for name, x in found.items()}


def test_moments_are_those_of_the_adapted_inputs() -> None:
    model = models.llama().double()
    adapter = models.adapter(model, (*QV, "down_proj"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moments = measure_moments(model, masked(), adapter=adapter, source={"who": "test"})
    assert list(moments) == list(adapter)
    for name, x in inputs_of(model, adapter, masked()).items():
        z = x @ adapter[name].A.T.astype(np.float64)
        assert moments[name].count == len(x) == 3 + 7 + 7 + 3 + 5
        np.testing.assert_allclose(moments[name].K, z.T @ z / len(x), rtol=MOMENTS, atol=MOMENTS)
        assert moments[name].trace == pytest.approx(np.sum(x**2) / len(x), rel=MOMENTS)
        assert moments[name].G is None
    assert (moments.unreached, dict(moments.unmeasured)) == ((), {})
    assert dict(moments.source) == {"batches": 2, "who": "test"}
    assert moments.fingerprint == fingerprint(adapter)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    without = measure_moments(model, masked(), adapter=adapter.map(lambda m: LowRank(0 * m.B, m.A)))
    last = "model.layers.1.self_attn.v_proj"
    assert np.abs(moments[last].K - without[last].K).max() > 0.01  # the adapter was on


def carried(kinds: tuple[str, ...], path: Any, **config: Any) -> tuple[Any, Adapter]:
    """A PEFT model with random factors, and its adapter as read from a file."""
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(target_modules=list(kinds), r=3, **config))
    models.shake(model, 0.25).save_pretrained(path)
    return model, loralens.load(path)


def test_a_peft_model_gives_the_same_as_its_base(tmp_path: Any) -> None:
    model, adapter = carried(("q_proj", "down_proj"), tmp_path, lora_dropout=0.5, lora_alpha=9)
    model.train()
    with_peft = measure_moments(model, masked(), adapter=adapter, out_side=True, loss=next_token_loss)
    plain = measure_moments(models.llama(), masked(), adapter=adapter, out_side=True, loss=next_token_loss)
    for name in adapter:
        assert with_peft[name].count == plain[name].count
        np.testing.assert_allclose(with_peft[name].K, plain[name].K, rtol=MOMENTS_32, atol=MOMENTS_32)
        np.testing.assert_allclose(with_peft[name].G, plain[name].G, rtol=1e-3, atol=MOMENTS_32)
        assert with_peft[name].trace == pytest.approx(plain[name].trace, rel=MOMENTS_32)


def test_a_peft_model_that_does_not_use_the_adapter_is_refused(tmp_path: Any) -> None:
    model, adapter = carried(QV, tmp_path)
    other = adapter.map(lambda m: LowRank(m.B, -m.A, m.scale))
    with pytest.raises(MismatchError, match="q_proj: the PEFT model does not contain this adapter"):
        measure_moments(model, masked(), adapter=other)
    trained_on = adapter.map(lambda m: LowRank(1.1 * m.B, m.A, m.scale))  # A hardly moves within a run
    with pytest.raises(MismatchError, match="q_proj: the PEFT model does not contain this adapter"):
        measure_moments(model, masked(), adapter=trained_on)
    folded = adapter.map(lambda m: LowRank(m.scale * m.B, m.A))  # the same update, its scale in B
    assert set(measure_moments(model, masked(), adapter=folded)) == set(adapter)
    model.set_adapter("default")
    measure_moments(model, masked(), adapter=adapter)
    with model.disable_adapter(), pytest.raises(MismatchError, match="merged or switched off"):
        measure_moments(model, masked(), adapter=adapter)
    model.merge_adapter()
    with pytest.raises(MismatchError, match="merged or switched off"):
        measure_moments(model, masked(), adapter=adapter)


class Zoo(nn.Module):
    """One layer of every kind, plain torch."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.words = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular")
        self.turned = Conv1D(5, 6)
        self.plane = nn.Conv2d(5, 7, (2, 1), dilation=(2, 1))
        self.unused = nn.Linear(7, 7)
        self.fc = nn.Linear(7, 3)

    def forward(self, ids: Any) -> Any:
        x = self.conv(self.words(ids).mT)
        x = nn.functional.relu(self.turned(x.mT.contiguous()).mT, inplace=True)
        return self.fc(self.plane(x[..., None])[..., 0].mT)


def zoo_adapter(seed: int = 0) -> Adapter:
    shapes = {"words": (4, 9), "conv": (6, 12), "turned": (5, 6), "plane": (7, 10), "unused": (7, 7), "fc": (3, 7)}
    return draw_adapter(seed, shapes, 2, 0.4, "f8")


def zoo() -> Any:
    torch.manual_seed(1)
    return Zoo().double()


def patches(name: str, x: Any) -> np.ndarray:
    """The inputs of a layer as rows of what ΔW multiplies."""
    if name == "words":
        return np.eye(9)[x.numpy().reshape(-1)]
    if name == "conv":
        x = nn.functional.pad(x, (2, 2), mode="circular")
        return x.unfold(2, 3, 2).permute(0, 2, 1, 3).reshape(-1, 12).numpy()
    if name == "plane":
        return nn.functional.unfold(x, (2, 1), dilation=(2, 1)).mT.reshape(-1, 10).numpy()
    return x.reshape(-1, x.shape[-1]).numpy()


def test_every_kind_of_layer() -> None:
    model, adapter = zoo(), zoo_adapter()
    batches = [ids(2, 8, seed=4) % 9, (ids(1, 6, seed=5) % 9,)]
    moments = measure_moments(model, batches, adapter=adapter)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in adapter}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(patches(name, args[0]))
        )
        for name in adapter
    ]
    attachment = Attachment(model, adapter)
    with torch.no_grad(), attachment.on():
        model(batches[0])
        model(batches[1][0])
    for handle in handles:
        handle.remove()
    assert moments.unreached == ("unused",)
    assert not moments["unused"].K.any()
    for name in set(adapter) - {"unused"}:
        x = np.concatenate(rows[name])
        z = x @ adapter[name].A.T
        assert moments[name].count == len(x)
        np.testing.assert_allclose(moments[name].K, z.T @ z / len(x), rtol=MOMENTS, atol=MOMENTS, err_msg=name)
        assert moments[name].trace == pytest.approx(np.sum(x**2) / len(x), rel=MOMENTS)
    assert moments["unused"].trace == 0


def test_the_out_side_is_the_gradient_at_the_output() -> None:
    """Beside autograd's own gradients in a model whose weights have ΔW added."""
    model, adapter = zoo(), zoo_adapter()
    batch = ids(2, 8, seed=6) % 9

    def loss(output: Any, _: Any) -> Any:
        return output.square().sum()

    moments = measure_moments(model, [batch], adapter=adapter, out_side=True, loss=loss)
    grown = copy.deepcopy(model)
    outputs: dict[str, Any] = {}
    for name, module in adapter.items():
        layer = grown.get_submodule(name)
        D = torch.from_numpy(module.dense())
        layer.weight.data += (D.T if name in ("words", "turned") else D).reshape(layer.weight.shape)

        def keep(_layer: Any, _args: Any, output: Any, name: str = name) -> Any:
            outputs[name] = output
            output.retain_grad()
            return output.clone()

        layer.register_forward_hook(keep)
    loss(grown(batch), None).backward()
    for name, output in outputs.items():
        g = output.grad
        g = g.movedim(1, -1) if name in ("conv", "plane") else g
        b = g.reshape(-1, g.shape[-1]).numpy() @ adapter[name].B
        np.testing.assert_allclose(moments[name].G, b.T @ b / len(b), rtol=1e-9, atol=1e-12, err_msg=name)
    assert moments["unused"].G is not None
    assert not moments["unused"].G.any()


def test_losses_are_sums_over_what_counts() -> None:
    model = models.llama().double()
    batch = masked()[0]
    output = model(**batch)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    counted = int((labels[:, 1:] != -100).sum())
    expected = float(model(**batch, labels=labels).loss.detach()) * counted
    assert float(next_token_loss(output, batch).detach()) == pytest.approx(expected, rel=1e-5)
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}  # a pad before a token predicts nothing
    logits = output.logits.detach().log_softmax(-1)
    pairs = [(row, i) for row in range(3) for i in range(6) if row or i >= 4]
    expected = -sum(float(logits[row, i, batch["input_ids"][row, i + 1]]) for row, i in pairs)
    assert float(next_token_loss(output, left).detach()) == pytest.approx(expected, rel=1e-5)
    classifier = models.bert("BertForSequenceClassification", num_labels=3).double()
    batch = {**batch, "labels": torch.tensor([0, 2, 1])}
    output = classifier(**batch)
    assert float(label_loss(output, batch).detach()) == pytest.approx(3 * float(output.loss.detach()), rel=1e-5)


def test_what_cannot_be_measured_is_named_and_applied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    first = Structured(Dense(LazyArray.of(np.arange(16.0).reshape(4, 4))))
    adapter = Adapter(modules={"0": first, "1": LowRank(np.ones((4, 1)), np.ones((1, 4)))})
    x = torch.ones(3, 4, dtype=torch.float64)
    moments = measure_moments(model, [x], adapter=adapter)
    assert dict(moments.unmeasured) == {"0": "a full difference has no A"}
    z = (model[0](x) + x @ torch.from_numpy(first.dense()).T).sum(1).detach().numpy()
    assert pytest.approx(np.array([[np.mean(z**2)]])) == moments["1"].K
    with pytest.raises(OptionError, match="no moments of 0: a full difference has no A"):
        moments["0"]
