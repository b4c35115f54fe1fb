"""AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization" (1711.05101), algorithm 2.

Both bias corrections are in the step size and in eps, as Kingma and Ba (1412.6980) order it at the end of section 2:
`m += (1 - b1) * (g - m); v = b2 * v + (1 - b2) * g * g; r = sqrt(1 - b2^t);
w = (1 - lr * weight_decay) * w - lr * r / (1 - b1^t) * (m / (sqrt(v) + eps * r))`. Powers of the betas are running
products in FP64, so that bias correction is the same everywhere and does not move on a skipped step.
"""

from typing import NamedTuple

from torch import Tensor

from duotone.torch.kernels.exact import float32, float64, sqrt
from duotone.torch.kernels.operands import Scalar
from duotone.torch.kernels.slots import FLOAT64, Slot
from duotone.torch.kernels.updates.definition import Coefficients, Update


class AdamWSettings(NamedTuple):
    """Hyper-parameters of one parameter group, as in torch; `seed` is that of the random bits."""

    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    seed: int


class AdamWCoefficients(NamedTuple):
    """What all elements of a parameter share; `new1` and `new2` are the shares of the new gradient in the moments."""

    kept: Scalar
    step_size: Scalar
    eps: Scalar
    new1: Scalar
    beta2: Scalar
    new2: Scalar


def _coefficients(settings: AdamWSettings, step: Tensor, counters: tuple[Tensor, ...]) -> Coefficients:
    lr = float64(settings.lr)
    product1, product2 = counters[0] * settings.beta1, counters[1] * settings.beta2
    root = sqrt(1.0 - product2)
    coefficients = AdamWCoefficients(
        kept=float32(1.0 - lr * settings.weight_decay),
        step_size=(lr * root / (1.0 - product1)).float(),
        eps=(settings.eps * root).float(),
        new1=1.0 - settings.beta1,
        beta2=settings.beta2,
        new2=1.0 - settings.beta2,
    )
    return coefficients, (product1, product2)


def _apply(
    grad: Tensor, master: Tensor, moments: tuple[Tensor, ...], c: AdamWCoefficients
) -> tuple[Tensor, tuple[Tensor, ...]]:
    exp_avg, exp_avg_sq = moments
    exp_avg = exp_avg + (grad - exp_avg) * c.new1
    exp_avg_sq = exp_avg_sq * c.beta2 + (grad * grad) * c.new2
    master = master * c.kept - (exp_avg / (sqrt(exp_avg_sq) + c.eps)) * c.step_size
    return master, (exp_avg, exp_avg_sq)


UPDATE = Update(
    name="adamw",
    settings=AdamWSettings,
    coefficient_names=AdamWCoefficients,
    moments=(Slot("exp_avg"), Slot("exp_avg_sq")),
    counters=Slot(
        "beta_products",
        FLOAT64,
        shape=(2,),
        start=1.0,
        after=lambda steps, settings: (settings.beta1**steps, settings.beta2**steps),
    ),
    coefficients=_coefficients,
    apply=_apply,
)
