"""The element-wise part of each update, in FP32, every operation rounded once, in the order of `reference.py`.

`c` are the parameter's coefficients in the order in which `coefficients.py` writes them; the first of them was
multiplied into the gradient already.
"""

import triton
import triton.language as tl


@triton.jit
def adamw_rule(grad, master, exp_avg, exp_avg_sq, c):
    """Return master, exp_avg and exp_avg_sq after a step of AdamW."""
    _, step_size, eps, kept, new1, beta2, new2, _ = c
    exp_avg = exp_avg + (grad - exp_avg) * new1
    exp_avg_sq = exp_avg_sq * beta2 + (grad * grad) * new2
    # div and sqrt without a suffix are approximations in FP32
    master = master * kept - tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + eps) * step_size
    return master, exp_avg, exp_avg_sq


@triton.jit
def sgd_rule(grad, master, buffer, c, HAS_BUFFER: tl.constexpr):
    """Return master and momentum_buffer after a step of SGD; without a buffer that one comes back as it was."""
    _, lr, momentum, undampened, weight_decay, has_decay, is_nesterov, is_first = c
    # a product with a decay of 0 would make a NaN of an infinite master, and a 0 of -0
    grad = tl.where(has_decay != 0.0, grad + master * weight_decay, grad)
    if HAS_BUFFER:
        buffer = tl.where(is_first != 0.0, grad, buffer * momentum + grad * undampened)
        grad = tl.where(is_nesterov != 0.0, grad + buffer * momentum, buffer)
    return master - grad * lr, buffer


@triton.jit
def lion_rule(grad, master, exp_avg, c):
    """Return master and exp_avg after a step of Lion."""
    _, lr, kept, beta1, new1, beta2, new2, _ = c
    direction = exp_avg * beta1 + grad * new1
    sign = (direction > 0.0).to(tl.float32) - (direction < 0.0).to(tl.float32)
    direction = tl.where(direction == direction, sign, direction)  # noqa: PLR0124
    master = master * kept - direction * lr
    return master, exp_avg * beta2 + grad * new2
