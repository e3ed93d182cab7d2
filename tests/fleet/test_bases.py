"""The base of an adapter from names and shapes, against the model classes of transformers."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.core.names import normal_form
from loralens.fleet.catalogue import Signature
from loralens.fleet.known_bases import STYLES, base_name, contradicts, fitting_bases, infer_bases, known_bases
from tests.draws import draw_adapter
from tests.fleet.makers import indexed

Shapes = dict[str, tuple[int, int]]


def signature(shapes: Shapes) -> Signature:
    names = sorted(shapes)
    return Signature(tuple(map(normal_form, names)), tuple(map(normal_form, names)), tuple(shapes[n] for n in names))


def gpt2(blocks: int, width: int = 768) -> Shapes:
    return {f"transformer.h.{b}.attn.c_attn": (3 * width, width) for b in range(blocks)}


def llama(blocks: int, hidden: int, q: int, kv: int, mlp: int, kinds: str = "qv") -> Shapes:
    sizes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes = {f"model.layers.{b}.self_attn.{kind}_proj": sizes[kind] for b in range(blocks) for kind in kinds}
    return {**shapes, **{f"model.layers.{b}.mlp.up_proj": (mlp, hidden) for b in range(blocks)}}


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (gpt2(12), "gpt2"),
        (gpt2(6), "distilgpt2"),
        ({**gpt2(12), "score": (2, 768)}, "gpt2"),
        (llama(18, 640, 1024, 256, 2048), "gemma-3-270m"),
        ({f"bert.encoder.layer.{b}.attention.self.query": (384, 384) for b in range(6)}, "minilm-l6"),
        ({f"decoder.block.{b}.layer.0.SelfAttention.q": (512, 512) for b in range(6)}, "t5-small"),
    ],
)
def test_one_base_fits(shapes: Shapes, name: str) -> None:
    assert fitting_bases(signature(shapes))[0] == name


@pytest.mark.parametrize(
    ("shapes", "candidates"),
    [
        # Llama 3 and Mistral have the same shapes, and so have Llama 2 and others.
        (llama(32, 4096, 4096, 1024, 14336), {"llama-3-8b", "mistral-7b"}),
        # Without the prefix of the model it may be any of three.
        (
            {f"encoder.layer.{b}.attention.self.query": (768, 768) for b in range(12)},
            {"bert-base", "roberta-base or xlm-roberta-base", "electra-base"},
        ),
        # Six of the blocks of a larger model, or all of a smaller one that the table does not have.
        (gpt2(8), {"gpt2"}),
        # Only a head.
        ({"classifier": (6, 768)}, set()),
        # A shape that no base has.
        (gpt2(12, 770), set()),
        # A module that GPT-2 does not have.
        ({**gpt2(12), "transformer.h.0.attn.other": (768, 768)}, set()),
    ],
)
def test_unknown_rather_than_a_guess(shapes: Shapes, candidates: set[str]) -> None:
    name, fitting = fitting_bases(signature(shapes))
    assert name == ""
    assert set(fitting) == candidates


def test_every_row_of_the_table_fits_itself_and_is_found_by_its_name() -> None:
    for row in known_bases():
        shapes = {}
        start = {"opt": "decoder.", "bart": "decoder.", "t5": "decoder.", "t5-gated": "decoder."}.get(row.style, "")
        for block in range(row.blocks):
            for name, shape in row.shapes().items():
                shapes[start.replace(".", "_") + name.replace("#", str(block), 1).replace("#", "0")] = shape
        candidates = fitting_bases(signature(shapes))[1]
        assert row.name in candidates, row.name
        assert row.style in STYLES
    names = [row.name for row in known_bases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("distilbert/distilbert-base-uncased-finetuned-sst-2-english", "distilbert-base"),
        ("unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "qwen2-0.5b"),
        (r"D:\models\gemma3-270m", "gemma-3-270m"),
        ("meta-llama/Llama-2-7b-hf", "llama-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm-l6"),
        ("xlm-roberta-base", "roberta-base or xlm-roberta-base"),
        ("someone/My Own_Model", "my-own-model"),
    ],
)
def test_names_of_bases(called: str, name: str) -> None:
    assert base_name(called) == name


@pytest.mark.parametrize(
    ("base", "shapes", "reason"),
    [
        ("gpt2", gpt2(12), ""),
        ("gpt2", gpt2(6), ""),  # an adapter of some blocks
        ("distilgpt2", gpt2(12), "it has block 11, and distilgpt2 has 6 blocks"),
        ("gpt2", gpt2(12, 1024), "h_#_attn_c_attn is 3072 × 1024, and 2304 × 768 in gpt2"),
        ("gpt2", llama(12, 768, 768, 768, 3072), "gpt2 has no module model_layers_#_mlp_up_proj"),
        ("gpt2", {"classifier": (6, 768)}, ""),
    ],
)
def test_a_base_that_is_named_and_does_not_fit(base: str, shapes: Shapes, reason: str) -> None:
    assert contradicts(base, signature(shapes)) == reason


def test_neighbours_of_equal_names_and_shapes_decide_if_they_agree() -> None:
    own = {f"model.layers.{b}.attn.wqkv": (30, 10) for b in range(4)}
    signatures = {"own": signature(own), "more": signature({**own, "model.layers.0.mlp.w1": (40, 10)})}
    assert infer_bases(signatures, {}) == {}
    assert infer_bases(signatures, {"more": Counter({"org/Odd-1B": 2})}) == {"own": "odd-1b", "more": "odd-1b"}
    two = {"more": Counter({"org/Odd-1B": 2}), "own": Counter({"org/even-1b": 1})}
    assert infer_bases(signatures, two) == {}
    # A deeper model has the same first blocks.
    deeper = {"deeper": signature({f"model.layers.{b}.attn.wqkv": (30, 10) for b in range(8)})}
    assert infer_bases({"own": signatures["own"], **deeper}, {"deeper": Counter({"org/Odd-2B": 1})}) == {
        "deeper": "odd-2b"
    }


def save(folder: Path, shapes: Shapes, base: str | None, *, seed: int = 0) -> None:
    loralens.save(draw_adapter(seed, shapes, 1, base_model=base), folder)


def test_the_bases_of_a_fleet(tmp_path: Path) -> None:
    odd = {f"model.blocks.{b}.attn.wqkv": (30, 10) for b in range(4)}
    save(tmp_path / "named", gpt2(12, 768), "gpt2")
    save(tmp_path / "shown", gpt2(12, 768), None, seed=1)
    save(tmp_path / "wrong", gpt2(12, 1024), "gpt2", seed=2)
    save(tmp_path / "odd-named", odd, "org/odd", seed=3)
    save(tmp_path / "odd-named-otherwise", odd, "org/strange", seed=4)
    save(tmp_path / "odd-alike", odd, None, seed=3)
    save(tmp_path / "odd-alone", odd, None, seed=5)
    fleet = indexed(tmp_path)
    result = fleet.bases()
    found = {
        one.member.name: (one.base, one.source)
        for one in [*(x for row in result for x in row.adapters), *result.unknown]
    }
    assert found == {
        "named": ("gpt2", "named"),
        "shown": ("gpt2", "names and shapes"),
        "wrong": ("", "unknown"),
        "odd-named": ("odd", "named"),
        "odd-named-otherwise": ("strange", "named"),
        "odd-alike": ("odd", "neighbours"),
        "odd-alone": ("", "unknown"),
    }
    assert [one.member.name for one in result.contradictions] == ["wrong"]
    assert result.contradictions[0].contradiction == "h_#_attn_c_attn is 3072 × 1024, and 2304 × 768 in gpt2"
    assert result.conclusion() == [
        "7 adapters for 3 base models; the base of 2 is unknown.",
        "1 adapter names a base that it does not fit.",
    ]


def test_bases_of_one_row_of_the_table_that_are_several_models_are_told_apart(tmp_path: Path) -> None:
    """Their weights have the same names and shapes, and an adapter of one does nothing sensible on another."""
    bert, roberta = (
        {f"{family}.encoder.layer.{b}.attention.self.query": (768, 768) for b in range(12)}
        for family in ("bert", "roberta")
    )
    named = ["bert-base-uncased", "google-bert/bert-base-uncased", "bert-base-cased", None, "FacebookAI/roberta-base"]
    for seed, base in enumerate([*named, "FacebookAI/xlm-roberta-base"]):
        save(tmp_path / f"a{seed}", bert if seed < 4 else roberta, base, seed=seed)
    fleet = indexed(tmp_path)
    found = {row.base: [one.member.name for one in row.adapters] for row in fleet.bases()}
    assert found == {
        "bert-base-uncased": ["a0", "a1"],
        "bert-base-cased": ["a2"],
        "bert-base": ["a3"],  # its names and shapes are those of both
        "roberta-base": ["a4"],
        "xlm-roberta-base": ["a5"],
    }


# The default sizes of a configuration of transformers are those of one published model.
CLASSES = {
    "distilbert-base": "DistilBertModel", "gpt2": "GPT2Model", "bert-base": "BertModel",
    "roberta-base or xlm-roberta-base": "RobertaModel",
    "t5-small": "T5Model", "opt-125m": "OPTModel", "whisper-tiny": "WhisperModel", "vit-base": "ViTModel",
    "mistral-7b": "MistralModel", "llama-7b": "LlamaModel", "gpt-neo-1.3b": "GPTNeoModel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), CLASSES.items())
def test_the_table_has_the_shapes_of_the_model_classes(name: str, model: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind: Any = getattr(transformers, model)
    with torch.device("meta"):
        made = kind(kind.config_class())
    shapes: Shapes = {}
    for path, module in made.named_modules():
        if type(module).__name__ == "Linear":
            shapes[path] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            shapes[path] = (module.weight.shape[1], module.weight.shape[0])
    # What is not in a block, such as a pooler, depends on the class and not on the base.
    inside = {path: shape for path, shape in shapes.items() if any(part.isdigit() for part in path.split("."))}
    assert name in fitting_bases(signature(inside))[1]
