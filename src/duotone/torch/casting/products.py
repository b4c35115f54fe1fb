"""Products that are not like the others: those that sum nothing, and those with a sparse operand.

A product in which every element of the result is one product of two numbers (`einsum("i,j->ij")`, the angles of rotary
positions) gains nothing from a tensor core, and loses its digits. Given FP32 it stays FP32. A product with a sparse
operand is summed in FP32, since torch's 16-bit kernels sum in 16 bits on CPUs, or do not exist; its operands are not
rounded, and its result is in the policy's `compute`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.torch.casting.widened import call_widened, operands


def is_sparse(tensor: Tensor) -> bool:
    """Return whether a tensor is kept as its non-zero elements, in any layout.

    >>> is_sparse(torch.eye(3).to_sparse_csr()), is_sparse(torch.eye(3))
    (True, False)
    """
    return str(tensor.layout).startswith("torch.sparse")


def multiply_as_given(
    multiply: Callable[..., Any],
    compute: torch.dtype,
    sums_nothing: Callable[..., bool] | None,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Multiply in FP32 what is sparse, leave what sums nothing and is FP32, and hand over all other products.

    Args:
        multiply: how other products are carried out; takes the three last arguments.
        compute: the dtype of products.
        sums_nothing: whether a call adds nothing up, given its arguments; None for products that always do.
        func: the product.
        args: its arguments.
        kwargs: its named arguments.

    >>> args = "i,j->ij", torch.ones(2), torch.ones(3)
    >>> multiply_as_given(None, torch.bfloat16, einsum_sums_nothing, torch.einsum, args, {}).dtype
    torch.float32
    """
    given = list(operands((args, tuple(kwargs.values()))))
    if any(is_sparse(operand) for operand in given if operand.layout is not torch.strided):
        return call_widened(func, args, kwargs, result=compute)
    if (
        sums_nothing is not None
        and all(operand.dtype is torch.float32 for operand in given)
        and sums_nothing(*args, **kwargs)
    ):
        return func(*args, **kwargs)
    return multiply(func, args, kwargs)


def multiply_groups(
    multiply: Callable[..., Any],
    compute: torch.dtype,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Multiply groups of rows, in FP32 arithmetic where rows in 16 bits are not the 16 bytes that kernels ask for.

    Args:
        multiply: how a product is carried out; takes the three last arguments.
        compute: the dtype of products.
        func: `grouped_mm`, or the operator.
        args: its arguments.
        kwargs: its named arguments.
    """
    given = [operand for operand in operands((args, tuple(kwargs.values()))) if operand.dim() > 1]
    if any(stride > 1 and stride % 8 for operand in given for stride in operand.stride()):
        return call_widened(func, args, kwargs, operand=compute, result=compute)
    return multiply(func, args, kwargs)


def einsum_sums_nothing(equation: Any = None, *_: Any, **__: Any) -> bool:
    """Return whether every label of an equation stands in its output.

    >>> einsum_sums_nothing("bi,bj->bij"), einsum_sums_nothing("i,j"), einsum_sums_nothing("ij,jk->ik")
    (True, True, False)
    """
    if not isinstance(equation, str):
        return False
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = [label for label in inputs if label.isalpha()]
    if not arrow:
        # without an output, a label that stands twice is summed over
        return len(set(labels)) == len(labels)
    return set(labels) <= set(output) and ("..." in output or "..." not in inputs)


def matrices_sum_nothing(first: Any = None, second: Any = None, **named: Any) -> bool:
    """Return whether a product of matrices is one of columns and rows.

    >>> x = torch.ones(4, 1)
    >>> matrices_sum_nothing(x, x.T), matrices_sum_nothing(x.T, x)
    (True, False)
    """
    second = next(iter(named.values()), None) if second is None else second
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.dim() > 1 and second.dim() > 1 and first.shape[-1] == 1


def tensors_sum_nothing(first: Any = None, second: Any = None, dims: Any = 2, **_: Any) -> bool:
    """Return whether a product of tensors is over none of their dimensions.

    >>> tensors_sum_nothing(torch.ones(2), torch.ones(3), 0), tensors_sum_nothing(torch.ones(2), torch.ones(2), 1)
    (True, False)
    """
    return isinstance(dims, int) and dims == 0


# products that may sum nothing
KEEPS_ALL: Mapping[str, Callable[..., bool]] = {
    "matmul": matrices_sum_nothing,
    "linalg.matmul": matrices_sum_nothing,
    "mm": matrices_sum_nothing,
    "bmm": matrices_sum_nothing,
    "einsum": einsum_sums_nothing,
    "tensordot": tensors_sum_nothing,
}
