"""Numbers that 16 bits do not have: -1e9 in a mask, 1e-8 under a root, 1 - 1e-6 before a logarithm.

FP16 ends at 65504 and begins at 2^-24, BF16 ends a little below FP32. Written beside a 16-bit tensor, a number outside
of that becomes Inf or 0, and the guard that it was meant to be is gone: a row that is masked as a whole is NaN, log(0)
is -Inf. torch.autocast on CUDA has FP32 in many of these places, where softmax, sums and exponentials give FP32.

    stored in 16 bits    the nearest number that is neither Inf nor 0 (`held`): fills, masks, assignments, casts
    beside a tensor      the result is FP32 (`widen_beside_number`, `clamp`): sums, products, quotients, bounds
    a bound in place     the nearest number on the bound's own side of 0 and of 1 (`bound`)

Inf, NaN and 0 stay what they are. Tensors through which gradients go are no constants: they overflow as always. These
are functions of plain tensors; `handlers` says where they stand. Left out: numbers in tensors of no dimension beside
another tensor, which torch takes for numbers, but which cannot be read without waiting for the device, except divisors;
and numbers that torch.compile knows by a symbol alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from duotone.torch.casting.guards import divide_guarded, needs_guard, widen_guarded
from duotone.torch.internals.autograd import in_transform, is_jit_tracing

Function = Callable[..., Any]

NARROW = (torch.bfloat16, torch.float16)
# by dtype: the largest, the smallest above 0, and the largest below 1
_LIMITS = {
    torch.float16: (65504.0, 2.0**-24, 1 - 2.0**-11),
    torch.bfloat16: (torch.finfo(torch.bfloat16).max, 2.0**-133, 1 - 2.0**-8),
}
# every number from the one to the other is neither 0 nor Inf in both formats
SMALLEST, LARGEST = _LIMITS[torch.float16][1], _LIMITS[torch.float16][0]


def held(number: Any, dtype: torch.dtype) -> Any:
    """Return what a 16-bit tensor is given for a number: the number itself unless that would become Inf or 0.

    >>> held(-1e9, torch.float16), held(1e-8, torch.float16) == 2**-24, held(-1e9, torch.bfloat16)
    (-65504.0, True, -1000000000.0)
    """
    largest, smallest, _ = _LIMITS[dtype]
    if not _is_finite_number(number):
        return number
    if abs(number) > largest:
        return largest if number > 0 else -largest
    if abs(number) < smallest:
        return smallest if number > 0 else -smallest
    return number


def bound(number: Any, dtype: torch.dtype) -> Any:
    """Return what a bound is in 16 bits: neither Inf nor 0 unless it is so, and not 1 if it is less.

    >>> bound(1 - 1e-6, torch.bfloat16)
    0.99609375
    """
    if not _is_finite_number(number):
        return number
    below_one = _LIMITS[dtype][2]
    if below_one < abs(number) < 1:
        return below_one if number > 0 else -below_one
    return held(number, dtype)


def widen_beside_number(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call an elementwise function; in FP32 if a number beside its 16-bit tensor would be Inf or 0 in 16 bits.

    >>> x = torch.zeros(1, dtype=torch.float16)
    >>> widen_beside_number(torch.add, (x, 1e-8), {}), widen_beside_number(torch.add, (x, 1.0), {})
    (tensor([1.0000e-08]), tensor([1.], dtype=torch.float16))
    """
    input, rest = _input_of(args, kwargs)
    if not isinstance(input, Tensor) or input.dtype not in NARROW or kwargs.get("out") is not None:
        return func(*args, **kwargs)
    other = rest[0] if rest else kwargs.get("other")
    if not _is_finite_number(other) or held(other, input.dtype) == other:
        return func(*args, **kwargs)
    is_guard = abs(other) < 1 and input.requires_grad and torch.is_grad_enabled()
    return _call_on(widen_guarded(input) if is_guard else input.float(), func, args, kwargs)


