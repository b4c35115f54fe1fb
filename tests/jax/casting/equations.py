"""What tests of autocast ask of a traced program: which dtypes its equations have, whatever they are nested in."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0)
WEIGHT = jax.random.normal(KEY, (8, 8)) * 0.3
X = jax.random.normal(jax.random.key(1), (5, 8))


def equations(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return all equations of a function's program, those of inner programs too."""
    return list(all_equations(jax.make_jaxpr(function)(*args)))


def all_equations(program: Any) -> Iterator[Any]:
    """Yield the equations of a program, and those of inner programs."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(each, "jaxpr", each), "eqns"):
                    yield from all_equations(each)


def operand_dtypes(function: Callable[..., Any], *args: Any, of: str = "dot_general") -> list[str]:
    """Return the dtype of the first operand of each equation of a primitive."""
    return [str(each.invars[0].aval.dtype) for each in equations(function, *args) if each.primitive.name == of]


def result_dtypes(function: Callable[..., Any], *args: Any, of: str = "dot_general") -> list[str]:
    """Return the dtype of the first result of each equation of a primitive."""
    return [str(each.outvars[0].aval.dtype) for each in equations(function, *args) if each.primitive.name == of]


def counted(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Return how many equations of each primitive there are."""
    return Counter(each.primitive.name for each in equations(function, *args))


def assert_near(found: Any, expected: Any, share: float = 0.02) -> None:
    """Assert that arrays differ by at most a share of the largest expected element."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


def cosine(found: Any, expected: Any) -> float:
    """Return the cosine of the angle between two arrays."""
    found, expected = np.asarray(found, np.float64).ravel(), np.asarray(expected, np.float64).ravel()
    return float(found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)))


def bits(array: Any) -> Any:
    """Return an array's bit patterns."""
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


HALVES = {"bf16": jnp.dtype("bfloat16"), "fp16": jnp.dtype("float16")}
