"""Parts of a cast model that stay in FP32 by their author's choice: a block of code, a function, a module."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, overload

import torch
from torch import nn

from duotone.errors import PolicyError
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.casting.region import float32_everywhere
from duotone.torch.casting.tracing import not_by_itself
from duotone.torch.nested import cast_floating

Part = TypeVar("Part", bound=Callable[..., Any])

_MARK = "duotone_keep_float32"


@overload
def keep_float32() -> AbstractContextManager[None]: ...
@overload
def keep_float32(part: Part) -> Part: ...
def keep_float32(part: Any = None) -> Any:
    """Keep a block of code, a function or a module in FP32 inside a cast model.

    - `with keep_float32():` every listed operation (`duotone ops`) casts its operands to FP32, 16-bit weights included,
      and gives FP32; operations that are not listed run on what they are given.
    - `@keep_float32` on a function or method: it is so called, on inputs cast to FP32 first.
    - `keep_float32(module)`, before `cast`: the module's weights stay FP32 and it computes in FP32, as under the rule
      `path: param=float32,compute=float32,output=float32`, and after any other rule. Returns the module.

    What comes out is FP32 and stays so.

    Raises:
        PolicyError: the module is cast already, or it is neither a module nor a function.

    >>> x = torch.ones(2, 2, dtype=torch.bfloat16)
    >>> with keep_float32():
    ...     (x @ x).dtype
    torch.float32
    >>> keep_float32(torch.add)(x, x).dtype
    torch.float32
    """
    if part is None:
        return _Block()
    if isinstance(part, type) or not callable(part):
        got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise PolicyError(
            f"keep_float32 takes a module, a function or nothing, not {got:.60}; decorate a class's forward, and for a "
            'path write a rule: "bf16; head: param=float32,compute=float32,output=float32"'
        )
    if isinstance(part, nn.Module):
        if cast_forward_of(part) is not None:
            raise PolicyError(
                f"this {type(part).__name__} is cast already; call keep_float32 before cast, or cast again with a "
                "rule for its path: param=float32,compute=float32,output=float32"
            )
        setattr(part, _MARK, True)
        return part

    @functools.wraps(part)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        with float32_everywhere():
            return part(*cast_floating(args, torch.float32), **cast_floating(kwargs, torch.float32))

    return in_float32


class _Block:
    """A block of code in FP32; as a decorator, the same as `keep_float32` without parentheses."""

    @not_by_itself
    def __enter__(self) -> None:
        self._entered = float32_everywhere()
        self._entered.__enter__()

    @not_by_itself
    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def __call__(self, function: Part) -> Part:
        return keep_float32(function)


def is_kept_in_float32(module: nn.Module) -> bool:
    """Return whether `keep_float32` marks a module."""
    # past a module's own look-up, which is slow where there is nothing
    return module.__dict__.get(_MARK, False)
