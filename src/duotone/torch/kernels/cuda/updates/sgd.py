"""SGD for Triton."""

import triton
import triton.language as tl

from duotone.torch.kernels.updates.sgd import SGDCoefficients


@triton.jit
def coefficients(settings, step, counters):
    c = SGDCoefficients(
        lr=settings.lr,
        momentum=settings.momentum,
        undampened=1.0 - settings.dampening,
        weight_decay=settings.weight_decay,
        decays=settings.weight_decay != 0.0,
        is_nesterov=settings.nesterov,
        is_first=step == 0,
    )
    return c, counters


@triton.jit
def apply(grad, master, moments, c):
    grad = tl.where(c.decays != 0.0, grad + master * c.weight_decay, grad)
    if len(moments) > 0:
        buffer = tl.where(c.is_first != 0.0, grad, moments[0] * c.momentum + grad * c.undampened)
        grad = tl.where(c.is_nesterov != 0.0, grad + buffer * c.momentum, buffer)
        moments = (buffer,)
    return master - grad * c.lr, moments
