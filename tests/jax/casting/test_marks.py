"""Parts that stay FP32 and operations with other kinds: rules by named scope, keep_float32, op_rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj
from duotone.errors import OperationError, PolicyError

from .equations import WEIGHT, X, bits, counted, operand_dtypes, result_dtypes

HEAD = "bf16; head: param=float32,compute=float32,output=float32"


def scoped(weight, x):
    hidden = x @ weight
    with jax.named_scope("head"):
        return hidden @ weight


def test_a_rule_keeps_a_scope_in_fp32() -> None:
    assert operand_dtypes(dj.autocast(scoped, HEAD), WEIGHT, X) == ["bfloat16", "float32"]
    assert operand_dtypes(dj.autocast(scoped, "bf16"), WEIGHT, X) == ["bfloat16"] * 2


@pytest.mark.parametrize(
    "around",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: lambda w, x: jax.lax.scan(lambda c, a: (c, f(w, a)), 0, x)[1],
        lambda f: lambda w, x: jax.lax.cond(x.sum() > 0, f, f, w, x),
        lambda f: lambda w, x: jax.grad(lambda w: f(w, x).sum())(w),
    ],
    ids=["jit", "checkpoint", "vmap", "scan", "cond", "grad"],
)
def test_a_rule_holds_inside_of_transforms(around) -> None:
    def head(weight, x):
        with jax.named_scope("head"):
            return jnp.tanh(x @ weight)

    found = operand_dtypes(dj.autocast(around(head), HEAD), WEIGHT, X)
    assert set(found) == {"float32"}
    around_scope = dj.autocast(jax.named_scope("head")(around(lambda w, x: x @ w)), HEAD)
    assert set(operand_dtypes(around_scope, WEIGHT, X)) == {"float32"}


@pytest.mark.parametrize("make", [dj.keep_float32, dj.keep_float32()], ids=["bare", "called"])
def test_keep_float32_on_a_function(make) -> None:
    @make
    def score(x):
        return x @ x.T

    fast = dj.autocast(lambda weight, x: score(x @ weight), "bf16")
    assert operand_dtypes(fast, WEIGHT, X) == ["bfloat16", "float32"]
    assert np.array_equal(bits(score(X)), bits(X @ X.T))
    # the gradient of the part is FP32, too
    assert operand_dtypes(jax.grad(lambda w, x: fast(w, x).sum()), WEIGHT, X).count("float32") == 3


def test_keep_float32_widens_what_16_bit_code_gives_it() -> None:
    fast = dj.autocast(lambda weight, x: dj.keep_float32(lambda a: a * 1.5)(x @ weight), "bf16")
    assert result_dtypes(fast, WEIGHT, X, of="mul") == ["float32"]


def test_keep_float32_as_a_block() -> None:
    def forward(weight, x):
        hidden = x @ weight
        with dj.keep_float32():
            hidden = hidden @ weight
        return hidden @ weight

    assert operand_dtypes(dj.autocast(forward, "bf16"), WEIGHT, X) == ["bfloat16", "float32", "bfloat16"]
    assert counted(forward, WEIGHT, X) == {"dot_general": 3}


def test_marks_are_no_scopes_of_a_rule() -> None:
    def forward(weight, x):
        with dj.keep_float32(), jax.named_scope("head"):
            return x @ weight

    fast = dj.autocast(forward, "bf16; head: param=float32,compute=float32")
    assert operand_dtypes(fast, WEIGHT, X) == ["float32"]


@pytest.mark.parametrize(
    ("kind", "operands", "result"),
    [
        ("float32", "float32", "float32"),
        ("float32_inside", "float32", "bfloat16"),
        ("compute", "bfloat16", "bfloat16"),
        ("widest", "bfloat16", "bfloat16"),
        ("as_given", "bfloat16", "bfloat16"),
    ],
)
def test_op_rule_of_a_function(kind: str, operands: str, result: str) -> None:
    own = dj.op_rule(lambda a: jnp.exp(a * 0.5), kind)  # type: ignore[arg-type]
    fast = dj.autocast(lambda weight, x: own(x @ weight) * (x @ weight), "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="exp") == [operands]
    assert result_dtypes(fast, WEIGHT, X, of="mul")[-1] == result
    assert np.array_equal(bits(own(X)), bits(jnp.exp(X * 0.5)))


def test_op_rule_widest_of_held_and_16_bit_operands() -> None:
    own = dj.op_rule(lambda a, b: a @ b, "widest")
    assert operand_dtypes(dj.autocast(lambda w, x: own(x.T, x @ w), "bf16"), WEIGHT, X)[1] == "float32"
    assert operand_dtypes(dj.autocast(lambda w, x: own((x @ w).T, x @ w), "bf16"), WEIGHT, X)[2] == "bfloat16"


def test_op_rule_is_differentiable_and_maps_over_batches() -> None:
    own = dj.op_rule(lambda a: jnp.exp(a * 0.5), "float32_inside")
    loss = dj.autocast(lambda weight, x: own(x @ weight).sum(), "bf16")
    expected = jax.grad(lambda weight, x: jnp.exp(0.5 * (x @ weight)).sum())(WEIGHT, X)
    assert np.allclose(jax.grad(loss)(WEIGHT, X), expected, rtol=0.1, atol=0.1)
    assert np.allclose(jax.vmap(jax.grad(loss), (None, 0))(WEIGHT, X).sum(0), expected, rtol=0.1, atol=0.1)
    assert np.allclose(jax.grad(lambda w: jax.jvp(loss, (w, X), (w, X))[1])(WEIGHT).shape, (8, 8))


def test_op_rule_of_a_primitive_in_a_block() -> None:
    def forward(weight, x):
        hidden = x @ weight
        with dj.op_rule("exp", "as_given"):
            inside = jnp.exp(hidden)
            with dj.op_rule({jax.lax.exp_p: "float32", "log": "as_given"}):
                innermost = jnp.exp(hidden)
        return inside, innermost, jnp.exp(hidden)

    found = operand_dtypes(dj.autocast(forward, "bf16"), WEIGHT, X, of="exp")
    assert found == ["bfloat16", "float32", "float32"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dj.op_rule(jnp.exp, "fp32"), 'an operation cannot be "fp32"'),
        (lambda: dj.op_rule(jnp.exp), "op_rule needs the kind"),
        (lambda: dj.op_rule("expp", "float32"), r"autocast gives no kind to a primitive 'expp'; did you mean exp"),
        (lambda: dj.op_rule(3, "float32"), "op_rule takes a function or the name of a primitive"),
        (lambda: dj.op_rule({"exp": "float32"}, "float32"), "holds the kinds itself"),
    ],
)
def test_what_op_rule_cannot_take(call, sentence: str) -> None:
    with pytest.raises(OperationError, match=sentence):
        call()


def test_what_keep_float32_cannot_take() -> None:
    with pytest.raises(PolicyError, match="keep_float32 takes a function of JAX arrays, not 3"):
        dj.keep_float32(3)  # type: ignore[type-var]
