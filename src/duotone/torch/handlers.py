"""How the rules of `op_rules` are carried out: for each listed function, what is called instead of it.

A handler takes the function that was called and its arguments, and casts as the function's kind says; autocast is off
then. A function that writes into a given tensor (`out=`) is left alone. Where torch's own kernels do otherwise than a
kind promises, `float32_inside`, `cross_entropy` and `half_on_cpu` have the handler.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.torch.cross_entropy import cross_entropy_in_float32
from duotone.torch.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU
from duotone.torch.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.op_rules import Function, Kind, functions_of, kinds

# takes the function that was called, its positional and its named arguments, and returns the result
Handler = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
# sums of many terms into few places
_SUMMED_BY_INDEX = ("index_add", "index_reduce", "scatter_add", "scatter_reduce")
# sums that widen while they read, so that no widened copy is made
_WITH_DTYPE = ("sum", "nansum", "prod", "cumsum", "cumprod", "linalg.vector_norm")
_made: dict[tuple[torch.dtype, str], "Rules"] = {}


@dataclass(frozen=True)
class Rules:
    """How functions are carried out in a region.

    Attributes:
        handlers: for each listed function; autocast is off when one is called.
        products: the functions that may be called as they are if each operand is in the region's dtype.
    """

    handlers: dict[Function, Handler]
    products: frozenset[Function]


def rules_for(compute: torch.dtype, device_type: str) -> Rules:
    """Return the rules of a region where `compute` is the dtype of products."""
    # not functools.cache, which torch.compile looks through
    if (compute, device_type) not in _made:
        _made[compute, device_type] = _make_rules(compute, device_type)
    return _made[compute, device_type]


def _make_rules(compute: torch.dtype, device_type: str) -> Rules:
    made = {function: handler(kind, compute) for function, kind in kinds().items()}
    products = [function for function, kind in kinds().items() if kind == "compute"]
    if compute != torch.float32:
        made.update(FLOAT32_INSIDE)
        made.update(dict.fromkeys(functions_of("cross_entropy"), cross_entropy_in_float32))
        made.update(dict.fromkeys(functions_of("linear_cross_entropy"), _product_and_loss(compute, device_type)))
        if device_type == "cpu":
            made.update(FLOAT32_INSIDE_ON_CPU)
        made.update((function, _sum_inside) for name in _SUMMED_BY_INDEX for function in functions_of(name))
    if compute == torch.float16 and device_type == "cpu" and not cpu_has_half_products():
        made.update(dict.fromkeys(products, multiply_in_float32))
        products = []
    made.update((function, _sum_to_float32) for name in _WITH_DTYPE for function in functions_of(name))
    return Rules(made, frozenset(products))


def handler(kind: Kind, compute: torch.dtype) -> Handler:
    """Return how an operation of a kind is carried out where `compute` is the dtype of products, autocast being off."""
    if kind == "as_given" or (kind == "float32_inside" and compute != torch.float32):
        return _call
    if kind in ("float32", "float32_inside"):
        return functools.partial(_call_in, torch.float32)
    if kind == "compute":
        return functools.partial(_call_in, compute)
    return {"widest": _to_widest, "refused": _refuse}[kind]


def are_ready(args: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Return whether no argument has to be cast: tensors are in `dtype`, and there are none in lists."""
    # a loop is several times as fast as a generator here, and this is called for every product
    for arg in args:  # noqa: SIM110
        if arg.dtype is not dtype if isinstance(arg, Tensor) else type(arg) in (list, tuple):
            return False
    return True


def _call(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def _call_in(dtype: torch.dtype, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with every operand in `dtype`, except one that writes into a given tensor."""
    if not kwargs:
        return func(*[cast_operand(arg, dtype) for arg in args])
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    named = {name: cast_operand(value, dtype) for name, value in kwargs.items()}
    return func(*[cast_operand(arg, dtype) for arg in args], **named)


def _product_and_loss(compute: torch.dtype, device_type: str) -> Handler:
    """Return `F.linear_cross_entropy` with the product in `compute` and the loss in FP32; torch's has both in one."""

    def product_and_loss(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return _linear_cross_entropy(func, rules_for(compute, device_type).handlers[F.linear], *args, **kwargs)

    return product_and_loss


def _linear_cross_entropy(
    func: Function,
    multiply: Handler,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    **named: Any,
) -> Tensor:
    if named.pop("options", None) is not None or linear_weight.dim() != 2 or input.dim() > 2:
        # torch's own parts, or a loss of several dimensions: all of it in FP32
        named = {"linear_bias": linear_bias, "ignore_index": ignore_index, **named}
        return _call_in(torch.float32, func, (input, linear_weight, target), named)
    logits = multiply(F.linear, (input, linear_weight, linear_bias), {})
    named["ignore_index"] = -100 if ignore_index is None else ignore_index
    return cross_entropy_in_float32(F.cross_entropy, (logits, target), named)


def _sum_inside(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Sum in FP32 and round once to the widest operand's dtype; torch's kernels round after every term."""
    dtypes = {operand.dtype for operand in operands((args, tuple(kwargs.values())))}
    result = _call_in(torch.float32, func, args, kwargs)
    return cast_operand(result, next(iter(dtypes))) if len(dtypes) == 1 else result


def _sum_to_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    has_say = kwargs.get("dtype") is not None or kwargs.get("out") is not None
    if has_say or not args or args[0].dtype not in _NARROW:
        return func(*args, **kwargs)
    return func(*args, **kwargs, dtype=torch.float32)


def _to_widest(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if func.__name__.endswith("_"):
        return _call_in(args[0].dtype, func, args, kwargs) if args[0].dtype in _FLOATS else func(*args, **kwargs)
    dtypes = {operand.dtype for operand in operands((args, tuple(kwargs.values())))}
    return _call_in(torch.float32, func, args, kwargs) if len(dtypes) > 1 else func(*args, **kwargs)


def _refuse(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for operand in operands((args, tuple(kwargs.values()))):
        if operand.dtype in _NARROW:
            dtype = str(operand.dtype).removeprefix("torch.")
            raise OperationError(
                f"{func.__name__} on probabilities in {dtype} is not safe: near 1 they have no fraction left; use "
                "binary_cross_entropy_with_logits on what the sigmoid was given, or widen them with .float()"
            )
    return func(*args, **kwargs)


def cast_operand(operand: Any, dtype: torch.dtype) -> Any:
    """Cast an FP32, BF16 or FP16 tensor, or those in a tuple or list of operands.

    >>> [x.dtype for x in cast_operand([torch.ones(1), torch.tensor([1])], torch.float16)]
    [torch.float16, torch.int64]
    """
    if isinstance(operand, Tensor):
        return operand.to(dtype) if operand.dtype is not dtype and operand.dtype in _FLOATS else operand
    if type(operand) in (list, tuple):
        return type(operand)(cast_operand(each, dtype) for each in operand)
    return operand


def operands(value: Any) -> Iterator[Tensor]:
    """Yield the FP32, BF16 and FP16 tensors among arguments, those in tuples and lists included."""
    if isinstance(value, Tensor):
        if value.dtype in _FLOATS:
            yield value
    elif type(value) in (list, tuple):
        for each in value:
            yield from operands(each)
