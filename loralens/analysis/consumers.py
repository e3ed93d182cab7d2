"""What a server or loader would reject, or silently ignore, in an adapter; each with the way out.

Facts about vLLM, LoRAX, llama.cpp, ComfyUI and PEFT as of November 2026, from their own code and issue threads.
"""

from collections.abc import Callable, Iterator

from loralens.core.adapter import Adapter, Finding
from loralens.core.carried import MAGNITUDES
from loralens.core.matching import Match
from loralens.core.names import is_expert_alone, some
from loralens.core.structured import Structured

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
VLLM_RANK = 16  # its default
LORAX_RANK = 128  # the widest its batched kernels take

Rule = Callable[[Adapter], Iterator[Finding]]


def check(adapter: Adapter, consumer: str, match: Match | None = None) -> list[Finding]:
    """What ``consumer`` would reject (error) or ignore (warning), most serious first.

    Parameters
    ----------
    adapter : Adapter
    consumer : str
        One of `CONSUMERS`.
    match : Match, optional
        How its names match the base; a name that needs an edit is one that loads and does nothing.
    """
    findings = [finding for rule in CONSUMERS[consumer] for finding in rule(adapter)]
    if match and match.edit:
        findings.append(
            _warning(
                "names-differ",
                f"{consumer} looks the names up as they are, and they match the base only after {match.edit}: most "
                "versions load such an adapter and do nothing",
                "loralens convert … --base DIR writes it under the base's names",
            )
        )
    return sorted(findings, key=lambda finding: finding.level != "error")


def _error(code: str, text: str, fix: str) -> Finding:
    return Finding("error", code, text, fix)


def _warning(code: str, text: str, fix: str) -> Finding:
    return Finding("warning", code, text, fix)


def _must_be(form: str) -> Rule:
    def rule(adapter: Adapter) -> Iterator[Finding]:
        if adapter.format != form:
            yield _error("dialect", f"is {adapter.format}, and this reads {form}", f"loralens convert … --to {form}")

    return rule


def _no_dora(adapter: Adapter) -> Iterator[Finding]:
    if any(extra.role in MAGNITUDES for extra in adapter.extra.values()):
        yield _error("dora", "DoRA magnitudes are refused", "merge the adapter into its base, or train a plain LoRA")


def _no_saved(adapter: Adapter) -> Iterator[Finding]:
    saved = [key for key, extra in adapter.extra.items() if extra.role in ("saved", "copy", "embedding", "tokens")]
    if saved:
        text = f"modules trained in full are refused or ignored: {some(saved, 1)}"
        yield _error("saved-modules", text, "loralens convert … --drop-extra if the base's own serve as well")


def _no_bias(adapter: Adapter) -> Iterator[Finding]:
    count = sum(extra.role in ("bias", "lora_bias") for extra in adapter.extra.values())
    if count:
        yield _error("bias", f"{count} trained biases are refused or ignored", "loralens convert … --drop-extra")


def _extra_ignored(adapter: Adapter) -> Iterator[Finding]:
    applied = {"magnitude", "magnitude_in", "diff", "diff_b", "shape"}
    if adapter.format == "comfyui":
        applied.add("saved")  # set_weight; a head that another dialect trained in full is ignored
    count = sum(extra.role not in applied for extra in adapter.extra.values())
    if count:
        yield _warning(
            "extra-ignored", f"{count} tensors that are half of no pair are ignored", "merge them into the base"
        )


def _largest_rank(adapter: Adapter) -> int:
    return max((module.rank for module in adapter.modules.values()), default=0)


def _vllm_rank(adapter: Adapter) -> Iterator[Finding]:
    rank = _largest_rank(adapter)
    if rank > VLLM_RANKS[-1]:
        yield _error(
            "rank", f"rank {rank} is more than any --max-lora-rank takes ({VLLM_RANKS[-1]})", "reduce its rank"
        )
    elif rank > VLLM_RANK:
        fitting = next(r for r in VLLM_RANKS if r >= rank)
        text = f"rank {rank} is above the default limit of {VLLM_RANK}"
        yield _warning("rank", text, f"serve with --max-lora-rank {fitting}")


def _lorax_rank(adapter: Adapter) -> Iterator[Finding]:
    rank = _largest_rank(adapter)
    if rank > LORAX_RANK:
        yield _error("rank", f"rank {rank} is more than the kernels take ({LORAX_RANK})", "reduce its rank")


def _one_scale(adapter: Adapter) -> Iterator[Finding]:
    config = adapter.config or {}
    for name in ("alpha_pattern", "rank_pattern"):
        if config.get(name):
            yield _error(
                name.replace("_", "-"),
                f"{name} is ignored: {len(config[name])} entries would get the wrong strength or rank",
                "train with one rank and α for all modules",
            )


def _rslora_ignored(adapter: Adapter) -> Iterator[Finding]:
    if (adapter.config or {}).get("use_rslora"):
        yield _warning(
            "rslora",
            "use_rslora is ignored by some versions, which makes it √r too weak",
            "set lora_alpha to α·√r and use_rslora to false",
        )


def _folded(adapter: Adapter) -> Iterator[Finding]:
    if len({module.scale for module in adapter.modules.values()}) > 1:
        yield _warning(
            "mixed-scale", "holds one α for all modules", "loralens convert --to gguf folds each scale into B"
        )


def _no_structure(adapter: Adapter) -> Iterator[Finding]:
    count = sum(isinstance(module, Structured) for module in adapter.modules.values())
    if count:
        yield _error("structured", f"{count} modules are no pair B·A", "loralens convert … --rank R makes them pairs")


def experts_differ(adapter: Adapter) -> Iterator[Finding]:
    """Experts that are modules of their own and differ in rank or scale: PEFT makes one pair of them and loads none."""
    alone = [module for name, module in adapter.items() if is_expert_alone(name)]
    if len({(module.rank, module.scale) for module in alone}) > 1:
        text = (
            "experts that are modules of their own differ in rank or scale: transformers 5 joins them into one stack, "
            "and PEFT has one rank and one α for that"
        )
        yield _error("experts-differ", text, "give them one rank: loralens compress … --uniform")


def _no_experts(adapter: Adapter) -> Iterator[Finding]:
    if any(module.layout.kind == "experts" for module in adapter.modules.values()):
        yield _warning(
            "experts", "expert stacks are dropped or transposed by many versions", "test the outputs against the base"
        )


def _comfy_dora(adapter: Adapter) -> Iterator[Finding]:
    if any(extra.role == "magnitude" for extra in adapter.extra.values()):
        text = "ComfyUI divides by ‖W‖, not ‖W+ΔW‖, on the output axis: DoRA comes out otherwise than in training"
        yield _warning("dora", text, "merge it into the base")


SERVERS = (_must_be("peft"), _no_structure, _no_dora, _no_saved, _no_bias, _one_scale, _rslora_ignored, _no_experts)
CONSUMERS: dict[str, tuple[Rule, ...]] = {
    "vllm": (*SERVERS, _vllm_rank),
    "lorax": (*SERVERS, _lorax_rank),
    "llama.cpp": (_must_be("gguf"), _no_structure, _no_dora, _no_saved, _no_bias, _folded),
    "comfyui": (_must_be("comfyui"), _comfy_dora, _extra_ignored),
    "peft": (_must_be("peft"), _no_structure, experts_differ),
}
