"""The judge of `low_bit_study.py`: loss and divergence of a model on texts, in float32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np
import torch
from low_bit_bases import MODEL

from loralens.analysis.behaviour import sum_divergences
from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment
from loralens.verbs.inputs.corpus.texts import InputText
from loralens.verbs.inputs.models import load_model

BATCH = 8  # texts of similar length at a time


@dataclass(frozen=True)
class Looked:
    """The loss on the texts of a part, and KL(reference ‖ model), both per token; and the number of tokens."""

    loss: float
    divergence: float
    tokens: int


class Judge:
    """SmolLM2 in float32 with texts to judge it on.

    Parameters
    ----------
    parts : mapping of str to sequence of str
        The texts, by the name of their part.
    length : int
        Tokens after which a text is cut.
    """

    def __init__(self, parts: Mapping[str, Sequence[str]], length: int) -> None:
        loaded = load_model(MODEL, device="cpu", dtype="f32", threads=1)
        self.model: Any = loaded.model.eval()
        self._batches: dict[str, list[dict[str, Any]]] = {}
        for name, texts in parts.items():
            # Texts of one length together, so that little of a batch is padding.
            ordered = [InputText(text) for text in sorted(texts, key=len)]
            self._batches[name] = list(loaded.batches(ordered, batch=BATCH, length=length))
        self._reference: dict[str, list[torch.Tensor]] = {}

    def put(self, name: str, numbers: "np.ndarray") -> None:
        """Replace the weight of a module."""
        weight = self.model.get_submodule(name).weight
        weight.data = torch.from_numpy(np.ascontiguousarray(numbers, np.float32))

    def refer(self, adapter: Adapter) -> dict[str, Looked]:
        """Take the model with the adapter beside its weights as the reference of divergences."""
        with Attachment(self.model, adapter).on():
            return self._look(keep=True)

    def look(self) -> dict[str, Looked]:
        """Loss and divergence of the model as it is."""
        return self._look(keep=False)

    @torch.no_grad()
    def _look(self, *, keep: bool) -> dict[str, Looked]:
        found = {}
        for part, batches in self._batches.items():
            losses, divergences, tokens = [], [], 0
            if keep:
                self._reference[part] = []
            for number, inputs in enumerate(batches):
                ids, mask = inputs["input_ids"], inputs["attention_mask"][:, 1:].bool()
                logits = self.model(**inputs).logits[:, :-1][mask]
                ours = torch.log_softmax(logits.float(), -1)
                losses.append(-float(ours.gather(-1, ids[:, 1:][mask][:, None]).double().sum()))
                tokens += len(ours)
                if keep:
                    self._reference[part].append(ours)
                theirs = self._reference[part][number]
                divergences.append(sum_divergences(theirs, ours))
            found[part] = Looked(fsum(losses) / tokens, fsum(divergences) / tokens, tokens)
        return found
