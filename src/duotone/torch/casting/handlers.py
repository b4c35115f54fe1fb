"""How the kinds of `operation_table` are carried out: the handler of each listed function, called instead of it.

A handler takes the function that was called and its arguments, and casts as the function's kind says; autocast is off
then. A function that writes into a given tensor (`out=`) is left alone. Where torch's own kernels do otherwise than a
kind promises, `float32_inside` and `half_on_cpu` have the handler.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.operations import Kind
from duotone.torch.casting import numbers
from duotone.torch.casting.float32_inside import (
    FLOAT32_INSIDE,
    FLOAT32_INSIDE_ON_CPU,
    OPERATORS_FLOAT32_INSIDE,
    TO_FLOAT32,
    Handler,
    as_handler,
)
from duotone.torch.casting.float32_inside.accumulation import (
    accumulate_in_float32,
    accumulate_in_place,
    accumulates,
    add_duplicates_in_float32,
)
from duotone.torch.casting.float32_inside.attention import attend_on_cpu
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32
from duotone.torch.casting.float32_inside.dirichlet import sample_in_float32
from duotone.torch.casting.float32_inside.gathers import needs_sum
from duotone.torch.casting.float32_inside.quantization import observe_and_quantize_in_float32
from duotone.torch.casting.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.casting.operation_table import (
    Function,
    functions_in,
    functions_named,
    kinds,
    kinds_by_name,
    overloads_named,
    same_operation,
)
from duotone.torch.casting.products import KEEPS_ALL, multiply_as_given, multiply_by_equation, multiply_groups
from duotone.torch.casting.shared_cast import SharedCast
from duotone.torch.casting.widened import operands, widen_and_round, widen_to_data
from duotone.torch.internals.dispatch import PADDING
from duotone.torch.nested import cast_floating

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
# sums that widen while they read, so that no widened copy is made
_WITH_DTYPE = ("sum", "nansum", "prod", "log_softmax", "special.log_softmax")
# may write into an operand
_WRITING = (F.batch_norm, F.instance_norm, F.embedding, F.embedding_bag)
# names under which torch.ops.aten has something else, or whose operators take other arguments than their functions
_OTHERWISE = ("__getitem__", "__setitem__", "tensor", "as_tensor", "linear_cross_entropy")
_made: dict[str, "Handlers"] = {}
_shared: dict[str, SharedCast] = {}


@dataclass(frozen=True)
class Handlers:
    """How functions are carried out in a region.

    Attributes:
        by_function: the handler of each listed function; autocast is off when it is called.
        products: the handlers of functions that may be called as they are if each operand is in the region's dtype.
        methods: tensors' methods that are written in Python, with their handlers.
        shared: casts what several products take; None where products take FP32.
        untraced: `by_function`, and what `shared` has to know of; a model that is traced takes no notice.
    """

    by_function: dict[Function, Handler]
    products: tuple[Handler, ...]
    methods: tuple[tuple[Function, Handler], ...]
    shared: SharedCast | None = None

    @functools.cached_property
    def untraced(self) -> dict[Function, Handler]:
        return self.by_function if self.shared is None else {**self.by_function, **self.shared.handlers()}

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

    _put_numbers(put)
    # a method in Python that asks for its super() cannot be traced in a mode
    made[Tensor.unflatten] = _unflatten
    put(as_handler(sample_in_float32), functions_named("sample_dirichlet"))
    put(_sum_to_float32, functions_named(*_WITH_DTYPE))
    put(_norm_to_float32, functions_named("linalg.vector_norm"))
    if compute == torch.float32:
        put(_widen_all_but_what_is_written, _WRITING)
        _put_operators(made, put)
        return Handlers(made, (), _methods(made))
    put(_call_on_float32_data_in_float32, functions_named("native_layer_norm", "native_group_norm"))
    for family in ("sum_by_index", "remainder", "sparse_softmax"):
        put(widen_and_round, functions_in(family))
    put(widen_and_round, functions_named("nanmean"))
    put(_widen_for_gradient, functions_named("var", "std", "var_mean", "std_mean"))
    for family in ("interpolation", "random_window", "quantization"):
        put(widen_to_data, functions_in(family))
    put(as_handler(add_duplicates_in_float32), functions_named("coalesce", "to_dense"))
    put(accumulate_in_place, functions_named("index_reduce_"))
    put(functools.partial(_put, accumulate_in_float32, _to_widest), functions_named("index_put", "put"))
    put(functools.partial(_put, accumulate_in_place, numbers.store), functions_named("index_put_", "put_"))
    put(as_handler(observe_and_quantize_in_float32), functions_named("fused_moving_avg_obs_fake_quant"))
    put(as_handler(cross_entropy_in_float32), functions_named("cross_entropy"))
    made.update(FLOAT32_INSIDE)
    put(functools.partial(_hold_numbers, made[F.pad]), (F.pad,))
    call_in_compute, emulated = functools.partial(_call_in, compute), False
    if device_type == "cpu":
        # torch has no 16-bit kernels for these on CPUs, or they sum in 16 bits
        for family in ("average_pool", "random_activation"):
            put(widen_and_round, functions_in(family))
        made.update(FLOAT32_INSIDE_ON_CPU)
        emulated = compute == torch.float16 and not cpu_has_half_products()
    if residual == "float32":
        made.update(TO_FLOAT32)
    # one for every device
    shared = _shared.setdefault(str(compute), SharedCast(compute))
    # by its name: torch.compile compares handlers, and does not know how to compare such an object
    plainly = functools.partial(_share_first, str(compute), multiply_in_float32 if emulated else call_in_compute)
    multiply = functools.partial(multiply_as_given, plainly, compute, None)
    put(multiply, (function for function, kind in kinds().items() if kind == "compute"))
    put(functools.partial(multiply_groups, multiply, compute), functions_named("grouped_mm"))
    # one handler for all that take the same arguments
    outer = {each: functools.partial(multiply_as_given, plainly, compute, each) for each in set(KEEPS_ALL.values())}
    for name, sums_nothing in KEEPS_ALL.items():
        put(outer[sums_nothing], functions_named(name))
    put(functools.partial(multiply_by_equation, outer[KEEPS_ALL["einsum"]]), functions_named("einsum"))
    # made of several operations, each of which is to see autocast switched off
    attend = multiply_in_float32 if emulated else functools.partial(_call_on_each_once, compute)
    put(functools.partial(_attend_with_heads, compute, attend), functions_named("multi_head_attention_forward"))
    if device_type == "cpu" and compute == torch.bfloat16:
        attend = functools.partial(attend_on_cpu, attend)
    put(as_handler(functools.partial(_attend, attend)), functions_named("scaled_dot_product_attention"))
    put(as_handler(functools.partial(_linear_cross_entropy, plainly)), functions_named("linear_cross_entropy"))
    _put_operators(made, put)
    if device_type == "cpu":
        for name, handler in OPERATORS_FLOAT32_INSIDE.items():
            put(handler, overloads_named(name))
    if residual == "float32":
        put(TO_FLOAT32[torch.embedding], overloads_named("embedding"))
    return Handlers(made, () if emulated else (multiply, outer[KEEPS_ALL["matmul"]]), _methods(made), shared)


def _put_numbers(put: Callable[[Handler, Iterable[Function]], None]) -> None:
    """Give functions that take numbers handlers that see to those which 16 bits do not have."""
    put(numbers.store, functions_in("write"))
    put(numbers.store_value, functions_named("__setitem__", "scatter_"))
    put(numbers.store_numbers, (*functions_in("fill"), *PADDING, torch.nested.to_padded_tensor))
    put(numbers.copy_in_place, functions_named("copy_"))
    put(functools.partial(_hold_numbers, _to_widest), functions_named("scatter"))
    put(_where, functions_named("where"))
    put(numbers.widen_beside_number, functions_in("number"))
    put(numbers.divide, functions_named("div", "divide", "true_divide"))
    put(numbers.add_in_place, functions_in("number_in_place"))
    put(numbers.clamp, functions_in("bound"))
    put(numbers.clamp_in_place, functions_in("bound_in_place"))
    put(numbers.cast, functions_in("cast"))


def _put_operators(made: Mapping[Function, Handler], put: Callable[[Handler, Iterable[Function]], None]) -> None:
    """Give operators of `torch.ops.aten` the handlers of functions that take the same arguments."""
    for name in (name for name in kinds_by_name() if name not in _OTHERWISE):
        # the first is that of torch, whose arguments are an operator's; a private one that this torch has not leaves
        # its operators as they are
        for function in islice(functions_named(name), 1):
            put(made[function], overloads_named(name))


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
    """Return whether no argument has to be cast: tensors are dense and in `dtype`, and there are none in lists."""
    # a loop is several times as fast as a generator here, and this is called for every product
    for arg in args:
        if (
            arg.dtype is not dtype or arg.layout is not torch.strided
            if isinstance(arg, Tensor)
            else type(arg) in (list, tuple)
        ):
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


def _share_first(
    compute: str, multiply: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a product with its first operand cast once for all products that take it."""
    first = args[0] if args else None
    is_traced = torch.compiler.is_compiling()
    if isinstance(first, Tensor) and first.dtype is torch.float32 and not is_traced and kwargs.get("out") is None:
        args = (_shared[compute](first), *args[1:])
    return multiply(func, args, kwargs)


