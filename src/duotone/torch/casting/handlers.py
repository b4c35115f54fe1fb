"""How the rules of `op_rules` are carried out: for each listed function, what is called instead of it.

A handler takes the function that was called and its arguments, and casts as the function's kind says; autocast is off
then. A function that writes into a given tensor (`out=`) is left alone. Where torch's own kernels do otherwise than a
kind promises, `float32_inside`, `cross_entropy` and `half_on_cpu` have the handler.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.torch.casting.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32
from duotone.torch.casting.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.casting.op_rules import Function, Kind, forms, functions_of, kinds, kinds_by_name

# takes the function that was called, its positional and its named arguments, and returns the result
Handler = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
# sums of many terms into few places, each of which torch's kernels round
_SUMMED_BY_INDEX = ("index_add", "index_reduce", "scatter_add", "scatter_reduce")
# what torch has no 16-bit kernel for on a CPU
_WIDENED_ON_CPU = ("avg_pool3d", "rrelu")
# sums that widen while they read, so that no widened copy is made
_WITH_DTYPE = ("sum", "nansum", "prod", "linalg.vector_norm")
_COMPOSED = ("multi_head_attention_forward",)
# what may write into an operand
_WRITING = (F.batch_norm, F.instance_norm, F.embedding, F.embedding_bag)
_made: dict[str, "Rules"] = {}


@dataclass(frozen=True)
class Rules:
    """How functions are carried out in a region.

    Attributes:
        handlers: for each listed function; autocast is off when one is called.
        product: the handler of functions that may be called as they are if each operand is in the region's dtype.
        methods: tensors' methods that are written in Python, with their handlers.
    """

    handlers: dict[Function, Handler]
    product: Handler | None
    methods: tuple[tuple[Function, Handler], ...]

    def find(self, function: Function) -> Handler | None:
        """Return how a function is carried out, or None if it is called as it is."""
        if torch.compiler.is_compiling():
            # torch.compile does not find these in a dict, and takes it that they are not there
            for method, handler in self.methods:
                if function is method:
                    return handler
        return self.handlers.get(function)


def rules_for(compute: torch.dtype, device_type: str) -> Rules:
    """Return the rules of a region where `compute` is the dtype of products."""
    # neither functools.cache, which torch.compile looks through, nor a dtype as the key, which it cannot name
    key = f"{compute} {device_type}"
    if key not in _made:
        forms()
        _made[key] = _make_rules(compute, device_type)
    return _made[key]


def _make_rules(compute: torch.dtype, device_type: str) -> Rules:
    made = {function: handler(kind, compute) for function, kind in kinds().items()}

    def put(handler: Handler, *names: str) -> None:
        made.update((function, handler) for name in names for function in functions_of(name))

    put(_write_into, *(name for name, kind in kinds_by_name().items() if kind == "widest" and name.endswith("_")))
    put(_fill, "masked_fill", "masked_fill_")
    # a method in Python that asks for its super() cannot be traced in a mode
    made[Tensor.unflatten] = _unflatten
    put(_sum_to_float32, *_WITH_DTYPE)
    if compute == torch.float32:
        made.update(dict.fromkeys(_WRITING, _widen_all_but_what_is_written))
        return Rules(made, None, _methods(made))
    put(_widen_and_round, *_SUMMED_BY_INDEX)
    put(cross_entropy_in_float32, "cross_entropy")
    made.update(FLOAT32_INSIDE)
    product = functools.partial(_call_in, compute)
    if device_type == "cpu":
        put(_widen_and_round, *_WIDENED_ON_CPU)
        made.update(FLOAT32_INSIDE_ON_CPU)
        if compute == torch.float16 and not cpu_has_half_products():
            product = multiply_in_float32
    made.update((function, product) for function, kind in kinds().items() if kind == "compute")
    # made of several operations, each of which is to see autocast switched off
    put(product if product is multiply_in_float32 else functools.partial(_call_in, compute), *_COMPOSED)
    put(functools.partial(_attend, product), "scaled_dot_product_attention")
    put(functools.partial(_linear_cross_entropy, product), "linear_cross_entropy")
    return Rules(made, None if product is multiply_in_float32 else product, _methods(made))


def _methods(made: dict[Function, Handler]) -> tuple[tuple[Function, Handler], ...]:
    methods = [getattr(Tensor, name) for name in dir(Tensor)]
    return tuple((method, made[method]) for method in methods if isinstance(method, FunctionType) and method in made)


def handler(kind: Kind, compute: torch.dtype) -> Handler:
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


def _call_in_float32(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    # a result that is asked for in 16 bits is the caller's own choice
    return func(*args, **kwargs) if kwargs.get("dtype") in _NARROW else _call_in(torch.float32, func, args, kwargs)


def _widen_all_but_what_is_written(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call in FP32, but on 16-bit statistics, or a table that is to be renormed, as given: they are written into."""
    places = {1: "running_mean", 2: "running_var"}
    if func.__name__.startswith("embedding"):
        places = {3: "max_norm"}
    written = [kwargs.get(name, args[at] if at < len(args) else None) for at, name in places.items()]
    if any(x is not None and getattr(x, "dtype", None) is not torch.float32 for x in written):
        return cast_operand(func(*args, **kwargs), torch.float32)
    return _call_in(torch.float32, func, args, kwargs)


