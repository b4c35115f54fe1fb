"""The step's operations in plain torch: short, on any device, and the definition of every bit.

Each operation takes parallel lists over parameters, reads everything in its storage dtype, computes in FP32 with one
rounding per operation written here, and never waits for the device. When `found_inf` is true an update writes back
what it read. Scalars that only depend on hyper-parameters are computed in FP64 and rounded once to FP32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.philox import random_16_bits
from duotone.torch.kernels.weights import Rounding, Weights

Scalar = float | Tensor


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Read every gradient once and return the sum of squares of the true gradient, and whether any is not finite.

    Args:
        grads: gradients in FP32, BF16 or FP16, of any shape, all on the device of `inverse_scale`; may be empty.
        inverse_scale: FP32, 0-d: 1 / loss_scale.

    Returns:
        `sum_of_squares`, FP64, 0-d, and `found_inf`, bool, 0-d. Squares are summed in FP64, where no finite
        gradient overflows, so the flag is exactly "an Inf or a NaN is there".

    >>> total, found_inf = grad_stats([torch.tensor([2.0**100, 0.0])], torch.tensor(0.5))
    >>> total.sqrt().item() == 2.0**99, found_inf.item()
    (True, False)
    """
    total = torch.zeros((), dtype=torch.float64, device=inverse_scale.device)
    for grad in grads:
        total = total + torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    return total * inverse_scale.double().square(), ~total.isfinite()


def adamw(
    weights: Weights,
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta_products: Sequence[Tensor],
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_multiplier: Tensor,
    found_inf: Tensor,
) -> None:
    """Update weights, tails and moments in place by one step of AdamW.

    Loshchilov and Hutter, "Decoupled weight decay regularization" (1711.05101), algorithm 2, in torch's order:
    `w -= lr * weight_decay * w; m += (1 - b1) * (g - m); v = b2 * v + (1 - b2) * g * g;
    w -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.

    Args:
        weights: the resident weights with their tails and step counts.
        grads: gradients (scaled), FP32, BF16 or FP16, each shaped like its weight.
        exp_avgs: FP32 first moments.
        exp_avg_sqs: FP32 second moments.
        beta_products: FP64 of shape `(2,)` per parameter: the running products `b1^t` and `b2^t`.
        lr: learning rate, a number or a 0-d tensor.
        betas, eps, weight_decay, maximize: as in torch.
        grad_multiplier: FP32, 0-d; gradient times this is what the update sees.
        found_inf: bool, 0-d; if true nothing changes.
    """
    lr = lr.double() if isinstance(lr, Tensor) else lr
    kept = _as_float32(1.0 - lr * weight_decay)
    beta1, beta2 = betas
    for i, grad in enumerate(grads):
        product1, product2 = beta_products[i].unbind()
        products = torch.stack((product1 * beta1, product2 * beta2))
        bias_correction1, bias_correction2 = (1.0 - products).unbind()
        step_size = (lr / bias_correction1).float()
        root_correction2 = bias_correction2.sqrt().float()

        gradient = _true_gradient(grad, grad_multiplier, maximize)
        exp_avg = exp_avgs[i] + (gradient - exp_avgs[i]) * (1.0 - beta1)
        exp_avg_sq = exp_avg_sqs[i] * beta2 + (gradient * gradient) * (1.0 - beta2)
        denominator = exp_avg_sq.sqrt() / root_correction2 + eps
        master = _read_master(weights, i) * kept - step_size * (exp_avg / denominator)

        _write_unless(found_inf, exp_avgs[i], exp_avg)
        _write_unless(found_inf, exp_avg_sqs[i], exp_avg_sq)
        _write_unless(found_inf, beta_products[i], products)
        _write_master(weights, i, master, found_inf)


def sgd(
    weights: Weights,
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    lr: Scalar,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_multiplier: Tensor,
    found_inf: Tensor,
) -> None:
    """Update weights, tails and momentum in place by one step of SGD, in torch's order.

    `g += weight_decay * w; b = momentum * b + (1 - dampening) * g` (the first step takes `b = g`);
    `w -= lr * (g + momentum * b if nesterov else b)`. Arguments as in `adamw`; `momentum_buffers` are FP32, or None
    where momentum is 0.
    """
    lr = _as_float32(lr)
    for i, grad in enumerate(grads):
        gradient = _true_gradient(grad, grad_multiplier, maximize)
        master = _read_master(weights, i)
        if weight_decay != 0.0:
            gradient = gradient + master * weight_decay
        buffer = momentum_buffers[i]
        if buffer is not None:
            moved = buffer * momentum + gradient * (1.0 - dampening)
            averaged = torch.where(weights.steps[i] == 0, gradient, moved)
            _write_unless(found_inf, buffer, averaged)
            gradient = gradient + averaged * momentum if nesterov else averaged
        _write_master(weights, i, master - gradient * lr, found_inf)


def _as_float32(value: Scalar) -> Scalar:
    return value.float() if isinstance(value, Tensor) else value


def _true_gradient(grad: Tensor, grad_multiplier: Tensor, maximize: bool) -> Tensor:
    gradient = grad.float() * grad_multiplier
    return -gradient if maximize else gradient


def _read_master(weights: Weights, i: int) -> Tensor:
    tail = weights.tails[i]
    return weights.values[i].float() if tail is None else decode(weights.values[i], tail)


def _write_master(weights: Weights, i: int, master: Tensor, found_inf: Tensor) -> None:
    weight, tail, step = weights.values[i], weights.tails[i], weights.steps[i]
    if tail is not None:
        new_weight, new_tail = encode(master, weight.dtype)
        _write_unless(found_inf, tail, new_tail)
    elif weight.dtype in SPLIT_DTYPES and weights.roundings[i] == Rounding.STOCHASTIC:
        random = random_16_bits(weight.numel(), seed=weights.seed, step=step, parameter=weights.indices[i])
        new_weight = round_stochastically(master, weight.dtype, random.view(weight.shape))
    else:
        new_weight = master.to(weight.dtype)
    _write_unless(found_inf, weight, new_weight)
    _write_unless(found_inf, step, step + 1)


def round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round FP32 to BF16 or FP16, up in magnitude with the probability that the discarded fraction says.

    Args:
        value: FP32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        random: int32 in [0, 2^16), shaped like `value`.

    Returns:
        `value` in `dtype`. Exact values never move; NaN, Inf and -0 stay; beyond the largest finite value it may
        become Inf.

    >>> value = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 2**-8])
    >>> round_stochastically(value, torch.bfloat16, torch.tensor([65535, 32767, 32768], dtype=torch.int32))
    tensor([1.0000, 1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32)
        rounded = ((bits + random) & -0x10000).view(torch.float32)
        return torch.where(value.isfinite(), rounded, value).to(dtype)
    # FP16 has the same spacing below 2^-14 as just above it, so the grid is found by exponent, in exact FP64
    exponent = torch.frexp(value).exponent.clamp(min=-13)
    grid = torch.ldexp(torch.ones_like(value, dtype=torch.float64), exponent - 11)
    scaled = value.double().abs() / grid
    rounded = (scaled + random.double() * 2.0**-16).floor() * grid
    return torch.where(value.isfinite(), rounded.float().copysign(value), value).to(dtype)


def _write_unless(found_inf: Tensor, target: Tensor, value: Tensor) -> None:
    target.copy_(torch.where(found_inf, target, value))
