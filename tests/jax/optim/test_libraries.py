"""`masters` in the loops of Equinox, Flax NNX, Linen's train state, and Flax's own way of saving."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import duotone.jax as dj
from duotone.errors import PolicyError

INNER = optax.adamw(0.01)
X = jax.random.normal(jax.random.key(1), (4, 8))


def assert_near(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-18)


def loss_of(outputs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(outputs.astype(jnp.float32) - 1))


class EquinoxModel(eqx.Module):
    norm: eqx.nn.LayerNorm
    linear: eqx.nn.Linear
    name: str = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x).astype(self.linear.weight.dtype))


@pytest.mark.parametrize("policy", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_equinox(policy: str) -> None:
    model = EquinoxModel(eqx.nn.LayerNorm(8), eqx.nn.Linear(8, 3, key=jax.random.key(0)), "model")
    tx = dj.masters(INNER, policy)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    wide, inner_state = model, INNER.init(eqx.filter(model, eqx.is_inexact_array))
    model = dj.cast(model, policy)
    assert_near(dj.master_weights(model, state), wide)

    @eqx.filter_jit
    def step(model: EquinoxModel, state: object, wide: EquinoxModel, inner_state: object) -> tuple:
        _, grads = dj.value_and_grad(lambda model, x: loss_of(jax.vmap(model)(x)))(state, model, X)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        own, inner_state = INNER.update(grads, inner_state, eqx.filter(wide, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, eqx.apply_updates(wide, own), inner_state

    for _ in range(3):
        model, state, wide, inner_state = step(model, state, wide, inner_state)
    assert model.linear.weight.dtype == dj.Policy.parse(policy).param
    assert model.norm.weight.dtype == jnp.float32
    assert_near(dj.master_weights(model, state), wide)


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.linear = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


@pytest.mark.parametrize("cast_first", [False, True])
def test_nnx_optimizer(*, cast_first: bool) -> None:
    model = dj.cast(NnxModel(), "bf16") if cast_first else NnxModel()
    optimizer = nnx.Optimizer(model, dj.masters(INNER, "bf16"), wrt=nnx.Param)
    model = dj.cast(model, "bf16")
    wide = nnx.as_pure(nnx.state(dj.master_weights(model, optimizer.opt_state), nnx.Param))
    inner_state = INNER.init(wide)
    assert int(optimizer.opt_state.exact_starts[...]) == (2 if cast_first else 0)

    @nnx.jit
    def step(model: NnxModel, optimizer: nnx.Optimizer) -> nnx.State:
        grads = nnx.grad(lambda model, x: loss_of(model(x)))(model, X)
        optimizer.update(model, grads)
        return grads

    for _ in range(3):
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), nnx.as_pure(step(model, optimizer)))
        own, inner_state = INNER.update(grads, inner_state, wide)
        wide = optax.apply_updates(wide, own)
    assert model.linear.kernel.dtype == jnp.bfloat16
    assert_near(nnx.as_pure(dj.master_weights(nnx.state(model, nnx.Param), optimizer.opt_state)), wide)


def test_a_rule_by_type_is_refused_where_there_are_no_classes() -> None:
    tx = dj.masters(INNER, "bf16; type=Linear: param=float32")
    with pytest.raises(PolicyError, match="for nothing in this pytree has a class; name weights by their path"):
        nnx.Optimizer(NnxModel(), tx, wrt=nnx.Param)


def linear(params: dict, x: jax.Array) -> jax.Array:
    return x.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"]


@pytest.mark.parametrize(
    "policy", ["fp16", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("bf16", "fp16-mixed", "fp32"))]
)
def test_train_state_and_flax_serialization(policy: str) -> None:
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 3)), "bias": jnp.zeros(3)}
    state = TrainState.create(apply_fn=linear, params=params, tx=dj.masters(INNER, policy, clip_norm=0.5))
    state = state.replace(params=dj.cast(params, policy))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        _, grads = dj.value_and_grad(lambda params: loss_of(linear(params, X)))(state, state.params)
        return state.apply_gradients(grads=grads)

    first = step(state)
    saved = serialization.to_bytes(first)
    second = step(first)
    restored = serialization.from_bytes(state, saved)
    resumed = step(restored)
    for one, other in zip(jax.tree.leaves(second), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    moved = dj.master_weights(second.params, second)["kernel"] - params["kernel"]
    assert 0.01 < float(jnp.abs(moved).max()) < 0.03
