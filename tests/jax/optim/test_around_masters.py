"""What stands around `masters` in Optax: it works, or it is refused, and never gives wrong numbers in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.errors import OptimizerError

from .two_leaves import INNER, MASK, gradients, parameters


def train(tx: optax.GradientTransformation, steps: int = 3, policy: str | None = "bf16") -> tuple[dict, object]:
    params = parameters()
    state = tx.init(params)
    params = params if policy is None else dj.cast(params, policy)

    @jax.jit
    def step(params: dict, state: object, grads: dict) -> tuple[dict, object]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(steps):
        params, state = step(params, state, gradients(seed))
    return params, state


def assert_equal(masters: dict, reference: dict) -> None:
    for one, other in zip(jax.tree.leaves(masters), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-20)


def masters(policy: str = "bf16") -> optax.GradientTransformationExtraArgs:
    return dj.masters(INNER, policy)


def test_a_clip_in_front_clips_true_gradients() -> None:
    clip = optax.clip_by_global_norm(0.1)
    reference, _ = train(optax.chain(clip, INNER), policy=None)
    assert_equal(dj.master_weights(*train(optax.chain(clip, masters()))), reference)
    assert_equal(dj.master_weights(*train(dj.masters(INNER, "bf16", clip_norm=0.1))), reference)


def test_multi_steps_around_masters() -> None:
    reference, _ = train(optax.MultiSteps(INNER, 2), steps=4, policy=None)
    params, state = train(optax.MultiSteps(masters(), 2), steps=4)
    assert_equal(dj.master_weights(params, state), reference)
    # a step that is not due changes not a bit
    between, _ = train(optax.MultiSteps(masters(), 2), steps=3)
    after_two, _ = train(optax.MultiSteps(masters(), 2), steps=2)
    assert all(map(np.array_equal, jax.tree.leaves(between), jax.tree.leaves(after_two)))


def test_masked_around_masters_passes_the_rest_by() -> None:
    freeze = optax.masked(optax.set_to_zero(), jax.tree.map(lambda flag: not flag, MASK))
    params, state = train(optax.chain(optax.masked(masters(), MASK), freeze))
    reference, _ = train(optax.chain(optax.masked(INNER, MASK), freeze), policy=None)
    assert params["dense"]["kernel"].dtype == jnp.bfloat16
    assert_equal(dj.master_weights(params, state), reference)


def test_partition_around_masters() -> None:
    labels = {"dense": "a", "LayerNorm_0": "b"}
    params, state = train(optax.partition({"a": masters(), "b": masters()}, labels))
    assert_equal(dj.master_weights(params, state), train(INNER, policy=None)[0])


def test_a_rule_may_be_about_what_is_masked() -> None:
    policy = "bf16; dense: param=float32"
    tx = optax.partition({"a": dj.masters(INNER, policy), "b": INNER}, {"dense": "b", "LayerNorm_0": "a"})
    assert jax.tree.leaves(dj.master_weights(*train(tx, policy=policy)))


def test_masters_made_by_inject_hyperparams() -> None:
    tx = optax.inject_hyperparams(lambda rate: dj.masters(optax.sgd(rate, 0.5), "bf16"))(rate=0.25)
    assert_equal(dj.master_weights(*train(tx)), train(INNER, policy=None)[0])


@pytest.mark.parametrize("rate", [0.1, 2.0])
def test_a_factor_of_ones_own_on_updates_is_refused_and_makes_nan_of_weights_under_jit(rate: float) -> None:
    # cast to the dtype of what it multiplies, so no dtype tells
    after = optax.stateless(
        lambda updates, params: jax.tree.map(lambda each: jnp.asarray(rate, each.dtype) * each, updates)
    )
    tx = optax.chain(masters(), after)
    assert jnp.isnan(train(tx, steps=1)[0]["dense"]["kernel"]).all()
    params = dj.cast(parameters(), "bf16")
    updates, _ = tx.update(gradients(0), tx.init(parameters()), params)
    with pytest.raises(OptimizerError, match="can only be added to them"):
        optax.apply_updates(params, updates)


def test_masters_inside_of_masters_are_refused() -> None:
    with pytest.raises(OptimizerError, match="masters inside of masters would keep tails of FP32 masters"):
        dj.masters(optax.chain(masters()), "bf16").init(parameters())


def test_an_elementwise_clip_in_front_does_not_hide_an_overflow() -> None:
    tx = optax.chain(optax.clip(1.0), masters("fp16"))
    params = parameters()
    state = tx.init(params)
    params = dj.cast(params, "fp16")

    def loss(params: dict) -> jax.Array:
        # FP16 gradients of 1e5, which are Inf
        return 1e5 * sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(params))

    _, grads = dj.value_and_grad(loss)(state, params)
    updates, state = tx.update(grads, state, params)
    assert bool(state[1].found_inf)
    assert all(map(np.array_equal, jax.tree.leaves(optax.apply_updates(params, updates)), jax.tree.leaves(params)))


def test_parts_of_a_state_that_are_like_parameters_are_found() -> None:
    tx = masters()
    found = optax.tree.map_params(tx, lambda _: "parameter", tx.init(parameters()))
    assert found.tails["dense"]["kernel"] == "parameter"
    assert found.inner[0].trace["LayerNorm_0"]["scale"] == "parameter"
    # a tree of placements; parameters in FP32 have no tail
    places = {"dense": {"kernel": "rows"}, "LayerNorm_0": {"scale": "all"}}
    state = tx.init(parameters())
    found = optax.tree.map_params(tx, lambda _, place: place, state, places, is_leaf=lambda leaf: leaf is None)
    assert found.inner[0].trace == found.tails == places
    assert isinstance(found.loss_scale.scale, jax.Array)
