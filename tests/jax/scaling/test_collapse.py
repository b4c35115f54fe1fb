"""Runs that only skip: when they end, in which error, and what it names."""

import jax
import jax.numpy as jnp
import optax
import pytest

import duotone.jax as dj
from duotone.errors import LossScaleCollapse, LossScaleError, NonFiniteLoss, OptimizerError

PARAMS = {"blocks": [{"up": jnp.ones(2), "down": jnp.ones(2)}, {"up": jnp.ones(2), "down": jnp.ones(2)}], "b": 0.5}
PARAMS = jax.tree.map(jnp.float32, PARAMS)


def loss_of(params, factor, added):
    """Return a loss whose gradient overflows in block 1 alone, by a large factor."""
    first, second = params["blocks"]
    scaled = (second["up"] * second["down"]).astype(jnp.float32) * factor
    return (first["up"] * first["down"]).astype(jnp.float32).sum() + scaled.sum() + params["b"] + added


def rooted_loss_of(params, factor, added):
    """Return a finite loss whose gradient is infinite in any format."""
    return jnp.sqrt(params["blocks"][1]["up"] - 1).astype(jnp.float32).sum()


def stepped(tx, policy="fp16", loss_of=loss_of):
    """Return the first state, and a function that takes a step and returns the next."""
    state, params = tx.init(PARAMS), dj.cast(PARAMS, policy)

    @jax.jit
    def step(state, factor=1.0, added=0.0):
        _, grads = dj.value_and_grad(loss_of)(state, params, factor, added)
        return tx.update(grads, state, params)[1]

    return state, step


def test_a_scale_that_overflows_at_its_floor_twice_has_collapsed():
    state, step = stepped(dj.masters(optax.sgd(0.1), "fp16"))
    # from 2**16 to the floor of the search, and once there
    for _ in range(2):
        state = step(state, 1e6)
        dj.raise_if_collapsed(state)
    state = step(state, 1e6)
    with pytest.raises(LossScaleCollapse) as caught:
        dj.raise_if_collapsed((state,))
    assert str(caught.value) == (
        "3 steps in a row were skipped, the last at loss scale 1, its floor: 2 of 5 gradients are not finite "
        "(blocks.1.down, blocks.1.up); keep what overflows in FP32, by keep_float32 or a rule, "
        '"blocks.1: param=float32,compute=float32", look for a division by 0 or a root of 0 there, lower the learning '
        'rate, or use policy "bf16"'
    )
    # a clean step, and there is hope
    dj.raise_if_collapsed(step(state, 1.0))


def test_on_the_way_down_to_the_floor_nothing_has_collapsed():
    settings = dj.LossScale(2.0**6, growth_factor=1.0)
    state, step = stepped(dj.masters(optax.sgd(0.1), "fp16", loss_scale=settings))
    for _ in range(7):
        state = step(state, 1e6)
        dj.raise_if_collapsed(state)
    assert state.loss_scale.scale == 1.0
    with pytest.raises(LossScaleCollapse):
        dj.raise_if_collapsed(step(step(state, 1e6), 1e6))


@pytest.mark.parametrize(
    ("policy", "settings", "where"),
    [("fp16", dj.LossScale.static(4.0), "loss scale 4"), ("bf16", dj.LossScale.none(), "no loss scale")],
)
def test_a_scale_that_stands_still_ends_by_patience(policy, settings, where):
    state, step = stepped(dj.masters(optax.sgd(0.1), policy, loss_scale=settings), policy, rooted_loss_of)
    for _ in range(4):
        state = step(state)
        dj.raise_if_collapsed(state, patience=5)
    with pytest.raises(LossScaleCollapse, match=f"^5 steps in a row were skipped, the last at {where}: 1 of 5"):
        dj.raise_if_collapsed(step(state), patience=5)


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_a_loss_that_is_not_finite_is_another_error_and_leaves_the_scale_alone(policy):
    state, step = stepped(dj.masters(optax.sgd(0.1), policy), policy)
    first = state.loss_scale.scale
    for _ in range(4):
        state = step(state, added=jnp.nan)
        dj.raise_if_collapsed(state, patience=5)
    state = step(state, added=jnp.nan)
    assert state.loss_scale.scale == first
    with pytest.raises(NonFiniteLoss) as caught:
        dj.raise_if_collapsed(state, patience=5)
    assert str(caught.value) == (
        "5 steps in a row were skipped, and the last loss is not finite: that is the forward pass, not the loss scale; "
        "look at the data and the learning rate, and compute the loss alone in `with jax.debug_nans(True):`, which "
        "names the operation that makes the first NaN"
    )


def test_the_loss_can_be_said_by_optax_s_value():
    tx = dj.masters(optax.sgd(0.1), "fp16")
    state, params = tx.init(PARAMS), dj.cast(PARAMS, "fp16")
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), PARAMS)
    assert tx.update(grads, state, params, value=jnp.nan)[1].loss_scale.scale == 2.0**16
    assert tx.update(grads, state, params, value=1.0)[1].loss_scale.scale == 1.0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda state: dj.raise_if_collapsed(state, patience=0),
            "patience is 0; it must be a whole number from 1 on",
        ),
        (
            jax.jit(dj.raise_if_collapsed),
            "raise_if_collapsed reads numbers, but this state is traced; call it outside of jit, or return "
            "report(state) from there and look at that",
        ),
        (
            lambda state: dj.raise_if_collapsed(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)),
            "this state is 3 states in one, as vmap and scan stack them; give one of them, "
            "jax.tree.map(lambda leaf: leaf[0], state)",
        ),
    ],
)
def test_what_is_refused(call, expected):
    with pytest.raises(LossScaleError) as caught:
        call(dj.masters(optax.sgd(0.1), "fp16").init(PARAMS))
    assert str(caught.value) == expected


@pytest.mark.parametrize("under", [jax.jit, lambda function: function])
def test_a_master_beyond_fp16_is_said_in_the_next_step_with_its_name(under):
    tx = dj.masters(optax.sgd(1.0), "fp16,loss_scale=1")
    params = {
        "layer": {"kernel": jnp.float32([65000.0, 1.0]), "bias": jnp.ones(1)},
        "norm": {"scale": jnp.float32([1e5])},
    }
    state, params = tx.init(params), dj.cast(params, "fp16")
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -400.0), params)

    @under
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    assert dj.report(state).infinite_weights == 0
    dj.raise_if_collapsed(state)
    params, state = step(params, state)
    assert jnp.isinf(params["layer"]["kernel"][0])
    params, state = step(params, state)
    assert dj.report(state).infinite_weights == 1
    with pytest.raises(
        OptimizerError, match=r'Inf \(layer.kernel\).*beyond FP16.*"layer: param=float32,compute=float32"'
    ):
        dj.raise_if_collapsed(state)