def _call_on_each_once(dtype: torch.dtype, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with every operand in `dtype`; one that is given twice, as in self-attention, stays one."""
    if are_ready((*args, *kwargs.values()), dtype):
        return func(*args, **kwargs)
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


def _sum_to_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    has_say = kwargs.get("dtype") is not None or kwargs.get("out") is not None
    if has_say or getattr(args[0] if args else kwargs.get("input"), "dtype", None) not in _NARROW:
        return func(*args, **kwargs)
    return func(*args, **{**kwargs, "dtype": torch.float32})


def _norm_to_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    # of the others, torch takes the powers in the gradient in the dtype of the operand
    is_euclidean = (args[1] if len(args) > 1 else kwargs.get("ord", 2)) == 2
    return (_sum_to_float32 if is_euclidean else _call_in_float32)(func, args, kwargs)


def _widen_for_gradient(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a deviation: torch computes it in FP32, and the difference from the mean in its gradient in 16 bits."""
    data = args[0] if args else kwargs.get("input")
    return (widen_and_round if isinstance(data, Tensor) and needs_sum(data) else _call)(func, args, kwargs)


def _put(
    accumulate: Handler, otherwise: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    return (accumulate if accumulates(args, kwargs) else otherwise)(func, args, kwargs)


def _hold_numbers(handler: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return numbers.store_numbers(functools.partial(_called_by, handler, func), args, kwargs)


def _where(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return numbers.where(functools.partial(_called_by, _to_widest, func), args, kwargs)


def _called_by(handler: Handler, func: Function, *args: Any, **kwargs: Any) -> Any:
    return handler(func, args, kwargs)


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
    floats = operands((args, tuple(kwargs.values())))
    # as everywhere in torch, a tensor without dimensions has no say beside one with
    dtypes = {operand.dtype for operand in floats if operand.dim()} or {operand.dtype for operand in floats}
    if all(operand.dtype in dtypes for operand in floats) and len(dtypes) < 2:
        return func(*args, **kwargs)
    return _call_in(torch.float32 if len(dtypes) > 1 else next(iter(dtypes)), func, args, kwargs)


def _refuse(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for operand in operands((args, tuple(kwargs.values()))):
        if operand.dtype in _NARROW:
            dtype, name = str(operand.dtype).removeprefix("torch."), func.__name__.removesuffix(".default")
            raise OperationError(
                f"{name} on probabilities in {dtype} is not safe: near 1 they have no fraction left; use "
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
