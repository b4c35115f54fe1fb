"""Where the first value that is not finite arises in a forward pass: the operation, the module, and the line of code.

A search waits for the next calls of modules, whoever makes them. A value has arisen in a function if its result is not
finite and everything that it was given is; so a mask's -Inf has not. Checking each result waits for the device, so a
search is for a run that is about to end. Left out: what is computed outside of modules, and in a backward pass.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name

from duotone.torch.internals.compiler import is_loaded, written_path
from duotone.torch.nested import tensors_in
from duotone.torch.watching.callers import find_caller

# give memory as it happens to be
_UNSET = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
# outermost calls of modules that a search waits for
_CALLS = 8


class NonFiniteSearch:
    """A search for what is not finite, from now on until something is found or `end` is called.

    Attributes:
        found: what was found, as the end of a sentence; None for nothing yet.

    >>> search = NonFiniteSearch()
    >>> _ = nn.Linear(2, 2)(torch.full((1, 2), torch.inf))
    >>> search.end()
    'an input of Linear is not finite'
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self._calls = 0
        self._running: list[nn.Module] = []
        self._paths: dict[nn.Module, str] = {}
        self._names: dict[int, str] = {}
        self._entered = ExitStack()
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def end(self) -> str | None:
        """Stop, and return what was found."""
        self._entered.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return self.found

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if len(self._running) > 1 or self.found is not None:
            return
        self._paths = {each: written_path(path) for path, each in module.named_modules()}
        self._names = {id(param): name for name, param in module.named_parameters()}
        if not all(map(_is_finite, tensors_in(args))):
            self.found = f"an input of {type(module).__name__} is not finite"
            return
        if is_loaded():
            self._entered.enter_context(torch.compiler.set_stance("force_eager"))
        self._entered.enter_context(_Results(self))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._running:
            self._running.pop()
        if not self._running:
            self._entered.close()
            self._calls += 1
            if self.found is not None or self._calls >= _CALLS:
                self.end()

    def take(self, func: Callable[..., Any], given: Sequence[Tensor]) -> None:
        """Take a function whose result is not finite: it is found if all that it was given is."""
        named = [self._names[id(each)] for each in given if id(each) in self._names and not _is_finite(each)]
        if named:
            self.found = f'the weight "{named[0]}" is not finite'
        elif all(map(_is_finite, given)):
            path = self._paths.get(self._running[-1], "") if self._running else ""
            caller = find_caller(func, None)
            # a function that Duotone carries out with others is the one that was asked for
            asked = caller.handler_func or func
            name = resolve_name(asked) or getattr(asked, "__name__", "a function")
            self.found = f"the first such value arises in {name}" + (f' in module "{path}"' if path else "")
            self.found += f" at {caller.source_line}" if caller.source_line else ""


class _Results(TorchFunctionMode):
    """Looks at the results of functions."""

    def __init__(self, search: NonFiniteSearch) -> None:
        super().__init__()
        self._search = search

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._search.found is not None or name in _UNSET or _has_non_finite_number((args, kwargs)):
            return func(*args, **kwargs)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        is_written = in_place and bool(args) and isinstance(args[0], Tensor)
        was_finite = not is_written or _is_finite(args[0])
        result = func(*args, **kwargs)
        results = [args[0]] if is_written else list(tensors_in(result))
        if was_finite and not all(map(_is_finite, results)):
            given = tensors_in((args, kwargs))
            self._search.take(func, [each for each in given if not is_written or each is not args[0]])
        return result


def _is_finite(tensor: Tensor) -> bool:
    with torch.no_grad():
        is_checked = tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_meta
        return not is_checked or bool(tensor.detach().isfinite().all())


def _has_non_finite_number(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(_has_non_finite_number, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_non_finite_number, value))
