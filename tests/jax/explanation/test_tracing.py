"""What `explain` sees of a program: dtypes, casts and whose they are, scopes, loops, what is saved; and bad input."""

import json
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import duotone.jax as dj
from duotone.errors import ExplainError, PolicyError

from .models import block_weights, shape, stack


def dense(weight: jax.Array, x: jax.Array) -> jax.Array:
    with jax.named_scope("dense"):
        return jnp.sum(jnp.tanh(x @ weight), axis=-1) @ jnp.ones(2)


WEIGHT, X = shape(8, 4), shape(2, 8)


def casts(found) -> set[tuple]:
    names = "from_dtype", "to_dtype", "by", "operation", "calls", "result_bytes"
    return {tuple(getattr(each, name) for name in names) for each in found.casts}


def test_dtypes_by_scope_and_primitive():
    found = dj.explain(dense, WEIGHT, X, policy="bf16")
    assert [(each.name, each.compute_dtype, each.output_dtype, each.modules) for each in found.operations] == [
        ("dot_general", "bfloat16", "bfloat16", {"dense": 2}),
        # FP32 wherever all that it feeds is
        ("tanh", "float32", "float32", {"dense": 1}),
        ("reduce_sum", "float32", "float32", {"dense": 1}),
    ]
    assert [(each.path, each.equations, each.compute_dtypes) for each in found.scopes] == [
        ("dense", 4, ("bfloat16", "float32"))
    ]
    assert found.operations[0].source_lines[0].endswith(f"test_tracing.py:{dense.__code__.co_firstlineno + 2}")


def test_casts_of_the_policy_and_what_they_are_for():
    found = dj.explain(dense, WEIGHT, X, policy="bf16")
    assert casts(found) == {
        # the weight, x, the sums and the ones; what the products give
        ("float32", "bfloat16", "duotone", "dot_general", 4, 2 * (32 + 16 + 2 + 2)),
        ("bfloat16", "float32", "duotone", "tanh", 1, 4 * 8),
        ("bfloat16", "float32", "duotone", None, 1, 4),
    }


def test_casts_of_the_code_are_the_codes():
    def own(weight, x):
        return (x.astype(jnp.bfloat16).astype(jnp.float32) * 2).sum() + (x @ weight).sum()

    found = dj.explain(own, WEIGHT, X, policy="bf16")
    assert Counter(each.by for each in found.casts)["model"] == 2
    assert {each.operation for each in found.casts if each.by == "model"} == {"astype"}
    under_none = dj.explain(own, WEIGHT, X)
    assert {each.by for each in under_none.casts} == {"model"}
    assert under_none.policy is None


def test_what_is_explained_is_what_runs():
    by_policy = dj.explain(dense, WEIGHT, X, policy="bf16")
    under = dj.autocast(dense, "bf16")
    assert dj.explain(under, WEIGHT, X) == by_policy
    assert dj.explain(jax.jit(under), WEIGHT, X).casts == by_policy.casts
    assert dj.explain(nnx.jit(under), WEIGHT, X).policy == dj.explain(eqx.filter_jit(under), WEIGHT, X).policy == "bf16"
    # arrays are as good as shapes, by name as by position
    assert dj.explain(under, jnp.ones((8, 4)), x=jnp.ones((2, 8))).operations == by_policy.operations


def test_nothing_is_computed():
    def fails(weight, x):
        jax.debug.callback(lambda _: pytest.fail("it ran"), x)
        return dense(weight, x)

    dj.explain(fails, jnp.ones((8, 4)), jnp.ones((2, 8)), policy="bf16")
    # terabytes, of which there are none
    huge = dj.explain(dense, shape(2**20, 2**20), shape(2, 2**20), policy="bf16")
    assert huge.casts[0].result_bytes > 2**41


def test_a_scan_counts_as_often_as_it_runs():
    def looped(weights, x):
        return lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0].sum()

    found = dj.explain(looped, shape(5, 8, 8), X, policy="bf16")
    assert {each.name: each.calls for each in found.operations}["dot_general"] == 5
    weights = next(each for each in found.casts if each.operation == "dot_general")
    assert weights.calls >= 5
    assert weights.result_bytes >= 5 * 64 * 2


def test_programs_inside_programs():
    def nested(weight, x):
        inner = jax.jit(jax.checkpoint(lambda x: jnp.tanh(x @ weight)))
        return lax.cond(x[0, 0] > 0, inner, lambda x: x @ weight, x).sum()

    found = dj.explain(nested, shape(8, 8), X, policy="bf16")
    assert sum(each.calls for each in found.operations if each.name == "dot_general") == 2


def residuals(found) -> set[tuple[str, str, int]]:
    return {(each.dtype, each.origin, each.result_bytes) for each in found.residuals}


