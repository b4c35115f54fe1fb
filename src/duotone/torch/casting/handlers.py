"""How the kinds of `operation_table` are carried out: the handler of each listed function, called instead of it.

A handler takes the function that was called and its arguments, and casts as the function's kind says; autocast is off
then. A function that writes into a given tensor (`out=`) is left alone. Where torch's own kernels do otherwise than a
kind promises, `float32_inside` and `half_on_cpu` have the handler.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.operations import Kind
from duotone.torch.casting import numbers
from duotone.torch.casting.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU, TO_FLOAT32, Handler, as_handler
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32
from duotone.torch.casting.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.casting.operation_table import Function, functions_in, functions_named, kinds, same_operation
from duotone.torch.internals.dispatch import PADDING
from duotone.torch.nested import cast_floating

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
# sums that widen while they read, so that no widened copy is made
_WITH_DTYPE = ("sum", "nansum", "prod", "linalg.vector_norm", "log_softmax", "special.log_softmax")
# may write into an operand
_WRITING = (F.batch_norm, F.instance_norm, F.embedding, F.embedding_bag)
_made: dict[str, "Handlers"] = {}


@dataclass(frozen=True)
class Handlers:
    """How functions are carried out in a region.

    Attributes:
        by_function: the handler of each listed function; autocast is off when it is called.
        product: the handler of functions that may be called as they are if each operand is in the region's dtype.
        methods: tensors' methods that are written in Python, with their handlers.
    """

    by_function: dict[Function, Handler]
    product: Handler | None
    methods: tuple[tuple[Function, Handler], ...]

    def find(self, function: Function) -> Handler | None:
        """Return the handler of a function, or None if it is called as it is."""
        if torch.compiler.is_compiling():
            # torch.compile does not find these in a dict, and takes it that they are not there
            for method, handler in self.methods:
                if function is method:
                    return handler
        return self.by_function.get(function)


def handlers_for(compute: torch.dtype, device_type: str, residual: str = "compute") -> Handlers:
    """Return the handlers of a region: `compute` is the dtype of products, `residual` a policy's role."""
    # neither functools.cache, which torch.compile looks through, nor a dtype as the key, which it cannot name
    key = f"{compute} {device_type} {residual}"
    if key not in _made:
        same_operation()
        _made[key] = _make_handlers(compute, device_type, residual)
    return _made[key]


def _make_handlers(compute: torch.dtype, device_type: str, residual: str) -> Handlers:
    made = {function: handler_of(kind, compute) for function, kind in kinds().items()}

    def put(handler: Handler, functions: Iterable[Function]) -> None:
        made.update(dict.fromkeys(functions, handler))

    put(numbers.store, functions_in("write"))
    put(numbers.store_value, functions_named("__setitem__", "scatter_"))
    put(numbers.store_numbers, (*functions_in("fill"), *PADDING, torch.nested.to_padded_tensor))
    put(numbers.copy_in_place, functions_named("copy_"))
    put(_store_to_widest, functions_named("scatter"))
    put(_where, functions_named("where"))
    put(numbers.widen_beside_number, functions_in("number"))
    put(numbers.add_in_place, functions_in("number_in_place"))
    put(numbers.clamp, functions_in("bound"))
    put(numbers.clamp_in_place, functions_in("bound_in_place"))
    put(numbers.cast, functions_in("cast"))
    # a method in Python that asks for its super() cannot be traced in a mode
    made[Tensor.unflatten] = _unflatten
    put(_sum_to_float32, functions_named(*_WITH_DTYPE))
    if compute == torch.float32:
        put(_widen_all_but_what_is_written, _WRITING)
        return Handlers(made, None, _methods(made))
    put(_widen_and_round, functions_in("sum_by_index"))
    put(_call_on_float32_data_in_float32, functions_named("native_layer_norm", "native_group_norm"))
    put(as_handler(cross_entropy_in_float32), functions_named("cross_entropy"))
    made.update(FLOAT32_INSIDE)
    product, emulated = functools.partial(_call_in, compute), False
    if device_type == "cpu":
        # torch has no 16-bit kernels for these on CPUs
        put(_widen_and_round, (*functions_in("average_pool"), *functions_in("random_activation")))
        made.update(FLOAT32_INSIDE_ON_CPU)
        emulated = compute == torch.float16 and not cpu_has_half_products()
    if residual == "float32":
        made.update(TO_FLOAT32)
    multiply = multiply_in_float32 if emulated else product
    put(multiply, (function for function, kind in kinds().items() if kind == "compute"))
    # made of several operations, each of which is to see autocast switched off
    attend = multiply if emulated else functools.partial(_call_on_each_once, compute)
    put(functools.partial(_attend_with_heads, compute, attend), functions_named("multi_head_attention_forward"))
    put(as_handler(functools.partial(_attend, attend)), functions_named("scaled_dot_product_attention"))
    put(as_handler(functools.partial(_linear_cross_entropy, multiply)), functions_named("linear_cross_entropy"))
    return Handlers(made, None if emulated else product, _methods(made))


