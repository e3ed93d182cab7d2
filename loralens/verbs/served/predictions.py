"""What a local model predicts for the answers of a server: with an adapter, at other strengths, and with faults."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from math import sqrt
from statistics import mode

import numpy as np
from numpy.typing import NDArray

from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, frozen_evaluation
from loralens.core.lowrank import LowRank
from loralens.core.messages import warn
from loralens.core.names import block, expert, is_expert_alone, kind, some, weight_name
from loralens.errors import MismatchError, OptionError, place
from loralens.serving.server import Question
from loralens.verbs.models.models import ModelSource, in_floats, load_headed, model_label
from loralens.verbs.models.tokens import CAUSAL

BATCH = 1 << 24  # logits that are in memory at once, as float32: 64 MiB
# Groups of modules that servers apply or drop together.
HEAD, EXPERTS, ATTENTION, MLP, OTHER = "embeddings and head", "experts", "attention", "MLP", "other modules"


def bank() -> list[str]:
    """The built-in prompts: short neutral texts of many kinds."""
    text = files("loralens.verbs.served").joinpath("prompts.txt").read_text(encoding="utf-8")
    return [prompt.strip("\n") for prompt in text.split("\n\n") if prompt.strip()]


class LocalModel:
    """A causal language model with its tokenizer, which answers questions with variants of an adapter."""

    def __init__(self, source: ModelSource, *, device: str, dtype: str, threads: int | None) -> None:
        self.loaded = load_headed(in_floats(source), CAUSAL, device=device, dtype=dtype, threads=threads)
        self.label = model_label(source)
        if self.loaded.missing:
            raise MismatchError(
                f"{self.label} lacks weights: {some(sorted(self.loaded.missing), 1)}", fix="give a complete base"
            )

    def ids(self, text: str, length: int) -> tuple[int, ...]:
        """The tokens of a text, at most ``length``."""
        found = self.loaded.tokenizer(text, truncation=True, max_length=length)["input_ids"]
        return tuple(found)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, which the tokenizer divides into these tokens again; empty if it does not."""
        text = str(self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text if self.ids(text, 1 << 20) == tuple(ids) else ""

    def token_ids(self) -> Callable[[bytes], int | None]:
        """The id of a token from its bytes."""
        tokenizer = self.loaded.tokenizer
        known = {
            tokenizer.decode([number], skip_special_tokens=False).encode(): number for number in range(len(tokenizer))
        }
        return known.get

    def answers(self, questions: Sequence[Question], adapter: Adapter | None) -> list[NDArray[np.float64]]:
        """The log-probabilities that every question asks for, as `Answer.numbers` orders them, in nats."""
        import torch

        model = self.loaded.model
        attachment = Attachment(model, adapter) if adapter is not None and (len(adapter) or adapter.extra) else None
        found: list[NDArray[np.float64]] = []
        with frozen_evaluation(model, gradient=False), attachment.on() if attachment else nullcontext():
            for part in self._batches(questions):
                length = max(len(question.ids) for question in part)
                ids = torch.zeros(len(part), length, dtype=torch.long)
                for row, question in enumerate(part):
                    # Padded on the right: a causal model does not see the padding before it has answered.
                    ids[row, : len(question.ids)] = torch.tensor(question.ids)
                device = next(model.parameters()).device
                logits = model(input_ids=ids.to(device), use_cache=False).logits
                for row, question in enumerate(part):
                    last = len(question.ids) - 1
                    logs = logits[row, : last + 1].float().log_softmax(-1)
                    prompt = logs[:last].gather(-1, ids[row, 1 : last + 1, None].to(device))[:, 0]
                    following = logs[last][torch.tensor(question.next_ids, dtype=torch.long, device=device)]
                    found.append(torch.cat([prompt, following]).cpu().numpy().astype(np.float64))
        return found

    def likely_next(self, ids: Sequence[int], adapter: Adapter, count: int) -> tuple[int, ...]:
        """The tokens whose probability after a prompt the adapter changes most, the largest change first.

        The change is that of p, and the larger p of both sides counts, so that the server names these tokens too.
        """
        import torch

        vocabulary = len(self.loaded.tokenizer)
        question = Question(tuple(ids), "", tuple(range(vocabulary)))
        before, after = (self.answers([question], one)[0][len(ids) - 1 :] for one in (None, adapter))
        likely = torch.from_numpy(np.maximum(before, after)).topk(min(count, vocabulary)).indices.numpy()
        order = np.argsort(-np.abs(after - before)[likely], kind="stable")
        return tuple(int(token) for token in likely[order])

    def _batches(self, questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
        vocabulary = int(getattr(self.loaded.model.config, "vocab_size", 1 << 16))
        start = 0
        while start < len(questions):
            longest = max(len(question.ids) for question in questions[start:])
            size = max(1, BATCH // (longest * vocabulary))
            yield questions[start : start + size]
            start += size


def is_in_experts(name: str) -> bool:
    """Whether a module belongs to the experts of a mixture."""
    return bool(expert(name)) or is_expert_alone(name) or ".experts" in weight_name(name).lower()


def module_group(name: str) -> str:
    """The group of a module by its name, as servers treat modules alike: attention, MLP, experts, embeddings …"""
    own, path = kind(name).lower(), weight_name(name).lower()
    if own in ("lm_head", "embed_tokens", "wte", "output", "embed_out") or "embed" in own:
        return HEAD
    if is_in_experts(name):
        return EXPERTS
    if "attn" in path or "attention" in path or own in ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn"):
        return ATTENTION
    if "mlp" in path or "ffn" in path or "feed_forward" in path or own in ("gate_proj", "up_proj", "down_proj"):
        return MLP
    return OTHER


def groups_of(adapter: Adapter) -> dict[str, set[str]]:
    """The names of the modules of every group, those that were trained in full included."""
    groups: dict[str, set[str]] = {}
    for name in [*adapter, *(extra.module for extra in adapter.extra.values())]:
        groups.setdefault(module_group(name), set()).add(name)
    return groups


def vary(adapter: Adapter, factors: float | Mapping[str, float]) -> Adapter:
    """The adapter with the update of every module multiplied by a factor; modules at 0 are left out.

    Modules that a mapping does not name keep their strength.
    """

    def of(name: str) -> float:
        return factors if isinstance(factors, int | float) else factors.get(name, 1.0)

    modules = {
        name: module if of(name) == 1 else module.rescaled(module.scale * of(name), module.scaling)
        for name, module in adapter.items()
        if of(name)
    }
    extra = {key: one for key, one in adapter.extra.items() if of(one.module)}
    return replace(adapter, modules=modules, extra=extra)


def scale_faults(adapter: Adapter) -> dict[str, Adapter | None]:
    """The adapter as servers apply it whose scale is wrong, by the words for it; None is the base.

    Faults of equal strength have one entry, whose name lists them.
    """
    modules = dict(adapter.items())
    ranks = {name: max(module.rank, 1) for name, module in modules.items()}
    formulas = {module.scaling.formula for module in modules.values()}
    # The rank and α that most modules have are those of the configuration, and others come from patterns.
    rank = mode(ranks.values())
    alphas = {name: module.scale * ranks[name] for name, module in modules.items()}
    rooted = {name: module.scale * sqrt(ranks[name]) for name, module in modules.items()}
    wrong: dict[str, dict[str, float]] = {}
    if "alpha/sqrt(r)" in formulas:
        wrong["as if rsLoRA's α/√r were read as α/r"] = {name: 1 / sqrt(ranks[name]) for name in modules}
        whole = mode(round(alpha, 6) for alpha in rooted.values())
        wrong["as if alpha_pattern were ignored"] = {
            name: whole / sqrt(ranks[name]) / module.scale for name, module in modules.items() if module.scale
        }
    else:
        wrong["as if α/r were read as rsLoRA's α/√r"] = {name: sqrt(ranks[name]) for name in modules}
        wrong["as if the strength were divided by √r"] = {name: 1 / sqrt(ranks[name]) for name in modules}
        whole = mode(round(alpha, 6) for alpha in alphas.values())
        wrong["as if alpha_pattern were ignored"] = {
            name: whole / ranks[name] / module.scale for name, module in modules.items() if module.scale
        }
        wrong["as if rank_pattern were ignored"] = {name: ranks[name] / rank for name in modules}
    wrong["as if α were not divided"] = {name: float(ranks[name]) for name in modules}
    wrong["as if the scale were left out"] = {
        name: 1 / module.scale for name, module in modules.items() if module.scale
    }
    wrong["as if the scale were applied twice"] = {name: module.scale for name, module in modules.items()}
    wrong["as if divided by α"] = {name: 1 / alpha for name, alpha in alphas.items() if alpha}
    wrong["at half its strength"] = dict.fromkeys(modules, 0.5)
    wrong["twice: merged and applied, or added by two places"] = dict.fromkeys(modules, 2.0)
    faults: dict[str, Adapter | None] = {}
    by_factors: dict[tuple[float, ...], list[str]] = {}
    for words, factors in wrong.items():
        rounded = tuple(round(factors.get(name, 1.0), 3) for name in modules)
        if any(abs(factor - 1) > 0.05 for factor in rounded) and max(rounded) <= MOST:
            by_factors.setdefault(rounded, []).append(words)
    for words_of_factor in by_factors.values():
        factors = wrong[words_of_factor[0]]
        own = set(factors.values())
        strength = f"at {own.pop():.3g}: " if len(own) == 1 and not words_of_factor[0].startswith("at ") else ""
        faults[strength + ", or ".join(words_of_factor)] = vary(adapter, factors)
    return faults


MOST = 40.0  # a larger factor gives the outputs of a broken model, whose log-probabilities say nothing of the adapter


def without_group(group: str, names: Iterable[str]) -> str:
    """The words for an adapter of which a server drops a group."""
    return f"without {group} ({', '.join(sorted({kind(name) for name in names}))})"


def alone_group(group: str) -> str:
    """The words for an adapter of which a server applies one group only."""
    return f"{group} alone"


def group_faults(adapter: Adapter) -> dict[str, Adapter]:
    """The adapter without one group, and with one group alone, by the words for it."""
    groups = groups_of(adapter)
    faults: dict[str, Adapter] = {}
    if len(groups) > 1:
        for group, names in groups.items():
            faults[without_group(group, names)] = vary(adapter, dict.fromkeys(names, 0.0))
            if len(groups) > 2:
                others = set().union(*groups.values()) - names
                faults[alone_group(group)] = vary(adapter, dict.fromkeys(others, 0.0))
    return faults


WITHOUT_BLOCK = "without block "


def fine_faults(adapter: Adapter) -> dict[str, Adapter]:
    """The adapter without one kind of modules, without one block, with updates transposed, by the words for it."""
    parts: dict[str, set[str]] = {}
    for name in adapter:
        parts.setdefault(f"without {kind(name)}", set()).add(name)
        found = block(name)
        if found:
            parts.setdefault(f"{WITHOUT_BLOCK}{found.number}", set()).add(name)
    # The groups have been tried.
    known = [set(names) for names in groups_of(adapter).values()]
    faults = {
        words: vary(adapter, dict.fromkeys(names, 0.0))
        for words, names in parts.items()
        if len(names) < len(adapter) and names not in known
    }
    for what, chosen in (("experts", is_in_experts), ("square updates", lambda name: not is_in_experts(name))):
        turned = {
            name: LowRank(module.A.T, module.B.T, scale=module.scale, scaling=module.scaling)
            for name, module in adapter.items()
            if isinstance(module, LowRank) and module.shape[0] == module.shape[1] and chosen(name)
        }
        if turned:
            faults[f"with {what} transposed"] = replace(adapter, modules={**dict(adapter.items()), **turned})
    return faults


def check_applies(model: LocalModel, adapter: Adapter, label: str) -> None:
    """Refuse an adapter that does not fit the base; warn of what is left out of the prediction."""
    with place(label):
        attachment = Attachment(model.loaded.model, adapter)
    for key, why in attachment.left_out.items():
        warn(f"{label}: {key} is not in the prediction ({why})")
    if not len(adapter) and not adapter.extra:
        raise OptionError(f"{label} has no update", fix="give an adapter that changes the base")


def questions_of(model: LocalModel, texts: Sequence[str], *, length: int) -> list[Question]:
    """One question for each text that has at least four tokens."""
    found = []
    for text in texts:
        ids = model.ids(text, length)
        if len(ids) >= 4:
            found.append(Question(ids, model.text(ids)))
    return found
