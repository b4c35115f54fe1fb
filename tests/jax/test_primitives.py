"""Every primitive of JAX is listed, with a kind or deliberately without; none stands twice."""

import subprocess
import sys
from itertools import combinations

import jax
import jax.numpy as jnp
import pytest

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
# modules that make primitives of their own when they are imported. In a process of its own: compiling for GPUs and TPUs
# loads others, which stand in kernels alone
NAMES_OF_ALL = """
import sys
import jax.export, jax.scipy.linalg, jax.scipy.special, jax.experimental.sparse, jax.experimental.pallas
from jax.extend.core import Primitive
modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "jax"]
print(*{each.name for module in modules for each in vars(module).values() if isinstance(each, Primitive)})
"""


def test_none_of_jax_s_primitives_is_forgotten() -> None:
    result = subprocess.run([sys.executable, "-c", NAMES_OF_ALL], capture_output=True, text=True, check=True)
    made = set(result.stdout.split())
    assert len(made) > 250
    assert made - primitives.known() == set()


@pytest.mark.parametrize("pair", list(combinations(SETS, 2)), ids="-".join)
def test_none_stands_in_two_lists(pair: tuple[str, str]) -> None:
    assert not SETS[pair[0]] & SETS[pair[1]]


def test_lists_of_some_of_another_list() -> None:
    assert primitives.BOUNDED <= primitives.POINTWISE
    assert primitives.STEEP <= primitives.CURVED <= primitives.POINTWISE
    assert primitives.SUMMED <= primitives.TRACED


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
