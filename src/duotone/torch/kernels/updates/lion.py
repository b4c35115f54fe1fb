"""Lion: Chen et al., "Symbolic discovery of optimization algorithms" (2302.06675), algorithm 2.

`u = sign(b1 * m + (1 - b1) * g); w = (1 - lr * weight_decay) * w - lr * u; m = b2 * m + (1 - b2) * g`. A NaN in `u`
stays one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from duotone.torch.kernels.exact import float32, float64
from duotone.torch.kernels.operands import Scalar
from duotone.torch.kernels.slots import Slot
from duotone.torch.kernels.updates.definition import Coefficients, Update


class LionSettings(NamedTuple):
    """Hyper-parameters of one parameter group; `seed` is that of the random bits."""

    lr: Scalar
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool
    seed: int


class LionCoefficients(NamedTuple):
    """What all elements of a parameter share; `new1` and `new2` are the new gradient's shares beside the betas."""

    lr: Scalar
    kept: Scalar
    beta1: Scalar
    new1: Scalar
    beta2: Scalar
    new2: Scalar


def _coefficients(settings: LionSettings, step: Tensor, counters: tuple[Tensor, ...]) -> Coefficients:
    lr = float64(settings.lr)
    coefficients = LionCoefficients(
        lr=float32(lr),
        kept=float32(1.0 - lr * settings.weight_decay),
        beta1=settings.beta1,
        new1=1.0 - settings.beta1,
        beta2=settings.beta2,
        new2=1.0 - settings.beta2,
    )
    return coefficients, ()


def _apply(
    grad: Tensor, master: Tensor, moments: tuple[Tensor, ...], c: LionCoefficients
) -> tuple[Tensor, tuple[Tensor, ...]]:
    (exp_avg,) = moments
    direction = exp_avg * c.beta1 + grad * c.new1
    direction = torch.where(direction.isnan(), direction, direction.sign())
    return master * c.kept - direction * c.lr, (exp_avg * c.beta2 + grad * c.new2,)


UPDATE = Update(
    name="lion",
    settings=LionSettings,
    coefficient_names=LionCoefficients,
    moments=(Slot("exp_avg"),),
    counters=None,
    coefficients=_coefficients,
    apply=_apply,
)
