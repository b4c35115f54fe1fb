"""The loss of a last linear layer without its logits: `cross_entropy(input @ weight.T + bias, target)`, by chunks.

Some rows at a time are multiplied, and their logits, 16-bit where products are, become FP32 losses and are dropped;
the backward pass multiplies them again. So logits are never whole, at the price of a fourth product of the layer where
there were three. Gradients of weight and bias are added up in FP32 over chunks and rounded once. After Wijmans et al.
2024 (Cut Your Losses), without its kernel. Left out: label smoothing, targets that are probabilities; under
torch.compile and torch.func the logits are whole.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.torch.casting.float32_inside.autograd_function import apply, is_eager
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of
from duotone.torch.casting.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.casting.region import compute_dtype, no_autocast

# logits at a time, unless the call says how many rows: 32 MiB in 16 bits on a CPU, 256 MiB where products want more
_ELEMENTS_ON_CPU = 2**24
_ELEMENTS = 2**27
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    rows_at_once: int | None = None,
) -> Tensor:
    """Return the cross-entropy of `F.linear(input, linear_weight, linear_bias)`, whose logits are never whole.

    Takes the place of a model's head and loss where the vocabulary is large. In a cast model and under `autocast` the
    product is in the policy's `compute`, elsewhere in the wider dtype of its two operands; the loss is FP32. Arguments
    are in the order of `torch.nn.functional.linear_cross_entropy`.

    Args:
        input: `(..., K)`, floating-point.
        linear_weight: `(C, K)`.
        target: integers, `(...)`: which class each row is of.
        linear_bias: `(C)`.
        weight: of the classes, `(C)`.
        reduction: `"mean"`, over the weights of rows that count; `"sum"`; `"none"`, a loss for each row.
        ignore_index: the target of rows that do not count.
        rows_at_once: how many rows' logits there are at a time; without it so many that they take 32 MiB in 16 bits on
            a CPU, 256 MiB elsewhere.

    Returns:
        FP32 (FP64 of FP64): `()`, or `(...)`. NaN as a mean of no rows, and where an Inf or a NaN is among a row's
        logits.

    Raises:
        OperationError: shapes do not fit, or there is no such reduction.

    >>> input, head = torch.ones(2, 3, 4), torch.zeros(8, 4, requires_grad=True)
    >>> loss = linear_cross_entropy(input, head, torch.zeros(2, 3, dtype=torch.int64))
    >>> loss.backward()
    >>> round(loss.item(), 4), head.grad[:, 0]
    (2.0794, tensor([-0.8750,  0.1250,  0.1250,  0.1250,  0.1250,  0.1250,  0.1250,  0.1250]))
    """
    _check(input, linear_weight, target, reduction, rows_at_once)
    device_type = input.device.type
    compute = compute_dtype(device_type) or torch.promote_types(input.dtype, linear_weight.dtype)
    with no_autocast(device_type):
        x, matrix = input.reshape(-1, input.shape[-1]).to(compute), linear_weight.to(compute)
        bias = None if linear_bias is None else linear_bias.to(compute)
        weight = None if weight is None else weight.to(torch.promote_types(compute, torch.float32))
        places = target.reshape(-1)
        if not is_eager():
            return _whole(x, matrix, bias, places, weight, reduction, ignore_index, target.shape)
        elements = _ELEMENTS_ON_CPU if x.is_cpu else _ELEMENTS
        rows = rows_at_once or max(1, elements // max(1, len(matrix)))
        losses = apply(_LinearCrossEntropy, x, matrix, bias, places, weight, ignore_index, rows)
        if reduction == "none":
            return losses.view(target.shape)
        return losses.sum() if reduction == "sum" else losses.sum() / _count(places, weight, ignore_index, losses)


class _LinearCrossEntropy(Function):
    """The losses of rows."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, ignore: int, rows: int
    ) -> Tensor:
        parts = [
            _losses(_logits(x[some], matrix, bias), target[some], weight, ignore) for some in _chunks(len(x), rows)
        ]
        return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, matrix, bias, target, weight, ctx.ignore, ctx.rows = inputs
        ctx.save_for_backward(x, matrix, bias, target, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, matrix, bias, target, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            losses = _losses(_logits(x, matrix, bias), target, weight, ctx.ignore)
            chosen = [each for each, is_wanted in zip((x, matrix, bias), wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(losses, chosen, grad, create_graph=True))
            return *[next(found) if is_wanted else None for is_wanted in wanted], None, None, None, None
        of_x = torch.empty_like(x) if wanted[0] else None
        of_matrix = of_bias = None
        for some in _chunks(len(x), ctx.rows):
            logits = _logits(x[some], matrix, bias)
            with torch.enable_grad():
                losses = _losses(logits.requires_grad_(), target[some], weight, ctx.ignore)
            (of_logits,) = torch.autograd.grad(losses, logits, grad[some])
            del logits, losses
            if of_x is not None:
                of_x[some] = _product(of_logits, matrix)
            if wanted[1]:
                of_matrix = _added(of_matrix, _product(of_logits.t(), x[some]), len(x) > ctx.rows)
            if wanted[2]:
                sums = of_logits.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
                of_bias = _added(of_bias, sums, True)
        return of_x, _rounded(of_matrix, matrix), _rounded(of_bias, bias), None, None, None, None


def _whole(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    shape: torch.Size,
) -> Tensor:
    logits = _logits(x, matrix, bias)
    loss = cross_entropy_in_float32(
        F.cross_entropy, logits, target, weight, ignore_index=ignore_index, reduction=reduction
    )
    return loss.view(shape) if reduction == "none" else loss


def _chunks(count: int, rows: int) -> Iterator[slice]:
    for first in range(0, count, rows):
        yield slice(first, first + rows)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float16 and a.is_cpu and not cpu_has_half_products():
        return multiply_in_float32(torch.mm, (a, b), {})
    return torch.mm(a, b)


def _logits(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float16 and x.is_cpu and not cpu_has_half_products():
        return multiply_in_float32(F.linear, (x, matrix, bias), {})
    return F.linear(x, matrix, bias)


def _losses(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    return cross_entropy_in_float32(
        F.cross_entropy, logits, target, weight, ignore_index=ignore_index, reduction="none"
    )


def _count(target: Tensor, weight: Tensor | None, ignore_index: int, losses: Tensor) -> Tensor:
    """Return what a mean is divided by."""
    counts = target != ignore_index
    return counts.sum().to(losses.dtype) if weight is None else (weight[target.where(counts, 0)] * counts).sum()


def _added(total: Tensor | None, part: Tensor, several: bool) -> Tensor:
    """Return a sum over chunks: in FP32 if there are several."""
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32)) if several else part
    return total.add_(part)


def _rounded(grad: Tensor | None, operand: Tensor | None) -> Tensor | None:
    return None if grad is None or operand is None else grad.to(grad_dtype_of(operand))


def _check(input: Tensor, matrix: Tensor, target: Tensor, reduction: str, rows: int | None) -> None:
    fits = input.dim() > 0 and matrix.dim() == 2 and input.shape[-1] == matrix.shape[1]
    if not fits or target.shape != input.shape[:-1]:
        raise OperationError(
            f"linear_cross_entropy got input {tuple(input.shape)}, linear_weight {tuple(matrix.shape)} and target "
            f"{tuple(target.shape)}; it takes (..., K), (C, K) and the classes of rows, (...)"
        )
    if target.is_floating_point() or reduction not in _REDUCTIONS or (rows is not None and rows < 1):
        raise OperationError(
            f"linear_cross_entropy takes integers as target, {', '.join(_REDUCTIONS)} as reduction and at least 1 as "
            f"rows_at_once, not {target.dtype}, {reduction!r} and {rows}; for label smoothing or probabilities call "
            "F.linear and F.cross_entropy"
        )
