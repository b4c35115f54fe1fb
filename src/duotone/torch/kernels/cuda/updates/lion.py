"""Lion for Triton."""

import triton
import triton.language as tl

from duotone.torch.kernels.updates.lion import LionCoefficients


@triton.jit
def coefficients(settings, step, counters):
    c = LionCoefficients(
        lr=settings.lr,
        kept=1.0 - settings.lr * settings.weight_decay,
        beta1=settings.beta1,
        new1=1.0 - settings.beta1,
        beta2=settings.beta2,
        new2=1.0 - settings.beta2,
    )
    return c, counters


@triton.jit
def apply(grad, master, moments, c):
    exp_avg = moments[0]
    direction = exp_avg * c.beta1 + grad * c.new1
    sign = (direction > 0.0).to(tl.float32) - (direction < 0.0).to(tl.float32)
    # a NaN stays one
    direction = tl.where(direction == direction, sign, direction)  # noqa: PLR0124
    return master * c.kept - direction * c.lr, (exp_avg * c.beta2 + grad * c.new2,)
