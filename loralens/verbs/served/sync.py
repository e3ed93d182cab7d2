"""The check of `prove` at every sync of a trainer with a server, as a function that a `Watcher` calls."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.messages import warn
from loralens.serving.interfaces import connect
from loralens.serving.server import Question
from loralens.verbs.models.models import ModelSource, restore_settings
from loralens.verbs.models.texts import TextSource, read_texts
from loralens.verbs.served.evidence import REQUESTS, ask_server, base_name_of, choose
from loralens.verbs.served.predictions import LocalModel, bank
from loralens.verbs.served.prove import judge


@final
class SyncCheck:
    """Whether a server has the adapter that a trainer has pushed to it.

    Give it to a watcher: ``Watcher(model, on_sync=SyncCheck(base, server=URL, model=NAME))``. After a push,
    ``watcher.synced()`` asks the server, and writes a line ``{"step": …, "served": {…}}`` to the log of the watcher.

    Parameters
    ----------
    base : path or (model, tokenizer)
        The base model; it must not be the model that is being trained.
    server, model : str
        The address of the server, and the name of the adapter on it.
    base_name : str, optional
        The name of the base on the server. [default: the parent that the server states]
    data : path or iterable, optional
        Texts to ask for, in place of the built-in ones.
    requests : int
        The largest number of requests of a check.
    interface, timeout, device
        As for `prove`.

    Notes
    -----
    The prompts are chosen at the first sync at which the adapter changes anything, and stay the same. The adapter of
    the sync before is one of the explanations, so that a server whose state is stale is called so.
    """

    def __init__(
        self,
        base: ModelSource,
        *,
        server: str,
        model: str,
        base_name: str | None = None,
        data: TextSource | None = None,
        requests: int = REQUESTS,
        interface: str | None = None,
        timeout: float = 120.0,
        device: str = "auto",
    ) -> None:
        self._server = connect(server, kind=interface, timeout=timeout)
        self._model, self._requests = model, requests
        self._base_name = base_name_of(self._server, model) if base_name is None else base_name
        self._texts: Sequence[str] = bank() if data is None else [text.text for text in read_texts(data)]
        self._base = base
        with restore_settings(base):
            self._local = LocalModel(base, device=device, dtype="f32", threads=None)
        if hasattr(self._server, "token_ids"):
            self._server.token_ids = self._local.token_ids()
        self._questions: list[Question] = []
        self._last: tuple[int, Adapter] | None = None

    def __call__(self, step: int, adapter: Adapter) -> dict[str, Any]:
        """Ask the server about the adapter as it is now; the line of the log, without the step."""
        now = _in_memory(adapter)
        if not any(np.any(module.B) for _, module in now.items() if isinstance(module, LowRank)):
            return {"verdict": "cannot-tell", "headline": "CANNOT TELL: the adapter changes nothing yet."}
        with restore_settings(self._base):
            if not self._questions:
                self._questions = choose(
                    self._local, now, self._texts, self._server, self._requests, asks_base=self._base_name is not None
                )
            evidence = ask_server(self._server, self._model, self._base_name, self._questions)
            before = {} if self._last is None else {f"of step {self._last[0]}": self._last[1]}
            proof = judge(self._local, now, evidence, siblings=before, adapter_label=f"step {step}")
        self._last = step, now
        if not proof.answer:
            warn(f"step {step}: {proof.headline}", "see whether the server has loaded the adapter of this step")
        return {"verdict": proof.verdict, "headline": proof.headline, "strength": proof.strength.value}


def _in_memory(adapter: Adapter) -> Adapter:
    """A copy that does not change when the trainer takes a step."""
    modules = {
        name: LowRank(np.array(module.B), np.array(module.A), module.scale, scaling=module.scaling)
        if isinstance(module, LowRank)
        else module
        for name, module in adapter.items()
    }
    return replace(adapter, modules=modules)
