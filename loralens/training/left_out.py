"""What ``all-linear`` does not adapt although it is a large part of a model, for a note to the user."""

from collections import Counter
from collections.abc import Collection

from torch import nn

from loralens.core.messages import note
from loralens.core.names import some
from loralens.training.targets import output_embedding_of, plain_name

# Below this share of the weights of the layers nobody misses what is left out, such as the router of a mixture.
SMALL = 0.01


def note_left_out(model: nn.Module, adapted: Collection[str], passed_over: Collection[str]) -> None:
    """Log a note on weights that are neither adapted nor passed over by the user, if they are a large share.

    Parameters
    ----------
    model : nn.Module
        The model before the injection.
    adapted : collection of str
        The names of the layers and of the stacks of experts that are adapted.
    passed_over : collection of str
        The names of modules that the user has excluded, or that are trained in full.
    """
    head = output_embedding_of(model)
    total = missed = 0
    kinds: Counter[str] = Counter()
    for path, module in model.named_modules():
        # Embeddings are not linear layers, and nobody expects them to be adapted.
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = plain_name(f"{path}.{own}")
            if parameter.ndim < 2 or "bias" in own:
                continue
            total += parameter.numel()
            within = any(f"{name}.".startswith(f"{top}.") for top in passed_over)
            if not within and name not in adapted and name.removesuffix(".weight") not in adapted:
                missed += parameter.numel()
                kinds[".".join(part for part in name.split(".")[-3:] if not part.isdecimal())] += 1
    if total and missed / total >= SMALL:
        kind_texts = [f"{kind} ({n} of them)" if n > 1 else kind for kind, n in kinds.most_common()]
        note(f"all-linear leaves out {100 * missed / total:.1f} % of the weights of the layers: {some(kind_texts)}")
