"""What a merge reports about damaged updates: limits, sentences and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.core.messages import warn
from loralens.merging.fidelity import Fidelity
from loralens.merging.record import MergedModule
from loralens.tables.numbers import count, number, percent

# A merge warns of an update with a smaller gain or a larger error. The gain is stricter than the 0.9 below which verify
# calls an update partial. At an error of 0.2, what rounding adds to the update has a fifth of its norm. Its page
# shows what a gain of 0.965 and an error of 0.35 do to the embeddings of MiniLM.
SWALLOWED = 0.95
DAMAGED = 0.2
# On a grid of few bits an error of several times the update is usual: the noise is spread over all inputs, and little
# of it lies in the directions of the adapter. At 3 to 8 times the update, adapters kept at least 85 % of the loss that
# they gain (the last column of the table in docs/commands/merge.md); at 22 times they did not.
NOISY = 15.0  # noise relative to the update from which the merge warns
# With codes, clipping usually takes 4 % of the gain. In small modules chance changes the gain by another 4 %.
CLIPPED = 0.8


def is_damaged(fidelity: Fidelity) -> bool:
    """Whether rounding takes a noticeable part of an update, or adds much to it."""
    if fidelity.codes:
        return fidelity.gain < CLIPPED or fidelity.error > NOISY
    return fidelity.gain < SWALLOWED or fidelity.error > DAMAGED


def undamaged_sentence(modules: int, *, codes: bool) -> str:
    """The sentence on the modules that are not damaged."""
    gain, error = _limits(codes)
    return f"{count(modules, 'module')} undamaged (gain ≥ {gain}, error ≤ {error})"


def modules_title(modules: Sequence[MergedModule], *, codes: bool) -> str:
    """The title of the table of modules, with the number of those that are damaged."""
    title, gain, error = count(len(modules), "updated module"), *_limits(codes)
    damaged = sum(is_damaged(module.fidelity) for module in modules)
    return f"{title}, {damaged} damaged (gain < {gain} or error > {error})" if damaged else title


def _limits(codes: bool) -> tuple[str, str]:
    """The gain below which a module is damaged, and the error above which it is."""
    return (f"{CLIPPED}", f"{NOISY:g}") if codes else (f"{SWALLOWED}", f"{DAMAGED}")


def conclusion_on_codes(total: Mapping[str, Any], *, written: bool) -> list[str]:
    """How much of an update arrived in codes, and how many of them changed; or would, if no model was written."""
    way = "by stochastic rounding" if total["drawn"] else "by rounding to the nearest code"
    own = total["subspace_error"]
    error = "" if own is None else f" and an error of {number(own)} in its own directions"
    changed, clipped = _percent(total["changed"]), _percent(total["clipped"])
    were = "were" if written else "would be"
    return [
        f"The update {'arrived' if written else 'would arrive'} with a gain of {total['gain']:.4f}{error}, {way}.",
        f"{changed} of the codes {'changed' if written else 'would change'}, {clipped} {were} clipped, and the noise "
        f"{'is' if written else 'would be'} {number(total['relative_error'])} times the update.",
    ]


def _percent(share: float) -> str:
    """A share in percent, however small: beside another percentage, a power of ten would be read as one too."""
    return f"{100 * share:.3g} %"


def conclusion_on_texts(certificate: Mapping[str, Any]) -> list[str]:
    """What the merge did to the predictions on texts; nothing if it was not measured."""
    texts = certificate.get("texts")
    if not texts:
        return []
    own, general = texts["in_domain"], texts["general"]
    gained = own["loss_base"] - own["loss_unmerged"]
    share = (own["loss_base"] - own["loss_merged"]) / gained if gained > 0 else None
    kept_text = "" if share is None else f": it keeps {percent(share)} of what the adapter gains"
    divergences = number(own["kl_unmerged_merged"], 2), number(general["kl_unmerged_merged"], 2)
    return [
        f"On these texts the loss of the merged model is {_losses(own)}{kept_text}. "
        f"Its divergence from the unmerged model is {divergences[0]}.",
        f"On general texts the loss is {_losses(general)}, and the divergence {divergences[1]}.",
    ]


def _losses(texts: Mapping[str, Any]) -> str:
    """The loss of the merged model on some texts, and those of the other two."""
    return f"{texts['loss_merged']:.3f} (unmerged {texts['loss_unmerged']:.3f}, base {texts['loss_base']:.3f})"


def warn_of_noise(modules: Sequence[MergedModule]) -> None:
    """Warn if the noise of codes hides an update, or the ends of the grid clip much of it."""
    coded = [(module.fidelity, module.fidelity.codes) for module in modules if module.fidelity.codes]
    noisy = [fidelity for fidelity, _ in coded if fidelity.error > NOISY]
    if noisy:
        worst = max(noisy, key=lambda fidelity: fidelity.error)
        ways = (
            "serve the adapter unmerged (for llama.cpp: loralens convert --to gguf), or write floats with --dtype bf16"
        )
        warn(
            f"{len(noisy)} of {len(coded)} updates are weak compared with a step of the codes; worst is "
            f"{worst.module}: noise {worst.error:.0f} times the update",
            ways,
        )
    lost = [fidelity for fidelity, codes in coded if codes and fidelity.gain < CLIPPED and codes.rounding != "nearest"]
    if lost:
        worst = min(lost, key=lambda fidelity: fidelity.gain)
        warn(
            f"{len(lost)} of {len(coded)} updates arrived in part; worst is {worst.module}: gain {worst.gain:.2f}",
            "write floats with --dtype bf16, where every update arrives in full",
        )
