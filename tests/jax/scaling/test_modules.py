"""Gradients of modules of Flax NNX, Linen and Equinox: what each library's own transform gives, scaled."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from duotone.errors import LossScaleError
from duotone.jax import value_and_grad

from .test_value_and_grad import state_of

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def check_equal(found, expected, rtol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7), found, expected)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.first(x)))


def nnx_loss(model, x):
    return (model(x) ** 2).mean()


def test_nnx_modules_keep_what_the_forward_pass_changed():
    ours, theirs = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    loss, grads = nnx.jit(value_and_grad(nnx_loss))(state_of(), ours, X)
    expected = nnx.jit(nnx.value_and_grad(nnx_loss))(theirs, X)
    check_equal((loss, grads), expected)
    # batch statistics and the count of random numbers among them
    check_equal(nnx.state(ours, nnx.Not(nnx.RngKey)), nnx.state(theirs, nnx.Not(nnx.RngKey)))
    assert int(ours.dropout.rngs.count[...]) == 1
    assert (ours.norm.mean[...] != 0).all()


def test_nnx_takes_filters_and_arguments_by_name():
    model = Network(nnx.Rngs(0))
    kernel = nnx.DiffState(0, nnx.PathContains("kernel"))
    (_, aux), grads = value_and_grad(lambda model, x: (nnx_loss(model, x), "aux"), argnums=kernel, has_aux=True)(
        state_of(), model, x=X
    )
    assert aux == "aux"
    assert [path for path, _ in nnx.to_flat_state(grads)] == [("first", "kernel")]


def test_linen_parameters_are_plain_trees():
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), X)

    def loss_fn(params, x):
        return (model.apply(params, x) ** 2).mean()

    check_equal(value_and_grad(loss_fn)(state_of(), params, X), jax.value_and_grad(loss_fn)(params, X))


def test_equinox_modules_have_none_where_there_is_no_array():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))

    @eqx.filter_jit
    def step(state, model, x):
        return value_and_grad(lambda model, x: (jax.vmap(model)(x) ** 2).mean())(state, model, x)

    loss, grads = step(state_of(), model, X)
    expected = eqx.filter_value_and_grad(lambda model, x: (jax.vmap(model)(x) ** 2).mean())(model, X)
    check_equal((loss, grads), expected)
    assert grads.activation is None
    with pytest.raises(LossScaleError) as caught:
        value_and_grad(lambda x, model: model(x).sum(), argnums=1)(state_of(), X[0], model)
    assert str(caught.value) == (
        "argnums is 1, but equinox.filter_value_and_grad, which differentiates functions of Equinox modules, takes the "
        "first argument alone; put what is to be differentiated into a tuple, and that first"
    )
