"""LoRA-GA: the pair starts along the gradient of the loss, so that the first update is close to full fine-tuning's.

With the gradient G = U S Vᵀ of the first step, A₀ = c·V_rᵀ and B₀ = c·U_{r+1…2r} with c = out^¼/√γ, γ = 16 (Wang et al.
2024, arXiv:2407.05000, theorem 3.2 and algorithm 1). PEFT up to 0.21 has the same directions and other lengths: it
multiplies B₀ by the singular values and by c, and leaves A₀ as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loralens.errors import OptionError
from loralens.training.starts.drawn import Pair
from loralens.training.starts.leading import signs, truncated_svd

GAMMA = 16.0  # the default of the paper and of PEFT


@torch.no_grad()
def gradient_pair(name: str, W: Tensor, gradient: Tensor, *, rank: int) -> Pair:
    """B₀ (out, r) and A₀ (r, in) from the gradient of W, in float32, or in float64 if W is.

    Raises
    ------
    OptionError
        The gradient is 0, or not finite, or has another shape than W.
    """
    if gradient.shape != W.shape:
        shapes = f"{tuple(gradient.shape)}, where the weight has {tuple(W.shape)}"
        raise OptionError(f"{name}: the gradient has the shape {shapes}", fix="give the gradient of this weight")
    if not torch.isfinite(gradient).all() or not gradient.any():
        what = "0" if torch.isfinite(gradient).all() else "not finite"
        raise OptionError(
            f"{name}: the gradient of the first step is {what}, so that it has no directions",
            fix="leave this module out, or choose another start than lora-ga",
        )
    # A matrix that is narrower than 2r has fewer directions, of which A takes the first and B the last.
    count = min(2 * rank, *gradient.shape)
    compute = torch.float64 if W.dtype == torch.float64 else torch.float32
    U, _, Vh = truncated_svd(gradient.to(compute), count, keep=False)
    sign = signs(Vh)
    length = W.shape[0] ** 0.25 / GAMMA**0.5
    B = length * (U * sign[:, 0])[:, count - rank :]
    A = length * (sign * Vh)[:rank]
    return Pair(B.to(W.device, compute).contiguous(), A.to(W.device, compute).contiguous())


def weight_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], add_gradients: Callable[[], None]
) -> dict[str, Tensor]:
    """The gradients of the weights of a model, by name, in float32 on the CPU; the model is as it was afterwards.

    Parameters
    ----------
    model : nn.Module
    weights : mapping of str to parameter
        The weights by the names of their layers. All other parameters get no gradient, to save memory.
    add_gradients : callable
        Runs the backward passes whose gradients are added up.

    Raises
    ------
    OptionError
        A weight is not a parameter of floating point numbers.
    """
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise OptionError(
                f"{name}: its weight has no gradient, which lora-ga starts along",
                fix="leave this module out, or choose another start; codes and parametrised weights have none",
            )
    sums: dict[int, Tensor] = {}

    def take(parameter: Tensor) -> None:
        # Each goes to the CPU at once, so that no more than one gradient of a weight is in the memory of a GPU.
        assert parameter.grad is not None
        gradient = parameter.grad.detach().to("cpu", torch.float32)
        sums[id(parameter)] = sums[id(parameter)] + gradient if id(parameter) in sums else gradient.clone()
        parameter.grad = None

    with _only_trained(model, weights):
        own = {id(weight): weight for weight in weights.values()}.values()
        handles = [weight.register_post_accumulate_grad_hook(take) for weight in own]  # type: ignore[no-untyped-call]
        try:
            add_gradients()
        finally:
            for handle in handles:
                handle.remove()
    # A weight that no batch reaches has a gradient of 0.
    return {name: sums.get(id(weight), torch.zeros(weight.shape)) for name, weight in weights.items()}


@contextmanager
def _only_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, only these parameters require gradients; the gradients that were there come back after it."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    ours = {id(weight) for weight in weights.values()}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in ours)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
