"""Packs the texts of a run into rows, after a check that the model keeps the texts of a row apart."""

from typing import TYPE_CHECKING, Any

from loralens.core.messages import note
from loralens.errors import MismatchError, OptionError
from loralens.tables.numbers import count
from loralens.verbs.inputs.loaded import Loaded

if TYPE_CHECKING:  # torch takes a second
    from loralens.training.texts.tasks import Examples, Task

# Logits of a text in a row and alone differ by a few roundings of the dtype, relative to the largest logit, but in 16
# bits by no more than APART. Different kernels for rows of other lengths may cause LEAST. If texts see each other, the
# logits of a trained model differ by about their size, and those of a new model by as little as 4e-4 (LFM2).
ROUNDINGS = 4
LEAST, APART = 1e-4, 1e-2
TOKENS = 16  # of a text in the check


def pack_rows(loaded: Loaded, task: "Task", examples: "Examples", *, length: int) -> "Examples":
    """The texts in rows of at most ``length`` tokens.

    Raises
    ------
    OptionError
        The task does not predict the next token.
    MismatchError
        The texts of a row see each other in this model.
    """
    from loralens.training.texts.packing import filled_share, pack_texts

    if task.labelled or task.task_type != "CAUSAL_LM":
        raise OptionError(f"--pack is for causal-lm, and the task is {task.name}", fix="leave out --pack")
    _check_apart(loaded, examples)
    most = loaded.length(length)
    rows = pack_texts(examples, most)
    share = f"{100 * filled_share(rows, most):.0f} % of {most} tokens each"
    note(f"packed {count(len(examples), 'text')} into {count(len(rows), 'row')}, {share}")
    return rows


def _check_apart(loaded: Loaded, examples: "Examples") -> None:
    """Refuse a model for which a text in a row is not the text alone."""
    import torch

    from loralens.training.layers.quantised import codes_of

    texts = [tokens[:TOKENS] for tokens in examples.tokens if len(tokens) > 1][:2]
    if len(texts) < 2:
        return
    device = next(loaded.model.parameters()).device
    row = torch.tensor([texts[0] + texts[1]] * 2, device=device)  # two rows, as some kernels take only one
    positions = torch.tensor([[*range(len(texts[0])), *range(len(texts[1]))]] * 2, device=device)
    alone = torch.tensor([texts[1]], device=device)
    with torch.no_grad():
        logits = loaded.model(input_ids=row, position_ids=positions, use_cache=False).logits[1, len(texts[0]) :]
        logits_alone = loaded.model(input_ids=alone, use_cache=False).logits[0]
    # The rounding of int8 depends on the other rows of a product.
    rounding = APART if codes_of(loaded.model) else ROUNDINGS * torch.finfo(logits.dtype).eps
    tolerance = max(LEAST, min(APART, rounding)) * float(logits_alone.abs().max())
    if float((logits - logits_alone).abs().max()) > tolerance:
        config: Any = loaded.model.config
        raise MismatchError(
            f"the texts of a packed row see each other in this {config.model_type} model",
            fix="leave out --pack; --group-by-length saves padding too",
        )
