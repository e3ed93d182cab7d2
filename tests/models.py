"""Tiny transformers models and tokenizers, made offline from fixed seeds, in memory and as folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import loralens
from loralens import Adapter, LowRank
from tests.draws import draw_factors

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "it", "slept")
TEXTS = (
    "the cat sat on the mat",
    "a dog ran under the tree and then it slept",
    "it ran",
    "the dog sat and the cat ran",
)

NEUTRAL = [f"the {a} {b} on the {c}" for a in ("dog", "tree", "mat") for b in ("sat", "ran") for c in ("mat", "tree")]
LAST = "model.layers.1.mlp.down_proj"  # the last module of `llama`


def llama(**changes: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return _seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)))


def wide_llama() -> Any:
    """One whose weights have whole blocks of NF4, which have 64 numbers."""
    return llama(hidden_size=64, intermediate_size=128)


def decided_llama(make: Any = llama) -> Any:
    """One that prefers some words clearly."""
    import torch

    model = make()
    with torch.no_grad():
        model.lm_head.weight *= 30
        model.model.embed_tokens.weight += 0.5  # so that the inputs of all layers have a direction in common
    return model


def one_word_adapter(make: Any = llama, word: str = "cat") -> Adapter:
    """For `decided_llama`: its last module adds the direction of a word, whatever stands before."""
    import torch

    model, words = decided_llama(make), tokenizer()
    layer, inputs = model.get_submodule(LAST), []
    hook = layer.register_forward_hook(lambda _, x, __: inputs.append(x[0][0]))
    with torch.no_grad():
        for text in NEUTRAL:
            model(input_ids=torch.tensor([words(text)["input_ids"]]))
    hook.remove()
    shared = torch.cat(inputs).mean(0)
    A = (shared / shared.norm() ** 2)[None].numpy()
    rows = model.lm_head.weight.detach() - model.lm_head.weight.detach().mean(0)
    along = rows[words.convert_tokens_to_ids(word)]
    return Adapter(modules={LAST: LowRank((along / along.norm())[:, None].numpy(), A)})


def bert(kind: str = "BertModel", **changes: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, **changes,
    )  # fmt: skip
    return _seeded(lambda: getattr(transformers, kind)(config))


def gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return _seeded(lambda: transformers.GPT2LMHeadModel(config))


def t5() -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _seeded(lambda: transformers.T5ForConditionalGeneration(config))


def shake(model: Any, size: float, seed: int = 1) -> Any:
    """The model after a random step of everything that is trained."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def _seeded(make: Any) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def tokenizer() -> Any:
    """One token a word; the pad token is 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("[PAD]", "[END]", "[UNK]", *WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]")


def folder(model: Any, path: Path) -> Path:
    """The model and the tokenizer, saved as transformers saves them."""
    model.save_pretrained(path)
    made = tokenizer()
    made.padding_side = "left"  # as many causal models have it; it must not matter
    made.save_pretrained(path)
    return path


def low_rank(
    out: int, in_: int, rank: int = 2, scale: float = 1.0, *, seed: int = 0, dtype: Any = np.float32, **more: Any
) -> LowRank:
    """Random factors, the same ones for the same seed."""
    return LowRank(*draw_factors(seed, out, in_, rank, dtype), scale, **more)


def adapter(model: Any, kinds: tuple[str, ...], *, seed: int = 0, rank: int = 3, scale: float = 2.0) -> Adapter:
    """Random pairs for every linear layer whose name ends in one of ``kinds``."""
    rng = np.random.default_rng(seed)
    modules = {
        name: LowRank(
            rng.standard_normal((layer.out_features, rank)).astype(np.float32) / 4,
            rng.standard_normal((rank, layer.in_features)).astype(np.float32) / 4,
            scale,
        )
        for name, layer in model.named_modules()
        if name.endswith(kinds)
    }
    return Adapter(modules=modules)


def saved(made: Adapter, path: Path) -> Path:
    loralens.save(made, path)
    return path


def jsonl(path: Path, texts: Any = TEXTS, **fields: Any) -> Path:
    lines = (
        json.dumps({"text": text, **{key: value[i] for key, value in fields.items()}}) for i, text in enumerate(texts)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
