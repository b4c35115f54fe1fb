"""Parts of a function that stay in FP32 by their author's choice: a block of code, or a function."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, overload

from duotone.errors import PolicyError
from duotone.jax.casting import marks
from duotone.jax.casting.op_rule import crossed

Part = TypeVar("Part", bound=Callable[..., Any])


@overload
def keep_float32() -> AbstractContextManager[None]: ...
@overload
def keep_float32(part: Part) -> Part: ...
def keep_float32(part: Any = None) -> Any:
    """Keep a block of code or a function in FP32 under `autocast`.

    - `with keep_float32():` every operation that has a kind (`duotone ops`) casts its operands to FP32, and gives FP32;
      what only moves elements gives what it is given.
    - `@keep_float32` on a function or method: it is so called, on arrays cast to FP32 first.

    What comes out is FP32 and stays so. Outside of `autocast` nothing changes. It holds under every transform, for the
    gradient of the part, too.

    Raises:
        PolicyError: it is no function.

    >>> import jax.numpy as jnp, duotone.jax as dj
    >>> @dj.keep_float32
    ... def gram(x):
    ...     return x @ x.T
    >>> forward = dj.autocast(lambda weight, x: gram(x @ weight), "bf16")
    >>> float(forward(jnp.full((1, 1), 1.0), jnp.full((1, 1), 1 + 2**-7))[0, 0]) == (1 + 2**-7) ** 2
    True
    """
    if part is None:
        return _Block()
    if isinstance(part, type) or not callable(part):
        raise PolicyError(
            f"keep_float32 takes a function of JAX arrays, not {part!r:.60}; write a rule for a part of a "
            'model, such as "bf16; head: compute=float32,param=float32", or `with dj.keep_float32():`'
        )

    @functools.wraps(part)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = crossed((args, kwargs), "float32")
        with marks.float32_scope():
            return part(*args, **kwargs)

    return in_float32


class _Block:
    """A block of code in FP32; as a decorator, the same as `keep_float32` without parentheses."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        scope = marks.float32_scope()
        scope.__enter__()
        self._entered.append(scope)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def __call__(self, function: Part) -> Part:
        return keep_float32(function)
