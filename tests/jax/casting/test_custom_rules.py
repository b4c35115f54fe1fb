"""Functions with derivatives of their own: the user's rule holds, products in it are 16-bit, what it saves is too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj

from .equations import HALVES, WEIGHT, X, assert_near, bits, equations, operand_dtypes


def residual_dtypes(function, *args) -> list[str]:
    """Return the dtypes of what a function saves for its backward pass, arguments left out."""
    _, backward = jax.vjp(function, *args)
    return [str(each.dtype) for each in jax.tree.leaves(backward) if each.shape == (5, 8)]


def test_the_gradient_of_relu_at_zero_is_zero() -> None:
    fast = dj.autocast(lambda weight, x: jax.nn.relu(x @ weight).sum(), "bf16")
    assert not jax.grad(fast)(jnp.zeros((8, 8)), X).any()


def test_relu_of_16_bits_gives_16_bits() -> None:
    fast = dj.autocast(lambda weight, x: jax.nn.relu(x @ weight) * (x @ weight), "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="max") == ["bfloat16"]
    assert operand_dtypes(fast, WEIGHT, X, of="mul") == ["bfloat16"]


def test_softplus_gives_fp32_that_stays() -> None:
    fast = dj.autocast(lambda weight, x: jax.nn.softplus(x @ weight) * (x @ weight), "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="mul")[-1] == "float32"
    assert set(operand_dtypes(fast, WEIGHT, X, of="exp")) == {"float32"}


@jax.custom_jvp
def doubled_tangent(weight, x):
    return x @ weight


@doubled_tangent.defjvp
def _doubled_tangent_jvp(primals, tangents):
    (weight, x), (weight_dot, x_dot) = primals, tangents
    return x @ weight, 2 * (x @ weight_dot + x_dot @ weight)


@pytest.mark.parametrize("policy", HALVES)
def test_custom_jvp_with_products_inside(policy: str) -> None:
    def loss(weight, x):
        return doubled_tangent(weight, x).sum()

    fast = dj.autocast(loss, policy)
    assert set(operand_dtypes(jax.grad(fast), WEIGHT, X)) == {HALVES[policy].name}
    assert_near(jax.grad(fast)(WEIGHT, X), jax.grad(loss)(WEIGHT, X))
    assert_near(jax.jvp(fast, (WEIGHT, X), (WEIGHT, X))[1], jax.jvp(loss, (WEIGHT, X), (WEIGHT, X))[1])
    hessian = jax.jvp(jax.grad(fast), (WEIGHT, X), (WEIGHT, X))[1]
    assert_near(hessian, jax.jvp(jax.grad(loss), (WEIGHT, X), (WEIGHT, X))[1])


def test_custom_jvp_with_symbolic_zeros() -> None:
    seen = []

    @jax.custom_jvp
    def scale(a, b):
        return a * b

    def rule(primals, tangents):
        seen.append([type(each).__name__ for each in tangents])
        a, b = primals
        return a * b, tangents[0] * b * 3

    scale.defjvp(rule, symbolic_zeros=True)
    fast = dj.autocast(lambda weight, x: scale(x @ weight, jnp.float32(2.0)).sum(), "bf16")
    assert_near(jax.grad(fast)(WEIGHT, X), 3 * jax.grad(lambda w, x: (2 * (x @ w)).sum())(WEIGHT, X))
    assert seen[-1][1] == "SymbolicZero"


def test_custom_jvp_in_a_jit_in_a_loop_under_vmap() -> None:
    def loss(weight, x):
        return jax.lax.scan(lambda h, w: (jax.jit(doubled_tangent)(w, h), None), x, jnp.stack([weight] * 2))[0].sum()

    fast = jax.vmap(jax.grad(dj.autocast(loss, "bf16")), (None, 0))
    assert_near(fast(WEIGHT, X[:, None]), jax.vmap(jax.grad(loss), (None, 0))(WEIGHT, X[:, None]), 0.03)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(weight, x, times):
    return x @ weight * times


def _product_forward(weight, x, times):
    return x @ weight * times, (weight, x)


def _product_backward(times, saved, gradient):
    weight, x = saved
    return x.T @ gradient * times * 100, gradient @ weight.T * times


product.defvjp(_product_forward, _product_backward)


@pytest.mark.parametrize("policy", HALVES)
def test_custom_vjp_keeps_its_rule(policy: str) -> None:
    def loss(weight, x):
        return product(weight, product(weight, x, 1), 3).sum()

    fast = dj.autocast(loss, policy, save="everything")
    assert operand_dtypes(jax.grad(fast), WEIGHT, X) == [HALVES[policy].name] * 6
    assert_near(jax.grad(fast)(WEIGHT, X), jax.grad(loss)(WEIGHT, X))
    assert_near(jax.jit(jax.vmap(jax.grad(fast), (None, 0)))(WEIGHT, X[:, None]).sum(0), jax.grad(loss)(WEIGHT, X))
    # the data, and the inner result, which the outer call saves
    assert sorted(residual_dtypes(lambda w: fast(w, X), WEIGHT)) == [HALVES[policy].name, "float32"]


def test_custom_vjp_of_16_bit_weights() -> None:
    fast = dj.autocast(lambda weight, x: product(weight, x, 3).sum(), "bf16")
    narrow = WEIGHT.astype(jnp.bfloat16)
    gradient = jax.grad(fast)(narrow, X)
    assert gradient.dtype == jnp.bfloat16
    expected = jax.grad(fast)(narrow.astype(jnp.float32), X)
    assert np.array_equal(bits(gradient), bits(expected.astype(jnp.bfloat16)))


def test_custom_vjp_with_integers_none_and_what_it_closes_over() -> None:
    def loss(weight, x, index):
        scale = weight.sum() * 0 + 2.0

        @jax.custom_vjp
        def take(a, rows):
            return a[rows] * jax.lax.stop_gradient(jnp.float32(2.0))

        def backward(rows, gradient):
            return jnp.zeros((5, 8)).at[rows].add(gradient * 2.0), None

        take.defvjp(lambda a, rows: (a[rows] * 2.0, rows), backward)
        return (take(x @ weight, index) * scale).sum()

    index = jnp.array([0, 3, 3])
    fast = dj.autocast(loss, "bf16")
    assert_near(jax.grad(fast)(WEIGHT, X, index), jax.grad(loss)(WEIGHT, X, index))


def test_custom_vjp_with_symbolic_zeros() -> None:
    @jax.custom_vjp
    def two(a):
        return a * 2.0, a * 3.0

    def forward(a):
        return (a.value * 2.0, a.value * 3.0), None

    def backward(_, gradients):
        first, second = gradients
        assert type(second).__name__ == "SymbolicZero"
        return (first * 7.0,)

    two.defvjp(forward, backward, symbolic_zeros=True)

    def loss(weight, x):
        return two(x @ weight)[0].sum()

    assert_near(jax.grad(dj.autocast(loss, "bf16"))(WEIGHT, X), jax.grad(loss)(WEIGHT, X))


def test_custom_vjp_with_constants_that_saves_its_input() -> None:
    shift = jnp.linspace(1, 2, 8)

    @jax.custom_vjp
    def shifted(a):
        return a * shift

    # what it saves is what it was given, beside the constant that it closes over
    shifted.defvjp(lambda a: (a * shift, a), lambda a, gradient: (gradient * shift + 0 * a,))

    def loss(weight, x):
        return shifted(x @ weight).sum()

    assert_near(jax.grad(dj.autocast(loss, "bf16"))(WEIGHT, X), jax.grad(loss)(WEIGHT, X))


@pytest.mark.slow
def test_a_library_s_custom_vjp_with_constants() -> None:
    from jax.experimental.ode import odeint

    def loss(weight, x):
        return odeint(lambda y, t: -y, x @ weight, jnp.linspace(0.0, 1.0, 3))[-1].sum()

    assert_near(jax.grad(dj.autocast(loss, "bf16"))(WEIGHT, X), jax.grad(loss)(WEIGHT, X))


def test_checkpoints_keep_their_policies_and_their_place_in_a_gradient() -> None:
    policy = jax.checkpoint_policies.dots_saveable

    def loss(weight, x):
        return jax.checkpoint(lambda a: jnp.tanh(jnp.exp(a @ weight * 0.1) @ weight), policy=policy)(x).sum()

    outside, inside = jax.grad(dj.autocast(loss, "bf16")), dj.autocast(jax.grad(loss), "bf16")
    for found in (outside, inside):
        assert set(operand_dtypes(found, WEIGHT, X)) == {"bfloat16"}
        assert_near(found(WEIGHT, X), jax.grad(loss)(WEIGHT, X))
    # a checkpoint that is differentiated already stays one, or XLA would keep all that it computes
    marked = [each.params["differentiated"] for each in equations(inside, WEIGHT, X) if each.primitive.name == "remat2"]
    assert True in marked
    again = jax.grad(jax.checkpoint(dj.autocast(loss, "bf16")))
    assert_near(again(WEIGHT, X), outside(WEIGHT, X), 1e-3)


def test_a_checkpoint_saves_16_bit_weights_as_they_are() -> None:
    fast = dj.autocast(lambda weight, x: jax.checkpoint(lambda a: jnp.tanh(a @ weight))(x).sum(), "bf16")
    (region,) = [
        each
        for each in equations(fast, WEIGHT.astype(jnp.bfloat16), X)
        if each.primitive.name == "remat2"
        and any(inner.primitive.name == "dot_general" for inner in each.params["jaxpr"].eqns)
    ]
    assert sorted(str(each.aval.dtype) for each in region.invars) == ["bfloat16", "float32"]


def test_custom_jvp_with_integer_operands_and_results() -> None:
    @jax.custom_jvp
    def largest(x, shift):
        return x.max(-1), x.argmax(-1) + shift

    @largest.defjvp
    def _(primals, tangents):
        (x, shift), (x_dot, _) = primals, tangents
        place = x.argmax(-1)
        found = jnp.take_along_axis(x_dot, place[..., None], -1)[..., 0]
        return (x.max(-1), place + shift), (found * 5, np.zeros(place.shape, jax.dtypes.float0))

    def loss(weight, x, shift):
        value, place = largest(x @ weight, shift)
        return (value * (place >= 0)).sum()

    fast, shift = dj.autocast(loss, "bf16"), jnp.arange(5)
    assert_near(jax.grad(fast)(WEIGHT, X, shift), jax.grad(loss)(WEIGHT, X, shift), 0.05)


def test_autocast_in_a_loop_in_autocast() -> None:
    inner = dj.autocast(lambda weight, h: jnp.tanh(h @ weight), "bf16")

    def loss(weight, x):
        return jax.lax.scan(lambda h, _: (inner(weight, h), None), x, None, length=3)[0].sum()

    assert_near(jax.grad(dj.autocast(loss, "bf16"))(WEIGHT, X), jax.grad(loss)(WEIGHT, X), 0.05)


def test_a_backward_pass_may_ask_for_flags_that_were_saved() -> None:
    # as the loops of Equinox do
    @jax.custom_vjp
    def scaled(x):
        return 2 * x

    def backward(saved, gradient):
        (is_doubled,) = saved
        assert isinstance(is_doubled, bool)
        return (2 * gradient if is_doubled else gradient,)

    scaled.defvjp(lambda x: (scaled(x), (True,)), backward)
    for save in ("compute", "everything"):
        fast = jax.grad(lambda weight, save=save: dj.autocast(lambda w: scaled(X @ w).sum(), "bf16", save=save)(weight))
        assert_near(fast(WEIGHT), 2 * jax.grad(lambda weight: (X @ weight).sum())(WEIGHT))
        assert_near(jax.jit(fast)(WEIGHT), fast(WEIGHT), 1e-6)