def _linear_cross_entropy(
    multiply: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    # the first three may come by name too
    named = {**dict(zip(("input", "linear_weight", "target"), args, strict=False)), **kwargs}
    x, weight, target = named["input"], named["linear_weight"], named["target"]
    if named.get("options") is not None or weight.dim() != 2 or x.dim() > 2:
        # torch's own parts, or a loss of several dimensions: all of it in FP32
        return _call_in(torch.float32, func, args, kwargs)
    logits = multiply(F.linear, (x, weight, named.get("linear_bias")), {})
    ignore_index = named.get("ignore_index")
    rest = {name: named[name] for name in ("weight", "reduction", "label_smoothing") if name in named}
    rest["ignore_index"] = -100 if ignore_index is None else ignore_index
    return cross_entropy_in_float32(F.cross_entropy, (logits, target), rest)


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
    return func(*args, **kwargs, dtype=torch.float32)


def _write_into(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call with every operand in the dtype of the first, which is written into."""
    dtype = getattr(args[0] if args else kwargs.get("input"), "dtype", None)
    return _call_in(dtype, func, args, kwargs) if dtype in _FLOATS else func(*args, **kwargs)


def _unflatten(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return torch.unflatten(*args, **kwargs) if torch.compiler.is_compiling() else func(*args, **kwargs)


def _fill(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Fill in a number, those beyond the range as its largest: -1e9 is how masks are written, and torch raises."""
    named = {**dict(zip(("input", "mask", "value"), args, strict=False)), **kwargs}
    data, value = named["input"], named["value"]
    if data.dtype in _NARROW and isinstance(value, Tensor):
        return func(data, named["mask"], saturated(value, data.dtype))
    if data.dtype in _NARROW and isinstance(value, int | float) and math.isfinite(value):
        largest = torch.finfo(data.dtype).max
        return func(data, named["mask"], max(-largest, min(largest, value)))
    return func(*args, **kwargs)


def _attend(attend: Handler, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call attention with what a mask has beyond the 16-bit range as its largest: -Inf would mask whole rows away."""
    query = args[0] if args else kwargs.get("query")
    narrow = torch.get_autocast_dtype(query.device.type) if isinstance(query, Tensor) else None
    if narrow in _NARROW:
        if isinstance(kwargs.get("attn_mask"), Tensor):
            kwargs = {**kwargs, "attn_mask": saturated(kwargs["attn_mask"], narrow)}
        elif len(args) > 3 and isinstance(args[3], Tensor):
            args = (*args[:3], saturated(args[3], narrow), *args[4:])
    return attend(func, args, kwargs)


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a FP32 tensor to 16 bits, finite values beyond the range to the largest; any other tensor is left alone.

    >>> saturated(torch.tensor([-1e9, -torch.inf]), torch.float16)
    tensor([-65504.,    -inf], dtype=torch.float16)
    """
    if tensor.dtype != torch.float32:
        return tensor
    largest = torch.finfo(dtype).max
    return torch.where(tensor.isinf(), tensor, tensor.clamp(-largest, largest)).to(dtype)


def _to_widest(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    found = list(operands((args, tuple(kwargs.values()))))
    # as everywhere in torch, a tensor without dimensions has no say beside one with
    dtypes = {operand.dtype for operand in found if operand.dim()} or {operand.dtype for operand in found}
    if all(operand.dtype in dtypes for operand in found) and len(dtypes) < 2:
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
