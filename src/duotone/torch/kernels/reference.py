"""The step's operations in plain torch: short, on any device, and the definition of every bit.

Each update takes one operand per parameter, reads everything in its storage dtype, computes in FP32 with one rounding
per operation written here, and never waits for the device. When `found_inf` is true it writes back what it read. What
depends on hyper-parameters and step counts alone is computed in FP64 and rounded once to FP32.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.operands import AdamWSettings, LionSettings, Operand, Rounding, SGDSettings
from duotone.torch.kernels.philox import random_16_bits
from duotone.torch.kernels.round_stochastically import round_stochastically

# sums run over chunks of 32 parts of 32 rows of 32 lanes, so that an order that suits every device is one order
PARTS = ROWS = LANES = 32
CHUNK = PARTS * ROWS * LANES


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Read every gradient once and return the sum of squares of the true gradient, and whether any is not finite.

    Args:
        grads: gradients in FP32, BF16 or FP16, of any shape, dense in memory, all on the device of `inverse_scale`;
            may be empty.
        inverse_scale: FP32, 0-d: 1 / loss_scale.

    Returns:
        `sum_of_squares`, FP64, 0-d, and `found_inf`, bool, 0-d. Squares are exact and summed in FP64, where no finite
        gradient overflows, so the flag is exactly "an Inf or a NaN is there".

    >>> total, found_inf = grad_stats([torch.tensor([2.0**100, 0.0])], torch.tensor(0.5))
    >>> total.sqrt().item() == 2.0**99, found_inf.item()
    (True, False)
    """
    sums = [_chunk_sums(_flat(grad).double().square()) for grad in grads]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=inverse_scale.device)
    while total.numel() != 1:
        total = _chunk_sums(total) if total.numel() else total.new_zeros(1)
    total = total.reshape(())
    return total * inverse_scale.double().square(), ~total.isfinite()


