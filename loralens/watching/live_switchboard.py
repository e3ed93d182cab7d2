"""`LiveSwitchboard`: merges the adapter of a model in memory into its weights, and restores the base bit for bit.

Trainers that generate with merged weights merge and unmerge thousands of times. Adding and subtracting in 16 bits
changes the base a little each time, because several weights are rounded to the same sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

from torch import nn

from loralens.errors import MismatchError, OptionError
from loralens.merging.switchboard import MemoryUse, Switchboard
from loralens.watching.view import any_process, is_sharded, live, one_active, peft_model

TASK = "live"
# Extras that belong to the merged weight. PEFT's own layers apply all others, such as modules that are saved in full.
MERGED = ("magnitude", "norms", "lora_bias")
BUDGET = 0.1  # share of the bytes of the adapted weights


@final
class LiveSwitchboard:
    """A model of PEFT whose adapter is merged and unmerged without drift.

    ``with switchboard.merged(): …`` takes the place of ``model.merge_adapter(); …; model.unmerge_adapter()``.

    Parameters
    ----------
    model : nn.Module
        A model of PEFT whose weights are float32, bfloat16 or float16. Weights on another device than the CPU are
        copied to it and back. If FSDP2 has divided the model, each process merges and restores its own rows, and all
        processes must make the same calls.
    adapter : str, optional
        The name of the adapter; by default the active one.
    budget : float
        The most memory for patches, as a share of the bytes of the adapted weights. A copy of the factors of
        the merge comes on top.
    threads : int, optional
        Weights that are processed at a time, by default as many as torch has threads, but at most 4.

    Raises
    ------
    OptionError
        The model is not one of PEFT, or several adapters are active.
    MismatchError
        The weights cannot be changed in place: they are quantised, shared with weights that are not adapted, or divided
        over processes in another way than FSDP2 does by default.

    Notes
    -----
    The merged weights have the bits that `loralens merge` writes for this adapter, and after the block the base has the
    bits that it had before. While the model is merged, do not train it, and do not disable the adapter: PEFT would
    then subtract the update by itself.
    """

    def __init__(
        self, model: nn.Module, adapter: str | None = None, *, budget: float = BUDGET, threads: int | None = None
    ) -> None:
        wrapped = peft_model(model)
        if wrapped is None:
            raise OptionError("the model is not one of PEFT", fix="give a PeftModel; Switchboard takes any other model")
        self._model = wrapped
        self._name = one_active(wrapped) if adapter is None else adapter
        self._sharded = is_sharded(wrapped)
        self._reshard()
        view = live(wrapped, self._name)
        # Without the tensors that PEFT's layers apply themselves, merged or not.
        self._view = replace(view, extra={key: extra for key, extra in view.extra.items() if extra.role in MERGED})
        # All processes read sharded factors together and at once, so these are copied before every merge.
        self._board = Switchboard(wrapped, {TASK: self._view}, threads=threads, views=not self._sharded)
        # They are found once, since finding them takes longer than merging a small layer.
        self._layers = _layers_with(wrapped, self._name)
        self._limit = int(budget * sum(self._board.weights.values()))

    def merge(self) -> None:
        """Merge the adapter as it is now.

        Raises
        ------
        OptionError
            It is merged already, or the memory would be more than the budget; the base is then restored.
        """
        self._reshard()
        state = self._board.state
        if state.task or state.waiting:
            raise OptionError(f"the model is merged for {self._name}", fix="call unmerge() first")
        self._board.replace(TASK, self._view)
        self._board.switch(TASK)
        memory = self._board.bytes()
        used = memory.patch + memory.copies
        # If one of several processes is over the limit, all of them stop, since they would wait for each other.
        over = used > self._limit
        if any_process(over, self._model) if self._sharded else over:
            self._board.switch(None)
            raise OptionError(
                f"the merge needs {used:,} bytes to be undone{' here' if self._sharded else ''}, and {self._limit:,} "
                "are allowed",
                fix="give a larger budget",
            )
        for layer in self._layers:
            # From now on PEFT's layers do not add the update again.
            layer.merged_adapters.append(self._name)

    def unmerge(self) -> None:
        """Restore the base, bit for bit.

        Raises
        ------
        MismatchError
            PEFT has unmerged the adapter in the meantime, so that the weights are not those of the merge.
        """
        self._reshard()
        state = self._board.state
        # An interrupted merge has not yet been noted in PEFT's layers.
        complete = bool(state.task) and state.is_complete
        if complete and not all(self._name in layer.merged_adapters for layer in self._layers):
            raise MismatchError(
                "PEFT has unmerged the adapter while it was merged here, which changed the weights",
                fix="load the base again, and do not disable the adapter while it is merged",
            )
        self._board.switch(None)
        for layer in self._layers:
            if self._name in layer.merged_adapters:
                layer.merged_adapters.remove(self._name)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the adapter for the duration of a block."""
        self.merge()
        try:
            yield
        finally:
            self.unmerge()

    @contextmanager
    def in_place_of_peft(self) -> Iterator[None]:
        """Let ``model.merge_adapter()`` and ``model.unmerge_adapter()`` of other code use this switchboard.

        Within the block the two methods of the model are ours; arguments that PEFT takes are refused if they ask for
        something else than the merge of the active adapter.
        """
        # PEFT finds both methods on the tuner in the model; an attribute of the model itself comes first.
        self._model.merge_adapter, self._model.unmerge_adapter = self._merge_as_peft, self.unmerge
        try:
            yield
        finally:
            del self._model.merge_adapter, self._model.unmerge_adapter

    def verify(self) -> None:
        """Check by SHA-256 that the base is the one of the beginning: `Switchboard.verify`."""
        self._reshard()
        self._board.verify()

    def bytes(self) -> MemoryUse:
        """The memory in use now, in addition to the model."""
        return self._board.bytes()

    def _merge_as_peft(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        del safe_merge  # NaN is refused in any case
        if adapter_names is not None and list(adapter_names) != [self._name]:
            raise OptionError(
                f"the switchboard merges {self._name}, not {adapter_names}", fix="make one for that adapter"
            )
        self.merge()

    def _reshard(self) -> None:
        """Let FSDP2 drop the whole weights that it keeps after a forward pass; it makes them anew from the shards."""
        for module in self._model.modules() if self._sharded else ():
            if hasattr(module, "reshard"):
                module.reshard()


def _layers_with(model: nn.Module, name: str) -> list[Any]:
    """PEFT's layers that have the adapter and know whether it is merged."""
    layers: list[Any] = list(model.modules())
    return [
        layer
        for layer in layers
        if isinstance(getattr(layer, "merged_adapters", None), list)
        and isinstance(getattr(layer, "scaling", None), dict)
        and name in layer.scaling
    ]
