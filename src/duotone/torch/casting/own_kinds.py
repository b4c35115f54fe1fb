"""Kinds for operations that the table does not know, or that a part of a model wants otherwise.

    op_rule(function, kind)             a function of one's own, a custom operator, `SomeFunction.apply`: the function
                                        that is returned runs under the kind wherever a cast model calls it
    with op_rule(torch.exp, kind):      a function of torch has another kind in a block of code
    with op_rule({torch.exp: kind}):    several have

"as_given" takes a function out of the table. All of them hold under torch.autocast too.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import torch
from torch.overrides import TorchFunctionMode

from duotone.errors import OperationError
from duotone.operations import Kind, check_kind
from duotone.torch.casting.handlers import handler_of
from duotone.torch.casting.operation_table import Function, functions_like, same_operation
from duotone.torch.casting.region import compute_dtype, no_autocast
from duotone.torch.casting.tracing import not_by_itself
from duotone.torch.casting.widened import operands

Arguments = ParamSpec("Arguments")
Result_co = TypeVar("Result_co", covariant=True)


class Operation(Protocol[Arguments, Result_co]):
    """A function under a kind; of a function of torch it is a context, too."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result_co: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


@overload
def op_rule(function: Mapping[Function, Kind]) -> AbstractContextManager[None]: ...
@overload
def op_rule(function: Callable[Arguments, Result_co], kind: Kind) -> Operation[Arguments, Result_co]: ...
def op_rule(function: Any, kind: Kind | None = None) -> Any:
    """Give an operation a kind inside of cast models: one of your own for good, one of torch's in a block of code.

    - `relative = op_rule(relative, "float32")`: whenever a cast model calls the function that is returned, its operands
      are cast as the kind says, those in tuples and lists too. What `relative` calls itself runs on what it is given.
      Outside of cast models and autocast nothing changes.
    - `with op_rule(torch.exp, "as_given"):` every call of a function of torch in the block, its method and operator
      included, whoever makes it. The innermost block decides. A cast model that is called in the block has its own
      kinds. What is returned may be called as well, which runs that one call under the kind.
    - `with op_rule({torch.exp: "as_given", torch.log: "as_given"}):` the same for several functions.

    Args:
        function: any callable that takes tensors: a Python function, a custom operator, `apply` of a
            `torch.autograd.Function`, a function of torch; or a mapping from functions of torch to kinds.
        kind: `"compute"`, `"float32"`, `"float32_inside"`, `"widest"` or `"as_given"`.

    Raises:
        OperationError: there is no such kind, it is no function, or a function in a mapping is not one of torch's that
            can be intercepted.

    >>> import torch, duotone.torch as dt
    >>> relative = dt.op_rule(lambda x, y: (x - y) / y, "float32")
    >>> class Model(torch.nn.Module):
    ...     def forward(self, x):
    ...         with dt.op_rule(torch.exp, "as_given"):
    ...             inside = x.exp().dtype
    ...         return inside, x.exp().dtype, relative(x, x + 1).dtype
    >>> dt.cast(Model(), "bf16")(torch.ones(2).bfloat16())
    (torch.bfloat16, torch.float32, torch.float32)
    """
    if isinstance(function, Mapping):
        if kind is not None:
            raise OperationError("a mapping given to op_rule holds the kinds itself; leave out the second argument")
        kinds: dict[Function, Kind] = {}
        for each, its_kind in function.items():
            kinds.update(dict.fromkeys(functions_like(each), check_kind(its_kind)))
        return _block(_KindsMode(kinds))
    if isinstance(function, type) or not callable(function):
        raise OperationError(
            f"op_rule takes a function or a mapping from functions to kinds, not {function!r:.60}; give torch.exp, "
            'not its name or a class, or {torch.exp: "float32"}'
        )
    if kind is None:
        raise OperationError('op_rule needs the kind of the function, too: op_rule(function, "float32"), for instance')
    checked = check_kind(kind)
    if getattr(type(function), "__hash__", None) is not None and same_operation().get(function):
        return _OfTorch(function, checked)

    @functools.wraps(function)
    def under_kind(*args: Any, **kwargs: Any) -> Any:
        return _run(checked, function, args, kwargs)

    return under_kind


@contextmanager
def _block(mode: "_KindsMode") -> Iterator[None]:
    with mode:
        yield


class _OfTorch:
    """A function of torch under a kind, and the block in which it has that kind."""

    def __init__(self, function: Function, kind: Kind) -> None:
        self._function = function
        self._kind: Kind = kind
        self._mode = _KindsMode(dict.fromkeys(functions_like(function), kind))
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._kind, self._function, args, kwargs)

    # a mode has no state of its own: blocks may be entered again inside of themselves and in several threads
    @not_by_itself
    def __enter__(self) -> None:
        self._mode.__enter__()

    @not_by_itself
    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)


class _KindsMode(TorchFunctionMode):
    """Runs functions under kinds, whatever the region around says."""

    def __init__(self, kinds: Mapping[Function, Kind]) -> None:
        super().__init__()
        # not a dict: torch.compile does not find tensors' methods in one
        self._kinds = tuple(kinds.items())

    @not_by_itself
    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for function, kind in self._kinds:
            if func is function:
                return _run(kind, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _run(kind: Kind, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    first = next(iter(operands((args, tuple(kwargs.values())))), None)
    compute = None if first is None else compute_dtype(first.device.type)
    if first is None or compute is None:
        return function(*args, **kwargs)
    # where everything is widened, another dtype than FP32 is what ends that
    ended = torch.autocast(first.device.type, torch.bfloat16, enabled=False)
    with ended if compute == torch.float32 else no_autocast(first.device.type):
        return handler_of(kind, compute)(function, args, kwargs)
