"""Every primitive of JAX is listed, with a kind or deliberately without; none stands twice."""

import importlib
import sys
from itertools import combinations

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from duotone.jax import primitives

SETS = {
    "families": frozenset(primitives.kinds()),
    "moves": primitives.MOVES,
    "pointwise": primitives.POINTWISE,
    "comparisons": primitives.COMPARISONS,
    "programs": primitives.PROGRAMS,
    "traced": primitives.TRACED,
    "integer": primitives.INTEGER,
}
# modules that make primitives of their own when they are imported
MODULES = ("jax.export", "jax.scipy.linalg", "jax.scipy.special", "jax.experimental.sparse", "jax.experimental.pallas")


def test_none_of_jax_s_primitives_is_forgotten() -> None:
    for name in MODULES:
        importlib.import_module(name)
    made = {
        each.name
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "jax"
        for each in vars(module).values()
        if isinstance(each, Primitive)
    }
    assert len(made) > 250
    assert made - primitives.known() == set()


@pytest.mark.parametrize("pair", list(combinations(SETS, 2)), ids="-".join)
def test_none_stands_in_two_lists(pair: tuple[str, str]) -> None:
    assert not SETS[pair[0]] & SETS[pair[1]]


def test_what_is_bounded_is_pointwise() -> None:
    assert primitives.BOUNDED <= primitives.POINTWISE


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jnp.exp, "exp"),
        (jnp.log1p, "log1p"),
        (jnp.sum, "reduce_sum"),
        (jnp.cumsum, "cumsum"),
        (lambda x: x**2, "integer_pow"),
        (jnp.tan, "tan"),
        (jax.lax.rsqrt, "rsqrt"),
    ],
)
def test_names_are_those_that_programs_have(function, name: str) -> None:
    program = jax.make_jaxpr(function)(jnp.ones(3))
    assert name in str(program) or (name == "integer_pow" and "square" in str(program))
    assert primitives.kinds()[name] == "float32"
