"""Where operations run under the rules of `op_rules`: a region, entered around a part of a model.

A region is torch.autocast without its weight cache, and a function mode that carries out the rules in Python. The mode
decides for every listed operation that user code calls; autocast casts what is multiplied inside of functions that
torch composes itself, and tells code that asks that it runs in 16 bits. A weight cache would go stale when weights
change inside, and is not needed where weights are 16-bit already. Whoever switches autocast off or to another dtype
inside (`torch.autocast(enabled=False)`, `torch.amp.custom_fwd`) switches the rules off with it. Left out: functions
that Python code of torch's calls inside of an unlisted function see autocast's rules alone.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from duotone.errors import OperationError

try:
    from duotone.torch.cross_entropy import cross_entropy_in_float32
    from duotone.torch.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU
except ImportError:  # TEMPORARY
    from duotone.torch.sums_on_cpu import SUMS, sum_in_float32

    def cross_entropy_in_float32(func, args, kwargs):
        return _call_in(torch.float32, func, args, kwargs)

    FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU = {}, dict.fromkeys(SUMS, sum_in_float32)
from duotone.torch.half_on_cpu import cpu_has_half_products, multiply_in_float32
from duotone.torch.op_rules import Function, Kind, functions_of, kinds

# takes the function that was called, its positional and its named arguments, and returns the result
Handler = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.bfloat16, torch.float16)
_made: dict[tuple[torch.dtype, str], "Rules"] = {}
# sums that widen while they read, so that no widened copy is made
_SUMMED_BY_INDEX = ("index_add", "index_reduce", "scatter_add", "scatter_reduce")
_WITH_DTYPE = ("sum", "nansum", "prod", "cumsum", "cumprod", "linalg.vector_norm")


class Region:
    """Where operations run in one dtype where that is safe, and in FP32 where it is not.

    Args:
        compute: BF16 or FP16; FP32 switches off whatever is around it.

    >>> with Region(torch.bfloat16).on("cpu"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, torch.ones(2).bfloat16().exp().dtype
    (torch.bfloat16, torch.float32)
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        # looked up here and not in a forward pass, where a tracer would follow
        self._on_cpu, self._elsewhere = rules_for(compute, "cpu"), rules_for(compute, "cuda")
        rules_for(torch.float32, "cpu")

    def __reduce__(self) -> Any:
        # the handlers are found anew, in another process too
        return Region, (self.compute,)

    @contextmanager
    def on(self, device_type: str) -> Iterator[None]:
        """Enter the region for tensors on `"cpu"`, `"cuda"`, ..."""
        if self.compute == torch.float32:
            with torch.autocast(device_type, enabled=False):
                yield
            return
        rules = self._on_cpu if device_type == "cpu" else self._elsewhere
        mode = RulesMode(rules, device_type, self.compute)
        with torch.autocast(device_type, self.compute, cache_enabled=False), mode:
            yield

    def still_holds(self) -> bool:
        """Return whether a region, entered around this call, holds here too.

        Autocast follows a recomputation by `torch.utils.checkpoint`; the rules do not.
        """
        if self.compute == torch.float32 or torch.compiler.is_compiling():
            return True
        depth = torch._C._len_torch_function_stack()
        # the innermost mode first: it is the one nearly always
        return any(isinstance(torch._C._get_function_stack_at(at), RulesMode) for at in range(depth - 1, -1, -1))


@contextmanager
def float32_everywhere() -> Iterator[None]:
    """Enter a region, on every device, where listed operations cast 16-bit operands to FP32 and give FP32."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        torch.autocast("cpu", torch.float32, enabled=False),
        torch.autocast(device_type, torch.float32, enabled=False),
        RulesMode(rules_for(torch.float32, "cpu"), device_type, torch.float32),
    ):
        yield


def compute_dtype(device_type: str) -> torch.dtype | None:
    """Return what products are computed in here, or None outside of regions and where autocast is switched off.

    >>> with float32_everywhere():
    ...     compute_dtype("cpu")
    torch.float32
    """
    dtype = torch.get_autocast_dtype(device_type)
    # nobody but a region that widens has FP32 there
    return dtype if dtype == torch.float32 or torch.is_autocast_enabled(device_type) else None


class RulesMode(TorchFunctionMode):
    """Carries out rules for the functions that have one, wherever autocast is as the region left it."""

    def __init__(self, rules: "Rules", device_type: str, compute: torch.dtype) -> None:
        super().__init__()
        self._rules, self._products = rules.handlers, rules.products
        self._device_type = device_type
        self._compute = compute

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = self._rules.get(func)
        # nearly every product's operands have their dtype already; this spares them most of what follows
        if func in self._products and not kwargs and _are_ready(args, self._compute):
            return func(*args)
        # another dtype there: a region inside of this one, or the user's own autocast
        if rule is None or compute_dtype(self._device_type) is not self._compute:
            return func(*args, **kwargs) if kwargs else func(*args)
        with no_autocast(self._device_type):
            return rule(func, args, kwargs or {})


def no_autocast(device_type: str) -> Any:
    """Switch autocast off."""
    # the guard of C++ is several times cheaper, but a tracer would not see it
    if torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)
    return torch._C._DisableAutocast()


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


def _are_ready(args: tuple[Any, ...], dtype: torch.dtype) -> bool:
    for arg in args:
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
