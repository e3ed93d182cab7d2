"""The dtype in which a run computes: autocast, and the scale of the loss that float16 needs."""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any, final

import torch
from torch import nn

# The numbers of torch.amp.GradScaler. float16 loses gradients below 6e-8, and a power of two rounds nothing.
FIRST = 2.0**16
STEPS = 2000  # steps without an infinite gradient, after which the scale is doubled
SKIPPED = 24  # steps left out in a row, after which the scale is not the reason for infinite gradients


@final
@dataclass(slots=True, eq=False)
class Precision:
    """How a run computes on a device.

    Attributes
    ----------
    autocast : bool
        Whether torch's autocast is on.
    dtype : torch.dtype
        The dtype of autocast.
    scale : float
        The loss is multiplied by it before the backward pass, and the gradients are divided by it. 1 unless the run
        computes in float16.
    begun : bool
        Whether the scale has been fitted to the size of a batch, see `begin`.
    """

    device: torch.device
    autocast: bool
    dtype: torch.dtype
    scaled: bool
    scale: float = 1.0
    begun: bool = False
    _good: int = 0  # steps since the scale was last changed
    _skipped: int = 0  # steps in a row that were left out

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, *, autocast: bool | None) -> "Precision":
        """The precision for a model on a device. By default autocast is on only on a CUDA GPU.

        Autocast is to bfloat16, or to float16 where the weights of the model are float16 or the GPU has no bfloat16.
        """
        on = device.type == "cuda" if autocast is None else autocast
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        dtype = torch.float16 if half or not has_bfloat16(device) else torch.bfloat16
        return cls(device, on, dtype, scaled=half or (on and dtype == torch.float16))

    def context(self) -> Any:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast)

    def begin(self, terms: float) -> None:
        """Set the first scale, for batches whose loss is a sum over so many terms.

        The loss of a batch is a sum and not a mean, so its gradients are larger by this factor.
        """
        self.begun = True
        if self.scaled:
            self.scale = FIRST / 2 ** ceil(log2(max(terms, 1)))

    def accepts(self, *, finite: bool) -> bool:
        """Adapt the scale to whether the gradients of a step are finite, and return whether the run goes on.

        An infinite gradient of a scaled loss means that the scale is too large. The step is left out, and the scale
        halved, as `torch.amp.GradScaler` does.
        """
        if not self.scaled:
            return finite
        if not finite:
            self.scale, self._good, self._skipped = self.scale / 2, 0, self._skipped + 1
            return self._skipped <= SKIPPED
        self._good, self._skipped = self._good + 1, 0
        if self._good == STEPS:
            self.scale, self._good = 2 * self.scale, 0
        return True

    @property
    def record(self) -> dict[str, float]:
        """What the state of a run has to remember; nothing without a scale."""
        return {"scale": self.scale, "scale_steps": self._good} if self.scaled else {}

    def restore(self, record: Any) -> None:
        """Go on from the record of a state."""
        if self.scaled and "scale" in record:
            self.scale, self._good, self.begun = float(record["scale"]), int(record["scale_steps"]), True


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; older GPUs of CUDA only imitate it, slowly."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, the first generation that has it