def divide(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a division; beside a number as `widen_beside_number`, and by a tensor in FP32 so that guards stay guards.

    A tensor without dimensions that 16 bits do not have, as of `x / (x.std() + 1e-8)`, is not rounded.

    >>> x = torch.zeros(2, dtype=torch.float16)
    >>> divide(torch.div, (x, torch.tensor(1e-8)), {})
    tensor([0., 0.], dtype=torch.float16)
    """
    input, rest = _input_of(args, kwargs)
    other = rest[0] if rest else kwargs.get("other")
    if not isinstance(other, Tensor):
        return widen_beside_number(func, args, kwargs)
    is_whole = kwargs.get("out") is None and kwargs.get("rounding_mode") is None
    return divide_guarded(input, other) if is_whole and needs_guard(input, other) else func(*args, **kwargs)


def clamp(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a clamp out of place; in FP32 if 16 bits move one of its bounds to 0 or to 1.

    Bounds beyond the range are taken as its ends.

    >>> x = torch.tensor([0.0, 1.0], dtype=torch.float16)
    >>> clamp(torch.clamp, (x,), {"min": 1e-8, "max": 1 - 1e-6}).dtype, clamp(torch.clamp, (x, -1e9), {}).dtype
    (torch.float32, torch.float16)
    """
    input, rest = _input_of(args, kwargs)
    if not isinstance(input, Tensor) or input.dtype not in NARROW or kwargs.get("out") is not None:
        return func(*args, **kwargs)
    largest = _LIMITS[input.dtype][0]
    for number in (*rest, *kwargs.values()):
        if _is_finite_number(number) and abs(number) <= largest and bound(number, input.dtype) != number:
            return _call_on(input.float(), func, args, kwargs)
    return clamp_in_place(func, args, kwargs)


def clamp_in_place(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a clamp with bounds that its 16-bit tensor has, on the same side of 0 and 1."""
    return _with_numbers(bound, func, args, kwargs)


def store_numbers(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call what writes numbers into a 16-bit tensor, or makes one of a number, with numbers that it holds.

    >>> store_numbers(torch.full, ((1,), -1e9), {"dtype": torch.float16})
    tensor([-65504.], dtype=torch.float16)
    """
    return _with_numbers(held, func, args, kwargs)


def store(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call what writes into its first operand with all others in the dtype of that; constants as numbers that it holds.

    >>> x = torch.zeros(1, dtype=torch.float16)
    >>> _ = store(torch.Tensor.__setitem__, (x, 0, torch.tensor(-1e9)), {})
    >>> x
    tensor([-65504.], dtype=torch.float16)
    """
    input, rest = _input_of(args, kwargs)
    dtype = getattr(input, "dtype", None)
    if dtype not in (torch.float32, *NARROW):
        return func(*args, **kwargs)

    def written(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype is dtype or value.dtype not in (torch.float32, *NARROW):
                return value
            return _held_tensor(value, dtype) if value.dtype is torch.float32 and dtype in NARROW else value.to(dtype)
        return type(value)(written(each) for each in value) if type(value) in (list, tuple) else value

    named = {name: value if name == "input" else written(value) for name, value in kwargs.items()}
    return func(*args[: len(args) - len(rest)], *map(written, rest), **named)


def store_value(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Do the same, where what is written may be a number: the last argument, or `value`.

    >>> x = torch.zeros(1, dtype=torch.float16)
    >>> _ = store_value(torch.Tensor.__setitem__, (x, 0, -1e9), {})
    >>> x
    tensor([-65504.], dtype=torch.float16)
    """
    dtype = getattr(_input_of(args, kwargs)[0], "dtype", None)
    if dtype in NARROW:
        if "value" in kwargs:
            kwargs = {**kwargs, "value": held(kwargs["value"], dtype)}
        elif args:
            args = (*args[:-1], held(args[-1], dtype))
    return store(func, args, kwargs)


def copy_in_place(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `copy_`; a constant in FP32 becomes numbers that its 16-bit tensor holds."""
    input, rest = _input_of(args, kwargs)
    source = rest[0] if rest else None
    if isinstance(source, Tensor) and source.dtype is torch.float32 and input.dtype in NARROW:
        return func(input, _held_tensor(source, input.dtype), *rest[1:], **kwargs)
    return func(*args, **kwargs)


def where(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `where`, numbers beside a 16-bit tensor being numbers that it holds.

    >>> x = torch.zeros(1, dtype=torch.float16)
    >>> where(torch.where, (x > 0, x, -1e9), {})
    tensor([-65504.], dtype=torch.float16)
    """
    given = (*args, *kwargs.values())
    dtypes = {each.dtype for each in given if isinstance(each, Tensor) and each.dim() and each.is_floating_point()}
    dtype = next(iter(dtypes), None)
    if len(dtypes) != 1 or dtype not in NARROW:
        return func(*args, **kwargs)

    def beside(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.dim() or value.requires_grad else saturated(value, dtype)
        return held(value, dtype)

    return func(*map(beside, args), **{name: beside(value) for name, value in kwargs.items()})


def cast(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a cast; of constants, finite values beyond the range of 16 bits become the largest.

    >>> cast(torch.Tensor.half, (torch.tensor([-1e9, -torch.inf]),), {})
    tensor([-65504.,    -inf], dtype=torch.float16)
    """
    result = func(*args, **kwargs)
    source = args[0]
    # type() without a dtype is a name
    if not isinstance(result, Tensor) or result.dtype not in NARROW or source.dtype is not torch.float32:
        return result
    return result if source.requires_grad or result.device != source.device else _without_overflow(result, source)


def add_in_place(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a sum or difference in place, with a number that its tensor holds, or with a mask in FP32."""
    input, rest = _input_of(args, kwargs)
    other = rest[0] if rest else kwargs.get("other")
    if getattr(input, "dtype", None) not in NARROW or not isinstance(other, Tensor):
        return _with_numbers(held, func, args, kwargs)
    result = func(*args, **kwargs)
    if other.dtype is torch.float32 and other.dim() and not other.requires_grad:
        largest = _LIMITS[input.dtype][0]
        lost = input.isinf() & other.isfinite() & (other.abs() > largest)
        if not _is_nowhere(lost):
            above = lost & (input > 0)
            input.masked_fill_(above, largest).masked_fill_(lost & ~above, -largest)
    return result


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a FP32 tensor to 16 bits, finite values beyond the range to the largest; any other tensor is left alone.

    >>> saturated(torch.tensor([-1e9, -torch.inf]), torch.float16)
    tensor([-65504.,    -inf], dtype=torch.float16)
    """
    return _without_overflow(tensor.to(dtype), tensor) if tensor.dtype == torch.float32 else tensor


def _held_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a 16-bit tensor is given for another one in FP32: a constant is saturated."""
    if tensor.requires_grad:
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
    return saturated(tensor, dtype)


def _without_overflow(result: Tensor, source: Tensor) -> Tensor:
    # sparse and nested tensors are no masks, and few kernels take them
    if source.layout is not torch.strided or source.is_nested:
        return result
    lost = result.isinf() & source.isfinite()
    if _is_nowhere(lost):
        return result
    largest = _LIMITS[result.dtype][0]
    return torch.where(lost, result.clamp(-largest, largest), result)


def _is_nowhere(lost: Tensor) -> bool:
    """Return whether a mask is known to be empty: on a CPU, which can be asked without waiting."""
    if torch.compiler.is_compiling() or lost.device.type != "cpu" or type(lost) is not Tensor:
        return False
    # nor has a tensor of a transform or of a tracer a value
    return not in_transform() and not is_jit_tracing() and not lost.any()


def _is_finite_number(number: Any) -> TypeGuard[float]:
    """Return whether it is a Python number, and neither NaN, Inf nor 0."""
    if not isinstance(number, int | float) or isinstance(number, bool):
        return False
    # of a number that torch.compile knows by a symbol this is another symbol, and to ask for its value may fail; it is
    # True for NaN
    if (number != number) is not False:  # noqa: PLR0124
        return False
    # by comparisons alone: an int may be too large for a float
    return number not in (0, float("inf"), float("-inf"))


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return the first operand, and the other positional arguments."""
    return (args[0], args[1:]) if args else (kwargs.get("input"), ())


def _call_on(input: Tensor, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(input, *args[1:], **kwargs) if args else func(**{**kwargs, "input": input})


def _with_numbers(
    change: Callable[[Any, torch.dtype], Any], func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call with each number as its 16-bit tensor holds it; that is what `dtype` says, or the first operand is in."""
    input, _ = _input_of(args, kwargs)
    # sequences to pad come in a list
    first = input[0] if type(input) in (list, tuple) and input else input
    dtype = kwargs.get("dtype") or getattr(first, "dtype", None)
    if dtype not in NARROW:
        return func(*args, **kwargs)

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_number = not value.dim() and not value.requires_grad
            return saturated(value, dtype) if is_number else value
        return change(value, dtype)

    return func(*map(changed, args), **{name: changed(value) for name, value in kwargs.items()})
