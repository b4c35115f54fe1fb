"""SGD for Numba."""

from typing import Any

from duotone.torch.kernels.cpu.formats import f32, f64, i64
from duotone.torch.kernels.cpu.memory import compiled
from duotone.torch.kernels.updates.sgd import SGDCoefficients


@compiled
def coefficients(settings, step, counters):
    c = SGDCoefficients(
        lr=settings.lr,
        momentum=settings.momentum,
        undampened=f64(1.0) - settings.dampening,
        weight_decay=settings.weight_decay,
        decays=settings.weight_decay != f64(0.0),
        is_nesterov=settings.nesterov,
        is_first=step == i64(0),
    )
    return c, ()


def apply(moments: int) -> Any:
    has_buffer = moments > 0

    @compiled
    def sgd(grad, master, moments, c):
        buffer, none2, none3 = moments
        if c.decays != f32(0.0):
            grad = grad + master * c.weight_decay
        if has_buffer:
            buffer = buffer * c.momentum + grad * c.undampened
            if c.is_first != f32(0.0):
                buffer = grad
            looked_ahead = grad + buffer * c.momentum
            grad = buffer
            if c.is_nesterov != f32(0.0):
                grad = looked_ahead
        return master - grad * c.lr, (buffer, none2, none3)

    return sgd
