"""SGD in torch's order, with momentum, dampening, Nesterov and weight decay.

`g += weight_decay * w; b = momentum * b + (1 - dampening) * g` (the first step takes `b = g`);
`w -= lr * (g + momentum * b if nesterov else b)`. Without a momentum there is no buffer, and `w -= lr * g`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from duotone.torch.kernels.exact import float32
from duotone.torch.kernels.operands import Scalar
from duotone.torch.kernels.slots import Slot
from duotone.torch.kernels.updates.definition import Coefficients, Update


class SGDSettings(NamedTuple):
    """Hyper-parameters of one parameter group, as in torch; `seed` is that of the random bits."""

    lr: Scalar
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    seed: int


class SGDCoefficients(NamedTuple):
    """What all elements of a parameter share; `undampened` is `1 - dampening`, the last three are flags."""

    lr: Scalar
    momentum: Scalar
    undampened: Scalar
    weight_decay: Scalar
    decays: Scalar
    is_nesterov: Scalar
    is_first: Scalar


def _coefficients(settings: SGDSettings, step: Tensor, counters: tuple[Tensor, ...]) -> Coefficients:
    coefficients = SGDCoefficients(
        lr=float32(settings.lr),
        momentum=settings.momentum,
        undampened=1.0 - settings.dampening,
        weight_decay=settings.weight_decay,
        decays=settings.weight_decay != 0.0,
        is_nesterov=settings.nesterov,
        is_first=step == 0,
    )
    return coefficients, ()


def _apply(
    grad: Tensor, master: Tensor, moments: tuple[Tensor, ...], c: SGDCoefficients
) -> tuple[Tensor, tuple[Tensor, ...]]:
    # a product with a decay of 0 would make a NaN of an infinite master, and a 0 of -0
    if c.decays:
        grad = grad + master * c.weight_decay
    if moments:
        buffer = torch.where(c.is_first, grad, moments[0] * c.momentum + grad * c.undampened)  # type: ignore[arg-type]
        grad = grad + buffer * c.momentum if c.is_nesterov else buffer
        moments = (buffer,)
    return master - grad * c.lr, moments


UPDATE = Update(
    name="sgd",
    settings=SGDSettings,
    coefficient_names=SGDCoefficients,
    moments=(Slot("momentum_buffer", needs="momentum"),),
    counters=None,
    coefficients=_coefficients,
    apply=_apply,
)
