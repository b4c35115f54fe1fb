"""Products that are not like the others: those that sum nothing, and those with a sparse operand.

A product in which every element of the result is one product of two numbers (`einsum("i,j->ij")`, the angles of rotary
positions) gains nothing from a tensor core, and loses its digits. Given FP32 it stays FP32, and beside 16 bits its FP32
operand is not rounded. So an FP32 operand of `einsum` that scales another one, as `1 / den` does in linear attention
(`einsum("de,nd,n->ne")`), is multiplied into that one first: it may be beyond the range of 16 bits where their product
is not. A product with a sparse operand is summed in FP32, since torch's 16-bit kernels sum in 16 bits on CPUs, or do
not exist; its operands are not rounded, and its result is in the policy's `compute`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.torch.casting.widened import call_widened, operands

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    """Multiply in FP32 what is sparse and what sums nothing beside FP32, and hand over all other products.

    What sums nothing stays FP32 if all its operands are, and is rounded to `compute` otherwise.

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
    given = operands((args, tuple(kwargs.values())))
    if any(is_sparse(operand) for operand in given if operand.layout is not torch.strided):
        return call_widened(func, args, kwargs, result=compute)
    if sums_nothing is not None and any(operand.dtype is torch.float32 for operand in given):
        if not sums_nothing(*args, **kwargs):
            return multiply(func, args, kwargs)
        if all(operand.dtype is torch.float32 for operand in given):
            return func(*args, **kwargs)
        return call_widened(func, args, kwargs, result=compute)
    return multiply(func, args, kwargs)


def multiply_by_equation(
    multiply: Callable[..., Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call `einsum` with every FP32 operand that scales another one multiplied into that one, in FP32.

    Args:
        multiply: how products are carried out; takes the three last arguments.
        func: `einsum`, or the operator.
        args: its arguments: the equation, and the operands, one by one or in a list.
        kwargs: its named arguments.

    >>> call = lambda func, args, kwargs: func(*[each.half() if each is not args[0] else each for each in args])
    >>> args = "nd,de,n->ne", torch.full((1, 1), 1e-6), torch.ones(1, 1), torch.full((1,), 1e6)
    >>> multiply_by_equation(call, torch.einsum, args, {}), torch.einsum(*args[:1], *(each.half() for each in args[1:]))
    (tensor([[1.]], dtype=torch.float16), tensor([[inf]], dtype=torch.float16))
    """
    equation, *given = args or (None,)
    in_list = len(given) == 1 and type(given[0]) in (list, tuple)
    operands = list(given[0]) if in_list else given
    if len(operands) < 3 or kwargs or not isinstance(equation, str):
        return multiply(func, args, kwargs)
    equation, operands = _scaled(equation.replace(" ", ""), operands)
    return multiply(func, (equation, operands) if in_list else (equation, *operands), kwargs)


def _scaled(equation: str, operands: list[Any]) -> tuple[str, list[Any]]:
    """Return an equation and its operands without those that scale another one."""
    labels, arrow, output = equation.partition("->")
    terms = labels.split(",")
    if not arrow or len(terms) != len(operands) or not all(isinstance(each, Tensor) for each in operands):
        return equation, operands
    place = 0
    while place < len(terms) and len(terms) > 2:
        into = _scales(place, terms, operands)
        if into is None:
            place += 1
            continue
        product = f"{terms[into]},{terms[place]}->{terms[into]}"
        scaled = torch.einsum(product, operands[into].float(), operands[place])
        operands = [scaled if at == into else each for at, each in enumerate(operands) if at != place]
        terms = [each for at, each in enumerate(terms) if at != place]
    return f"{','.join(terms)}->{output}", operands


def _scales(place: int, terms: list[str], operands: list[Any]) -> int | None:
    """Return which operand an FP32 operand scales: one with all its labels and more, FP32 if there is one."""
    own = terms[place]
    if operands[place].dtype is not torch.float32 or not _is_each_once(own):
        return None
    found = [
        at
        for at, term in enumerate(terms)
        if at != place and operands[at].dtype in _FLOATS and _is_each_once(term) and _labels(own) < _labels(term)
    ]
    wide = [at for at in found if operands[at].dtype is torch.float32]
    return next(iter(wide or found), None)


def _labels(term: str) -> set[str]:
    return {*term.replace("...", ""), *(["..."] if "..." in term else [])}


def _is_each_once(term: str) -> bool:
    letters = term.replace("...", "")
    return len(set(letters)) == len(letters)


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