def _chunk_sums(values: Tensor) -> Tensor:
    """Return the sum of each chunk: rows in sequence, then parts and lanes by halves."""
    chunks = -(-values.numel() // CHUNK)
    padded = torch.nn.functional.pad(values, (0, chunks * CHUNK - values.numel())).view(chunks, PARTS, ROWS, LANES)
    sums = torch.zeros_like(padded[:, :, 0])
    for row in padded.unbind(2):
        sums = sums + row
    sums = sums.view(chunks, PARTS * LANES)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.view(chunks)


def adamw(
    operands: Sequence[Operand], settings: Sequence[AdamWSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update weights, tails and moments in place by one step of AdamW.

    Loshchilov and Hutter, "Decoupled weight decay regularization" (1711.05101), algorithm 2, with both bias
    corrections in the step size and in eps, as Kingma and Ba (1412.6980) order it at the end of section 2:
    `m += (1 - b1) * (g - m); v = b2 * v + (1 - b2) * g * g; r = sqrt(1 - b2^t);
    w = (1 - lr * weight_decay) * w - lr * r / (1 - b1^t) * (m / (sqrt(v) + eps * r))`.

    Args:
        operands: the parameters, moments `exp_avg` and `exp_avg_sq`.
        settings: of each parameter group.
        grad_multiplier: FP32, 0-d; gradient times this is what the update sees.
        found_inf: bool, 0-d; if true nothing changes.
    """
    for operand in operands:
        group = settings[operand.group]
        assert operand.beta_products is not None
        lr = _float64(group.lr)
        product1, product2 = operand.beta_products.unbind()
        product1, product2 = product1 * group.beta1, product2 * group.beta2
        root = _sqrt(1.0 - product2)
        step_size = (lr * root / (1.0 - product1)).float()
        eps = (group.eps * root).float()
        kept = _float32(1.0 - lr * group.weight_decay)

        grad = _true_gradient(operand, grad_multiplier, group.maximize)
        exp_avg, exp_avg_sq = (_flat(moment).float() for moment in operand.moments)
        exp_avg = exp_avg + (grad - exp_avg) * (1.0 - group.beta1)
        exp_avg_sq = exp_avg_sq * group.beta2 + (grad * grad) * (1.0 - group.beta2)
        master = _read_master(operand) * kept - (exp_avg / (_sqrt(exp_avg_sq) + eps)) * step_size

        _write(operand, group.seed, master, (exp_avg, exp_avg_sq), found_inf)
        _write_unless(found_inf, operand.beta_products, torch.stack((product1, product2)))


def sgd(
    operands: Sequence[Operand], settings: Sequence[SGDSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update weights, tails and momentum in place by one step of SGD, in torch's order.

    `g += weight_decay * w; b = momentum * b + (1 - dampening) * g` (the first step takes `b = g`);
    `w -= lr * (g + momentum * b if nesterov else b)`. The moment is `momentum_buffer`, or none; else as in `adamw`.
    """
    for operand in operands:
        group = settings[operand.group]
        grad = _true_gradient(operand, grad_multiplier, group.maximize)
        master = _read_master(operand)
        if group.weight_decay != 0.0:
            grad = grad + master * group.weight_decay
        moments = ()
        if operand.moments:
            moved = _flat(operand.moments[0]).float() * group.momentum + grad * (1.0 - group.dampening)
            buffer = torch.where(operand.step == 0, grad, moved)
            grad = grad + buffer * group.momentum if group.nesterov else buffer
            moments = (buffer,)
        _write(operand, group.seed, master - grad * _float32(group.lr), moments, found_inf)


def lion(
    operands: Sequence[Operand], settings: Sequence[LionSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update weights, tails and momentum in place by one step of Lion.

    Chen et al., "Symbolic discovery of optimization algorithms" (2302.06675), algorithm 2:
    `u = sign(b1 * m + (1 - b1) * g); w = (1 - lr * weight_decay) * w - lr * u; m = b2 * m + (1 - b2) * g`. A NaN in `u`
    stays one. The moment is `exp_avg`; else as in `adamw`.
    """
    for operand in operands:
        group = settings[operand.group]
        lr = _float64(group.lr)
        grad = _true_gradient(operand, grad_multiplier, group.maximize)
        exp_avg = _flat(operand.moments[0]).float()
        direction = exp_avg * group.beta1 + grad * (1.0 - group.beta1)
        direction = torch.where(direction.isnan(), direction, direction.sign())
        master = _read_master(operand) * _float32(1.0 - lr * group.weight_decay) - direction * _float32(lr)
        exp_avg = exp_avg * group.beta2 + grad * (1.0 - group.beta2)
        _write(operand, group.seed, master, (exp_avg,), found_inf)


def _flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements in the order of memory, which is the order of random bits and of sums."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _sqrt(value: Tensor) -> Tensor:
    # torch's square root is MKL's on CPUs, which is off by a unit in the last place in one value of five
    return value.sqrt() if value.device.type != "cpu" else torch.as_tensor(np.sqrt(value.numpy()), device="cpu")


def _float64(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else value


def _float32(value: float | Tensor) -> float | Tensor:
    # a number is rounded by the operation that it meets
    return value.float() if isinstance(value, Tensor) else value


def _true_gradient(operand: Operand, grad_multiplier: Tensor, maximize: bool) -> Tensor:
    grad = _flat(operand.grad).float() * grad_multiplier
    return -grad if maximize else grad


def _read_master(operand: Operand) -> Tensor:
    weight = _flat(operand.weight)
    return weight.float() if operand.tail is None else decode(weight, _flat(operand.tail))


def _write(operand: Operand, seed: int, master: Tensor, moments: tuple[Tensor, ...], found_inf: Tensor) -> None:
    def random(stream: int) -> Tensor:
        return random_16_bits(master.numel(), seed=seed, step=operand.step, parameter=operand.number, stream=stream)

    weight = _flat(operand.weight)
    if operand.tail is not None:
        new_weight, new_tail = encode(master, weight.dtype)
        _write_unless(found_inf, _flat(operand.tail), new_tail)
    elif weight.dtype in SPLIT_DTYPES and operand.rounding == Rounding.STOCHASTIC:
        new_weight = round_stochastically(master, weight.dtype, random(0))
    else:
        new_weight = master.to(weight.dtype)
    _write_unless(found_inf, weight, new_weight)
    for stream, (target, moment) in enumerate(zip(operand.moments, moments, strict=True), start=1):
        is_whole = target.dtype == torch.float32
        new_moment = moment if is_whole else round_stochastically(moment, target.dtype, random(stream))
        _write_unless(found_inf, _flat(target), new_moment)
    _write_unless(found_inf, operand.step, operand.step + 1)


def _write_unless(found_inf: Tensor, target: Tensor, value: Tensor) -> None:
    target.copy_(torch.where(found_inf, target, value))