def test_residuals_are_what_the_gradient_by_the_weights_keeps():
    def f(weight, x):
        return jnp.sum(jnp.sin(x @ weight))

    found = dj.explain(f, WEIGHT, X)
    # the gradient by the weight takes x and a cosine; that by x, which nobody asks for, would take the weight
    assert residuals(found) == {("float32", "argument x", 64), ("float32", "cos", 32)}
    assert found.saved_for_backward.activation_bytes == {"float32": 96}
    by_both = dj.explain(f, WEIGHT, X, argnums=(0, 1))
    assert by_both.saved_for_backward.parameter_bytes == {"float32": 128 + 64}
    assert by_both.saved_for_backward.activation_bytes == {"float32": 32}


def test_a_cast_to_float32_and_back_is_none():
    def f(weight, x):
        return jnp.sum(jnp.sin(x @ weight))

    narrow = shape(8, 4, dtype="bfloat16")
    found = dj.explain(f, narrow, X, policy="bf16", argnums=(0, 1))
    # a 16-bit weight is traced in FP32, and multiplied as it came: casts are of x and of the product's result
    assert {(each.from_dtype, each.to_dtype, each.result_bytes) for each in found.casts} == {
        ("float32", "bfloat16", 32),
        ("bfloat16", "float32", 32),
    }
    assert found.saved_for_backward.parameter_bytes["bfloat16"] == 64


def test_residuals_have_names_scopes_and_lines():
    def named(weights, x):
        with jax.named_scope("outer"):
            hidden = checkpoint_name(jnp.exp(x @ weights["in"]), "hidden")
        return (hidden @ weights["out"]).sum()

    found = dj.explain(dj.autocast(named, "bf16", save="everything"), {"in": WEIGHT, "out": shape(4, 3)}, X)
    (each,) = [each for each in found.residuals if "hidden" in each.origin and each.dtype == "bfloat16"]
    assert each.origin == 'cast of name "hidden"'
    assert {each.origin for each in found.residuals if each.scope == "outer"}
    assert any(each.origin == "cast of argument weights.out" for each in found.residuals)


def test_residuals_of_a_loop_are_traced_into_it():
    def looped(weights, x):
        return lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, weights)[0].sum()

    found = dj.explain(looped, shape(5, 8, 8), X)
    assert ("float32", "cos", 5 * 16 * 4) in residuals(found)


def test_an_auxiliary_result_is_not_differentiated():
    def with_aux(weight, x):
        return (x @ weight).sum(), jnp.exp(x @ weight)

    assert "exp" not in {each.origin for each in dj.explain(with_aux, WEIGHT, X, has_aux=True).residuals}
    assert "exp" in {each.origin for each in dj.explain(with_aux, WEIGHT, X).residuals}


def test_scopes_that_are_alike_are_one_row():
    found = dj.explain(stack, [block_weights() for _ in range(3)], shape(8, 16), policy="bf16")
    assert [each.path for each in found.scopes][:3] == ["block_0", "block_0.norm", "block_0.mlp"]
    text = str(found)
    assert "block_* (3)" in text
    assert "block_1" not in text
    assert json.loads(found.to_json())["scopes"][3]["path"] == "block_1"
    # what is inside counts as theirs
    (row,) = [row for row in found.tables(depth=1)[0].rows if row[0].startswith("block")]
    assert int(row[1]) == sum(each.equations for each in found.scopes)


def test_it_shows_itself():
    found = dj.explain(dense, WEIGHT, X, policy="bf16")
    header = "dense under bf16, 4 floating-point equations, traced and not run"
    assert str(found).startswith(f"{header}\n\nWhat stands out\n- ")
    assert [table.title for table in found.tables()] == [
        "Scopes",
        "Operations",
        "Casts",
        "Saved for the backward pass",
        "Residuals",
    ]
    assert found._repr_html_().count("<details>") == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dj.explain(3), "got 3 to explain; give a function"),
        (lambda: dj.explain(dj.autocast(dense, "bf16"), WEIGHT, X, policy="fp16"), 'is under policy "bf16" already'),
        (
            lambda: dj.explain(jax.grad(dj.autocast(dense, "bf16")), WEIGHT, X),
            "such as its gradient; give explain what",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ExplainError, match=message):
        call()


def test_a_policy_that_jax_cannot_have():
    with pytest.raises(PolicyError, match="JAX has no"):
        dj.explain(dense, WEIGHT, X, policy="bf16,rounding=stochastic,master=none")


def test_a_loop_that_works_with_float32_weights_alone_is_explained():
    def layers(weights, x):
        start = x.astype(weights.dtype)
        return lax.scan(lambda h, w: (h + jnp.float32(1) * (h @ w), None), start, weights)[0].sum()

    weights = jax.ShapeDtypeStruct((2, 4, 4), jnp.bfloat16)
    with pytest.raises(TypeError, match="carry"):
        jax.eval_shape(layers, weights, shape(3, 4))
    found = dj.explain(layers, weights, shape(3, 4), policy="bf16")
    assert [each.name for each in found.operations if each.compute_dtype == "bfloat16"][:1] == ["dot_general"]
