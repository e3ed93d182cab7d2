"""`ModelInMemory`: a base model of torch in place of the path of one."""

import json
from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, final

from loralens.core.attached import PEFT_PREFIX, plain_path, unwrap
from loralens.core.lazy import LazyArray
from loralens.core.tensors import is_model, is_tensor, lazy_tensor
from loralens.errors import FormatError, OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS = ("lora_", "modules_to_save")  # beginnings of parts of names that belong to adapters of PEFT


@final
class ModelInMemory:
    """A base model in memory, in place of the path of one: a module of torch, or a pipeline of diffusers.

    Its weights are copied to the CPU one at a time, whenever they are read. It has the names that the model would have
    in its files, without the wrappers and adapters of PEFT.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = getattr(model, "config", None) or {}
        fields = config.to_dict() if hasattr(config, "to_dict") else config
        # As its config.json has it.
        fields = fields if isinstance(fields, Mapping) else {}
        self.config: dict[str, Any] = json.loads(json.dumps({**fields}, default=str))
        # The path or the Hub id from which it was loaded.
        self.name = str(getattr(config, "_name_or_path", "") or self.config.get("_name_or_path") or "")

    @property
    def tensors(self) -> dict[str, LazyArray]:
        """Its weights and buffers, unread; of a weight that several layers share only the first name.

        Raises
        ------
        FormatError
            The weights are quantised, or are not in memory.
        OptionError
            An adapter is merged into them.
        """
        # The components of a pipeline are prefixes of names, as they are folders on the disk.
        components = {"": self.model} if is_model(self.model) else self.model.components
        found: dict[str, LazyArray] = {}
        for component, module in components.items():
            if not is_model(module):
                continue
            inner: nn.Module = unwrap(module)
            for path, layer in inner.named_modules():
                if getattr(layer, "merged_adapters", None):
                    what = f"{self}: an adapter is merged into {path}"
                    raise OptionError(what, fix="call unmerge_adapter() first, or give the path of the base")
            parameters = {id(parameter) for parameter in inner.parameters()}
            seen: set[int] = set()
            # With the buffers that a file would have.
            for path, tensor in inner.state_dict(keep_vars=True).items():
                name = plain_path(path).removeprefix(PEFT_PREFIX)
                if id(tensor) in seen or not is_tensor(tensor) or any(p.startswith(PARTS) for p in name.split(".")):
                    continue
                seen.add(id(tensor))
                place, _, own = path.rpartition(".")
                layer = inner.get_submodule(place)
                if id(tensor) in parameters:
                    self._check(layer, path, tensor)
                # What PEFT keeps of a module that it trains in full.
                name = name.replace(".original_module.", ".")
                found[f"{component}.{name}" if component else name] = lazy_tensor(partial(getattr, layer, own))
        return found

    def _check(self, layer: "nn.Module", path: str, parameter: "Tensor") -> None:
        """Refuse a weight that is stored as codes, or whose numbers are elsewhere."""
        if parameter.is_meta:
            what = f"{self}: {path} is not in memory, as it was offloaded"
            raise FormatError(what, fix="load the model without offloading, or give its path")
        # A quantised weight has a type of its own, whole numbers, or floats of one byte that need scales.
        plain = type(parameter.data).__module__.partition(".")[0] == "torch"
        if not plain or not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            what = f"{self}: its weights are quantised ({type(layer).__name__} at {path})"
            raise FormatError(what, fix="give the path of the model, or load it in 16 or 32 bits")

    def __str__(self) -> str:
        return f"in memory: {type(self.model).__name__}" + (f" of {self.name}" if self.name else "")


ModelPath = str | PathLike[str] | ModelInMemory  # a base model: its path, or itself
