"""AdamW for Numba."""

import math
from typing import Any

from duotone.torch.kernels.cpu.formats import f64
from duotone.torch.kernels.cpu.memory import compiled
from duotone.torch.kernels.updates.adamw import AdamWCoefficients


@compiled
def coefficients(settings, step, counters):
    product1, product2 = counters[0] * settings.beta1, counters[1] * settings.beta2
    root = math.sqrt(f64(1.0) - product2)
    c = AdamWCoefficients(
        kept=f64(1.0) - settings.lr * settings.weight_decay,
        step_size=settings.lr * root / (f64(1.0) - product1),
        eps=settings.eps * root,
        new1=f64(1.0) - settings.beta1,
        beta2=settings.beta2,
        new2=f64(1.0) - settings.beta2,
    )
    return c, (product1, product2)


def apply(moments: int) -> Any:
    @compiled
    def adamw(grad, master, moments, c):
        exp_avg, exp_avg_sq, none = moments
        exp_avg = exp_avg + (grad - exp_avg) * c.new1
        exp_avg_sq = exp_avg_sq * c.beta2 + (grad * grad) * c.new2
        master = master * c.kept - (exp_avg / (math.sqrt(exp_avg_sq) + c.eps)) * c.step_size
        return master, (exp_avg, exp_avg_sq, none)

    return adamw
