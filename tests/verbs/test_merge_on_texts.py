"""`merge --data`: losses and divergences of the base, the unmerged and the merged model, in and out of the domain."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import FormatError
from loralens.core import LazyArray
from loralens.formats import open_checkpoint
from loralens.linalg import Device
from loralens.merging.codec import FloatCodec
from loralens.merging.merge_plan import Segment, TensorPlan
from loralens.verbs.merges.low_bit_base import NO_CODES
from loralens.verbs.merges.merge import conclusion_on_texts
from loralens.verbs.merges.merge_on_texts import changed_rows, general_texts
from tests import ggufs, models
from tests.bases import edit_config
from tests.draws import draw_adapter, draw_factors
from tests.formats.test_float_folder import TOKENS, VALUES
from tests.verbs.low_bit_bases import nf4_base, pair_adapter

torch = pytest.importorskip("torch")
TEXTS = list(models.TEXTS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.saved(models.adapter(models.llama(), ("q_proj", "down_proj")), home / "adapter")
    return home


def held(folder: Path) -> Any:
    """The model of a folder, with its weights as transformers or, if they are codes, our reader decode them."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = {key: torch.from_numpy(t.read().astype(np.float32)) for key, t in open_checkpoint(folder).tensors.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def loss_of(model: Any, texts: Any = TEXTS, tokenizer: Any = None) -> float:
    """The mean loss of the tokens of all texts."""
    total, count, tokenizer = 0.0, 0, tokenizer or models.tokenizer()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logarithms = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(logarithms.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def test_the_losses_are_those_of_the_three_models(home: Path, tmp_path: Path, quiet_torch: None) -> None:
    result = loralens.merge(home / "adapter", base=home / "llama", output=tmp_path / "out", dtype="bf16", data=TEXTS)
    texts = result.certificate["texts"]
    losses = {name: loss_of(held(folder)) for name, folder in (("base", home / "llama"), ("merged", tmp_path / "out"))}
    assert texts["in_domain"]["tokens"] == sum(len(text.split()) - 1 for text in TEXTS)
    for name, loss in losses.items():
        # The unplanned weights of the merged folder are rounded to bfloat16 too.
        assert texts["in_domain"][f"loss_{name}"] == pytest.approx(loss, rel=1e-5 if name == "base" else 1e-2)
    in_domain = texts["in_domain"]
    assert 0 <= in_domain["kl_unmerged_merged"] < in_domain["kl_unmerged_base"]
    assert texts["general"]["tokens"] > 0


@pytest.mark.slow
def test_of_many_texts_it_says_that_the_first_were_taken(
    home: Path, tmp_path: Path, quiet_torch: None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "many.txt"
    file.write_text("\n".join([TEXTS[0]] * 40))
    with caplog.at_level("INFO", "loralens"):
        result = loralens.merge(home / "adapter", base=home / "llama", dry_run=True, data=file)
    assert f"measured on the first 16 texts of {file}, which bounds the time, and on 16 of" in caplog.text
    general = result.certificate["texts"]["general"]
    assert f"base {general['loss_base']:.3f}), and the divergence" in " ".join(conclusion_on_texts(result.certificate))


@pytest.mark.slow
def test_a_merge_into_floats_says_the_losses_too(home: Path, quiet_torch: None) -> None:
    result = loralens.merge(home / "adapter", base=home / "llama", dry_run=True, dtype="bf16", data=TEXTS)
    own, general = (result.certificate["texts"][kind] for kind in ("in_domain", "general"))
    *_, first, second = result.conclusion()
    assert first.startswith(f"On these texts the loss of the merged model is {own['loss_merged']:.3f} (unmerged ")
    assert f"divergence from the unmerged model is {own['kl_unmerged_merged']:.2g}." in first
    assert second.startswith(f"On general texts the loss is {general['loss_merged']:.3f} (unmerged ")


@pytest.mark.slow
def test_a_model_that_is_quantised_once_is_measured_as_codes(home: Path, tmp_path: Path, quiet_torch: None) -> None:
    result = loralens.merge(home / "adapter", base=home / "llama", output=tmp_path / "out", bits="nf4", data=TEXTS)
    own = result.certificate["texts"]["in_domain"]
    assert own["loss_merged"] == pytest.approx(loss_of(held(tmp_path / "out")), abs=1e-5)
    # Four bits move every weight, so the two cannot be confused.
    assert abs(own["loss_merged"] - own["loss_unmerged"]) > 1e-4


@pytest.mark.slow
def test_a_weight_that_is_saved_in_full_is_in_both_models(home: Path, tmp_path: Path, quiet_torch: None) -> None:
    folder = tmp_path / "adapter"
    models.saved(models.adapter(models.llama(), ("q_proj",)), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.norm.weight"] = np.full(models.llama().config.hidden_size, 3, np.float32)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_config(folder, modules_to_save=["norm"])
    result = loralens.merge(folder, base=home / "llama", output=tmp_path / "out", data=TEXTS)
    own = result.certificate["texts"]["in_domain"]
    loss = loss_of(held(tmp_path / "out"))
    assert own["loss_merged"] == pytest.approx(loss, abs=1e-5)
    assert own["loss_unmerged"] == pytest.approx(loss, abs=1e-5)


def test_a_base_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    base = nf4_base(tmp_path / "base")
    alone = tmp_path / "alone.safetensors"
    (base / "model.safetensors").rename(alone)
    with pytest.raises(FormatError, match=r"alone.safetensors: .*config.json, without which a model cannot be run"):
        loralens.merge(pair_adapter(), base=alone, bits="keep", dry_run=True, data=TEXTS)


def mlx_folder(source: Path, target: Path) -> Path:
    """The matrices of the blocks of a model as MLX stores them: 4 bits, a scale and a bias for every 32 inputs."""
    shutil.copytree(source, target)
    stored: dict[str, Any] = {}
    for key, W in load_file(source / "model.safetensors").items():
        if W.ndim != 2 or ".layers." not in key:
            stored[key] = W
            continue
        groups = W.reshape(len(W), -1, 32)
        biases, scales = groups.min(axis=2), np.ptp(groups, axis=2) / 15
        codes = np.rint((groups - biases[..., None]) / scales[..., None]).astype(np.uint32).reshape(len(W), -1, 8)
        stored[key] = (codes << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)
        stored |= {key.replace(".weight", ".scales"): scales, key.replace(".weight", ".biases"): biases}
    save_file(stored, target / "model.safetensors", metadata={"format": "mlx"})
    config = json.loads((target / "config.json").read_text())
    settings = {"group_size": 32, "bits": 4}
    (target / "config.json").write_text(
        json.dumps({**config, "quantization": settings, "quantization_config": settings})
    )
    return target


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["keep", None])
@pytest.mark.parametrize("layout", ["nf4", "mlx"])
def test_a_folder_of_codes_is_run_as_the_floats_that_it_stands_for(
    layout: str, bits: Any, tmp_path: Path, quiet_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, adapter = models.folder(models.wide_llama(), tmp_path / "plain"), tmp_path / "adapter"
    models.saved(models.adapter(models.wide_llama(), ("q_proj", "down_proj"), scale=0.2), adapter)
    base = tmp_path / "base"
    if layout == "nf4":
        loralens.merge(adapter, base=plain, output=base, bits="nf4")
    else:
        mlx_folder(plain, base)
    for path in base.glob("*loralens*"), base.glob("*certificate*"):
        [file.unlink() for file in path]
    result = loralens.merge(
        adapter, base=base, output=tmp_path / "out", bits=bits, data=TEXTS, dtype="keep" if bits else "f32"
    )
    own = result.certificate["texts"]["in_domain"]
    unmerged, updates = held(base), loralens.load(adapter)
    for name, update in updates.items():
        weight = unmerged.get_submodule(name).weight.data
        weight += torch.from_numpy(update.dense().astype(np.float32))
    losses = {"base": loss_of(held(base)), "unmerged": loss_of(unmerged), "merged": loss_of(held(tmp_path / "out"))}
    for name, loss in losses.items():
        assert own[f"loss_{name}"] == pytest.approx(loss, abs=2e-5), name
    assert abs(losses["base"] - losses["unmerged"]) > 1e-3
    assert (own["kl_unmerged_merged"] > 1e-5) == bool(bits)
    # The folder of floats is made once, and the base stays as it is.
    (folder,) = (tmp_path / "cache" / "loralens" / "models").iterdir()
    assert "quantization" not in (folder / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bits": "keep"}, {"dtype": "f32"}, {"dtype": "bf16"}], ids=str)
def test_a_gguf_file_is_run_as_the_floats_that_it_stands_for(
    options: dict[str, Any], tmp_path: Path, quiet_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, texts = tmp_path / "base.gguf", ["abc cab", "bacab abba", "cc ab"]
    ggufs.write(base, ggufs.llama(), values=VALUES, tokens=TOKENS)
    shapes = {"model.layers.1.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
    updates = draw_adapter(0, shapes, 3, 0.3)
    out = tmp_path / "out.gguf"
    result = loralens.merge(updates, base=base, output=out, data=texts, **options)
    own = result.certificate["texts"]["in_domain"]
    (folder,) = (tmp_path / "cache" / "loralens" / "models").iterdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def loss(numbers: dict[str, Any]) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.load_state_dict({key: torch.from_numpy(W) for key, W in numbers.items()}, strict=False)
        return loss_of(model, texts, tokenizer)

    before, after = (
        {key: tensor.read().astype(np.float32) for key, tensor in open_checkpoint(path).tensors.items()}
        for path in (base, out)
    )
    unmerged = {
        key: W + updates[name].dense() if (name := key.removesuffix(".weight")) in updates else W
        for key, W in before.items()
    }
    # The weights that no adapter changes are rounded to bfloat16 in the file, and measured as they are in the base.
    merged = {key: W if key.removesuffix(".weight") in updates else before[key] for key, W in after.items()}
    for name, numbers in (("base", before), ("unmerged", unmerged), ("merged", merged)):
        assert own[f"loss_{name}"] == pytest.approx(loss(numbers), abs=2e-5), name
    assert abs(own["loss_base"] - own["loss_unmerged"]) > 1e-2
    assert (own["kl_unmerged_merged"] < 1e-6) == (options == {"dtype": "f32"})


def test_a_weight_of_several_blocks_is_taken_block_by_block() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((3000, 256)).astype(np.float32)
    update = loralens.LowRank(*draw_factors(rng, *W.shape, 2, "f4"))
    plan = TensorPlan("w", LazyArray.of(W), W.shape, (Segment("m", 0, 3000, ((1.0, update),)),))
    inputs: Any = SimpleNamespace(codec=lambda *_: FloatCodec(plan), quantised=NO_CODES)
    whole, merged = np.zeros_like(W), np.zeros_like(W)
    blocks = 0
    for start, *rows in changed_rows(inputs, plan, "nearest", 0, Device.of("cpu")):
        whole[start : start + len(rows[0])], merged[start : start + len(rows[1])] = rows
        blocks += 1
    assert blocks > 1
    np.testing.assert_allclose(whole, W + update.dense(), atol=1e-5)
    np.testing.assert_array_equal(whole, merged)


@pytest.mark.slow
def test_general_texts_of_every_machine() -> None:
    texts, label = general_texts(20)
    assert len(texts) == 20
    assert label
    assert all(len(text.text) > 20 for text in texts)
