"""AdamW for Triton."""

import triton
import triton.language as tl

from duotone.torch.kernels.updates.adamw import AdamWCoefficients


@triton.jit
def coefficients(settings, step, counters):
    product1, product2 = counters
    product1 = product1 * settings.beta1
    product2 = product2 * settings.beta2
    root = tl.sqrt(1.0 - product2)
    c = AdamWCoefficients(
        kept=1.0 - settings.lr * settings.weight_decay,
        step_size=settings.lr * root / (1.0 - product1),
        eps=settings.eps * root,
        new1=1.0 - settings.beta1,
        beta2=settings.beta2,
        new2=1.0 - settings.beta2,
    )
    return c, (product1, product2)


@triton.jit
def apply(grad, master, moments, c):
    exp_avg, exp_avg_sq = moments
    exp_avg = exp_avg + (grad - exp_avg) * c.new1
    exp_avg_sq = exp_avg_sq * c.beta2 + (grad * grad) * c.new2
    master = master * c.kept - tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + c.eps) * c.step_size
    return master, (exp_avg, exp_avg_sq)
