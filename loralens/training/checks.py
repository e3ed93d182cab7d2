"""The checks of what `loralens.training.inject` is given, before the model is changed."""

from math import isfinite

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loralens.core.scaling import scale_of
from loralens.errors import OptionError
from loralens.training.layers.layer import LoRALayer
from loralens.training.method import TrainingMethod
from loralens.training.number import as_float, as_int
from loralens.training.ranks import check_rank
from loralens.training.targets import modules_by_name, plain_name

# The scale multiplies float32 factors, and PiSSA divides by it: neither the scale nor its reciprocal may underflow, or
# exceed the largest float32, 3.4e38.
TINY = 1e-38


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, or has LoRA layers or weights without a shape already."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is a {type(model).__name__}, not a module", fix="give a torch.nn.Module")
    # The names of the modules would be those of the wrapper, and PEFT's own layers would be adapted.
    if hasattr(model, "peft_config"):
        raise OptionError("the model is wrapped by PEFT already", fix="give its base: model.unload()")
    for name, layer in modules_by_name(model).items():
        if isinstance(layer, LoRALayer):
            raise OptionError(f"{name} is a LoRA layer already", fix="remove the layers first: injection.remove()")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise OptionError(
                f"{plain_name(name)} is lazy: it has no shape yet", fix="call the model with an input first"
            )


def check_numbers(
    method: TrainingMethod, *, rank: object, alpha: object, dropout: object, seed: object
) -> tuple[int, float, float, int]:
    """The numeric arguments of an injection, converted to numbers of Python, with which JSON can be written."""
    r, a, part, s = check_rank(rank), as_float(alpha), as_float(dropout), as_int(seed)
    if a is None or not isfinite(a) or a <= 0:
        raise OptionError(f"alpha {alpha!r} is not a positive number", fix="give a positive number: 16, 32")
    # α by itself too: some dialects write it as float32.
    if not TINY <= scale_of(a, r, method.formula) <= 1 / TINY or a > 1 / TINY:
        raise OptionError(
            f"alpha {alpha!r} gives a scale that float32 does not hold", fix="give a number like 16 or 32"
        )
    if part is None or not 0 <= part < 1:
        raise OptionError(f"dropout {dropout!r} is not in [0, 1)", fix="give a probability, such as 0 or 0.1")
    if s is None:
        raise OptionError(f"seed {seed!r} is not a whole number", fix="give 0, 1 …")
    return r, a, part, s


def check_weight(name: str, W: Tensor) -> int:
    """The smaller side of a weight, after a check that it holds numbers."""
    if W.is_meta:
        raise OptionError(
            f"{name}: its weight is on the meta device, which holds no numbers", fix="load the model's weights first"
        )
    return min(W.shape)
