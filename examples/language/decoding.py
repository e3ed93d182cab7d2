"""The most likely continuation of prompts, token by token (greedy decoding)."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BATCH = 32  # prompts of similar length at a time


@torch.no_grad()
def continuations(
    model: Any, prompts: Sequence[Sequence[int]], *, end: int, pad: int, most: int, batch: int = BATCH
) -> list[list[int]]:
    """For every prompt, the tokens that the model continues it with, up to ``end`` or ``most`` tokens.

    A model that PEFT has given a prefix begins with it.
    """
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        made = _continue([prompts[number] for number in chosen], model, end=end, pad=pad, most=most)
        for number, tokens in zip(chosen, made, strict=True):
            found[number] = tokens
    return found


def _continue(prompts: Sequence[Sequence[int]], model: Any, *, end: int, pad: int, most: int) -> list[list[int]]:
    ids, mask = _padded_left(prompts, pad)
    inner, cache, begun = _start(model, len(prompts))
    device = next(inner.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    seen = torch.cat([mask.new_ones(len(prompts), begun), mask], 1)
    # Padding is not seen, so its positions do not matter.
    places = begun + (mask.cumsum(1) - 1).clamp(min=0)
    made: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(most):
        inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": places, _cache_name(inner): cache}
        tokens = inner(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            done[row] = done[row] or token == end
            if not done[row]:
                made[row].append(token)
        if all(done):
            break
        ids, seen, places = tokens[:, None], torch.cat([seen, seen.new_ones(len(prompts), 1)], 1), places[:, -1:] + 1
    return made


def _padded_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, padded on the left, so that the last column is the last token of every prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = torch.tensor(tokens), 1
    return ids, mask


def _start(model: Any, count: int) -> tuple[Any, Any, int]:
    """The model to call, the cache of keys and values with which it begins, and the number of tokens in that."""
    from transformers import DynamicCache

    if not hasattr(model, "active_peft_config"):
        return model, DynamicCache(), 0
    return model.get_base_model(), model.get_prompt(count), model.active_peft_config.num_virtual_tokens


def _cache_name(model: Any) -> str:
    """The argument for the cache, which transformers 5 has renamed."""
    return "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache"
