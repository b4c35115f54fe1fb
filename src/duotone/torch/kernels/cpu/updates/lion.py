"""Lion for Numba."""

from typing import Any

from duotone.torch.kernels.cpu.formats import f32, f64
from duotone.torch.kernels.cpu.memory import compiled
from duotone.torch.kernels.updates.lion import LionCoefficients


@compiled
def coefficients(settings, step, counters):
    c = LionCoefficients(
        lr=settings.lr,
        kept=f64(1.0) - settings.lr * settings.weight_decay,
        beta1=settings.beta1,
        new1=f64(1.0) - settings.beta1,
        beta2=settings.beta2,
        new2=f64(1.0) - settings.beta2,
    )
    return c, ()


def apply(moments: int) -> Any:
    @compiled
    def lion(grad, master, moments, c):
        exp_avg, none2, none3 = moments
        direction = exp_avg * c.beta1 + grad * c.new1
        # a NaN stays one
        if direction > f32(0.0):
            direction = f32(1.0)
        elif direction < f32(0.0):
            direction = f32(-1.0)
        elif direction == f32(0.0):
            direction = f32(0.0)
        return master * c.kept - direction * c.lr, (exp_avg * c.beta2 + grad * c.new2, none2, none3)

    return lion