def _methods(made: dict[Function, Handler]) -> tuple[tuple[Function, Handler], ...]:
    methods = [getattr(Tensor, name) for name in dir(Tensor)]
    return tuple((method, made[method]) for method in methods if isinstance(method, FunctionType) and method in made)


def handler_of(kind: Kind, compute: torch.dtype) -> Handler:
    """Return how an operation of a kind is carried out where `compute` is the dtype of products, autocast being off."""
    if kind == "as_given" or (kind == "float32_inside" and compute != torch.float32):
        return _call
    if kind in ("float32", "float32_inside"):
        return _call_in_float32
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


def _call_on_each_once(dtype: torch.dtype, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with every operand in `dtype`; one that is given twice, as in self-attention, stays one."""
    return func(*cast_floating(args, dtype), **cast_floating(dict(kwargs), dtype))


def _call_in_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    # a result that is asked for in 16 bits is the caller's own choice
    return func(*args, **kwargs) if kwargs.get("dtype") in _NARROW else _call_in(torch.float32, func, args, kwargs)


def _call_on_float32_data_in_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call with 16-bit weights widened beside FP32 data, which kernels take no others with."""
    is_wide = getattr(args[0] if args else kwargs.get("input"), "dtype", None) is torch.float32
    return (_call_in_float32 if is_wide else _call)(func, args, kwargs)


def _widen_all_but_what_is_written(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call in FP32, but on 16-bit statistics, or a table that is to be renormed, as given: they are written into."""
    positions = {3: "max_norm"} if func.__name__.startswith("embedding") else {1: "running_mean", 2: "running_var"}
    written = [kwargs.get(name, args[at] if at < len(args) else None) for at, name in positions.items()]
    if any(x is not None and getattr(x, "dtype", None) is not torch.float32 for x in written):
        return cast_operand(func(*args, **kwargs), torch.float32)
    return _call_in(torch.float32, func, args, kwargs)


def _linear_cross_entropy(
    multiply: Handler,
    func: Function,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **loss: Any,
) -> Tensor:
    if options is not None or linear_weight.dim() != 2 or input.dim() > 2:
        # torch's own parts, or a loss of several dimensions: all of it in FP32
        named = {"linear_bias": linear_bias, "ignore_index": ignore_index, "options": options, **loss}
        return _call_in(torch.float32, func, (input, linear_weight, target), named)
    logits = multiply(F.linear, (input, linear_weight, linear_bias), {})
    ignore_index = -100 if ignore_index is None else ignore_index
    return cross_entropy_in_float32(F.cross_entropy, logits, target, ignore_index=ignore_index, **loss)


def _widen_and_round(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call on FP32 operands and round once to the dtype of the widest."""
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    dtypes = {operand.dtype for operand in operands((args, tuple(kwargs.values())))}
    result = _call_in(torch.float32, func, args, kwargs)
    return cast_operand(result, next(iter(dtypes))) if len(dtypes) == 1 else result


def _sum_to_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    has_say = kwargs.get("dtype") is not None or kwargs.get("out") is not None
    if has_say or getattr(args[0] if args else kwargs.get("input"), "dtype", None) not in _NARROW:
        return func(*args, **kwargs)
    return func(*args, **{**kwargs, "dtype": torch.float32})


def _where(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return numbers.where(functools.partial(_called_to_widest, func), args, kwargs)


def _store_to_widest(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return numbers.store_numbers(functools.partial(_called_to_widest, func), args, kwargs)


def _called_to_widest(func: Function, *args: Any, **kwargs: Any) -> Any:
    return _to_widest(func, args, kwargs)


def _unflatten(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return torch.unflatten(*args, **kwargs) if torch.compiler.is_compiling() else func(*args, **kwargs)


def _attend(
    multiply: Handler,
    func: Function,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *rest: Any,
    **named: Any,
) -> Any:
    """Call attention with what a mask has beyond the 16-bit range as its largest: -Inf would mask whole rows away."""
    if isinstance(query, Tensor) and isinstance(attn_mask, Tensor):
        narrow = torch.get_autocast_dtype(query.device.type)
        attn_mask = numbers.saturated(attn_mask, narrow) if narrow in _NARROW else attn_mask
    return multiply(func, (query, key, value, attn_mask, *rest), named)


def _attend_with_heads(
    dtype: torch.dtype, attend: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    masks = {name: kwargs[name] for name in ("attn_mask", "key_padding_mask") if isinstance(kwargs.get(name), Tensor)}
    return attend(func, args, {**kwargs, **{name: numbers.saturated(mask, dtype) for name, mask in masks.items()}})


def _to_widest(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    floats = list(operands((args, tuple(kwargs.values()))))
    # as everywhere in torch, a tensor without dimensions has no say beside one with
    dtypes = {operand.dtype for operand in floats if operand.dim()} or {operand.dtype for operand in floats}
    if all(operand.dtype in dtypes for operand in floats) and len(dtypes) < 2:
        return func(*args, **kwargs)
    return _call_in(torch.float32 if len(dtypes) > 1 else next(iter(dtypes)), func, args, kwargs)


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
