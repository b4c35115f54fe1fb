"""Rules for operations that the table does not know, or that a part of a model wants otherwise.

    op_rule(function, kind)     a function of one's own, a custom operator, `SomeFunction.apply`: runs under a rule
                                wherever it is called inside a cast model
    op_rules({function: kind})  functions of torch run under other rules in a block of code

The kinds are those of `op_rules.py`; "as_given" takes a function out of the table. Both hold under torch.autocast too.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from duotone.errors import OperationError
from duotone.operations import Kind, check_kind
from duotone.torch.casting.handlers import handler_of, operands
from duotone.torch.casting.operation_table import Function, functions_like
from duotone.torch.casting.region import compute_dtype, no_autocast
from duotone.torch.casting.tracing import not_by_itself

Called = TypeVar("Called", bound=Callable[..., Any])


def op_rule(function: Called, kind: Kind) -> Called:
    """Return `function` under a rule: inside a cast model its operands are cast as the kind says, elsewhere not.

    Inside `function` no rules hold: what it calls runs on what it is given. Tensors in FP32, BF16 and FP16 are cast,
    those in tuples and lists too.

    Args:
        function: any callable that takes tensors: a Python function, a custom operator, `apply` of a
            `torch.autograd.Function`.
        kind: "compute", "float32", "float32_inside", "widest" or "as_given".

    Raises:
        OperationError: there is no such kind.

    >>> import torch, duotone.torch as dt
    >>> relative = dt.op_rule(lambda x, y: (x - y) / y, "float32")
    >>> class Relative(torch.nn.Module):
    ...     def forward(self, x):
    ...         return relative(x, x + 1).dtype, (x - 1).dtype
    >>> dt.cast(Relative(), "bf16")(torch.ones(2))
    (torch.float32, torch.bfloat16)
    """
    kind = check_kind(kind)
    if isinstance(function, type) or not callable(function):
        raise OperationError(f"op_rule takes a function, not {function!r:.60}; give torch.exp, not its name or a class")

    @functools.wraps(function)
    def under_rule(*args: Any, **kwargs: Any) -> Any:
        return _carry_out(kind, function, args, kwargs)

    return under_rule  # type: ignore[return-value]


@contextmanager
def op_rules(rules: Mapping[Function, Kind]) -> Iterator[None]:
    """Let functions of torch run under other rules in a block of code inside a cast model.

    Args:
        rules: function to kind. A function stands for its method and operator too: `torch.exp` for `x.exp()`.

    Raises:
        OperationError: a function is not one of torch's that can be intercepted, or there is no such kind.

    >>> import torch, duotone.torch as dt
    >>> class Exp(torch.nn.Module):
    ...     def forward(self, x):
    ...         with dt.op_rules({torch.exp: "as_given"}):
    ...             return x.exp().dtype
    >>> dt.cast(Exp(), "bf16")(torch.ones(2))
    torch.bfloat16
    """
    if not isinstance(rules, Mapping):
        raise OperationError(f'op_rules takes a mapping, such as {{torch.exp: "float32"}}, not {rules!r:.60}')
    found: dict[Function, Kind] = {}
    for function, kind in rules.items():
        found.update(dict.fromkeys(functions_like(function), check_kind(kind)))
    with _OwnRules(found):
        yield


class _OwnRules(TorchFunctionMode):
    def __init__(self, rules: Mapping[Function, Kind]) -> None:
        super().__init__()
        # not a dict: torch.compile does not find tensors' methods in one
        self._rules = tuple(rules.items())

    @not_by_itself
    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for function, kind in self._rules:
            if func is function:
                return _carry_out(kind, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _carry_out(kind: Kind, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    first = next(operands((args, tuple(kwargs.values()))), None)
    compute = None if first is None else compute_dtype(first.device.type)
    if first is None or compute is None:
        return function(*args, **kwargs)
    # where everything is widened, another dtype than FP32 is what ends that
    ended = torch.autocast(first.device.type, torch.bfloat16, enabled=False)
    with ended if compute == torch.float32 else no_autocast(first.device.type):
        return handler_of(kind, compute)(function, args, kwargs)
