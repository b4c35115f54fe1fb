"""The example of a GPT: it learns in every precision, and in all of them the same."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from duotone.corpus import Corpus, standard_library

_PATH = Path(__file__).parents[2] / "examples" / "jax_gpt.py"
_SPEC = importlib.util.spec_from_file_location("jax_gpt", _PATH)
jax_gpt = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(jax_gpt)

TINY = jax_gpt.Size(layers=1, heads=2, width=16, context=8, windows=8, steps=30, learning_rate=1e-2)


def text():
    """Return a text that is learned at once: digits that count up."""
    counting = (np.arange(5000) % 10).astype(np.uint8)
    return Corpus(counting, counting, files=1)


def dtypes_of_products(program):
    """Return the formats of what a program multiplies, in the programs inside of it too."""
    found = set()
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            found |= {operand.aval.dtype.name for operand in equation.invars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda each: hasattr(each, "eqns")):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                found |= dtypes_of_products(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("fp16", "float16"),
        pytest.param("fp32", "float32", marks=pytest.mark.slow),
        pytest.param("bf16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_step_multiplies_in_the_format_that_was_asked_for(policy, dtype):
    model, optimizer, loss_fn = jax_gpt.prepare(policy, TINY)
    definition, state = nnx.split((model, optimizer))

    def step(state, windows):
        return jax_gpt.step(loss_fn, *nnx.merge(definition, state), windows)

    program = jax.make_jaxpr(step)(state, next(jax_gpt.batches(text().train, TINY, 0)))
    assert dtypes_of_products(program.jaxpr) == {dtype}
    assert [result.dtype.name for result in program.out_avals] == ["float32"]


@pytest.mark.slow
def test_a_tiny_one_learns_as_in_fp32():
    expected, expected_held_out = jax_gpt.train("fp32", TINY, text())
    assert max(expected[-1], expected_held_out) < 0.3 * expected[0]
    for policy in ("bf16", "fp16"):
        losses, held_out = jax_gpt.train(policy, TINY, text())
        np.testing.assert_allclose([*losses, held_out], [*expected, expected_held_out], rtol=1e-2)


@pytest.mark.slow
def test_at_its_default_length_all_precisions_end_within_a_hundredth_of_each_other():
    found = [jax_gpt.train(policy, jax_gpt.Size(), standard_library())[1] for policy in ("fp32", "bf16", "fp16")]
    assert max(found) <= 1.01 * min(found)
    # far below what a byte's frequency alone gives
    assert max(found) < 2.5
