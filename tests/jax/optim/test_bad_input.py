"""What `masters`, its `init` and `update`, and `master_weights` say about wrong input; and trees that are right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.errors import LossScaleError, OptimizerError, PolicyError

ADAM = optax.adam(1e-3)


def parameters() -> dict:
    return {"w": jnp.ones((2, 3)), "LayerNorm_0": {"scale": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dj.masters(optax.adam, "bf16"), OptimizerError, r"around an Optax optimizer, not .*; write masters\("),
        (lambda: dj.masters("bf16", ADAM), OptimizerError, "around an Optax optimizer, not 'bf16'"),
        (lambda: dj.masters(ADAM, "bf16-true,rounding=nearest"), PolicyError, "has no masters.*write master=float32"),
        (lambda: dj.masters(ADAM, "bf16-true,rounding=stochastic"), PolicyError, "JAX has no rounding=stochastic"),
        (lambda: dj.masters(ADAM, "bf16,state=bfloat16"), PolicyError, "state=bfloat16 is not possible.*mu_dtype"),
        (lambda: dj.masters(ADAM, "bf16,frozen=tail"), PolicyError, "JAX has no frozen=tail"),
        (lambda: dj.masters(ADAM, "bf16,reduce=bfloat16"), PolicyError, "JAX has no reduce=bfloat16"),
        (lambda: dj.masters(ADAM, "fp8"), PolicyError, "fp8"),
        (lambda: dj.masters(ADAM, "bf16", clip_norm=0.0), OptimizerError, "clip_norm is 0.0; it must be positive"),
        (lambda: dj.masters(ADAM, "bf16", clip_norm=float("nan")), OptimizerError, "clip_norm is nan"),
        (lambda: dj.masters(ADAM, "bf16", clip_norm="1"), OptimizerError, "clip_norm is '1'"),
        (lambda: dj.masters(ADAM, "bf16", loss_scale=dj.LossScale()), LossScaleError, "needs no loss scale"),
        (lambda: dj.masters(ADAM, "fp16", loss_scale=1024), LossScaleError, "loss_scale is 1024; give the settings"),
    ],
)
def test_masters(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("params", "policy", "message"),
    [
        ({"steps": jnp.arange(3)}, "bf16", "hold no floating-point array, so there is nothing to train"),
        ({"w": jnp.ones(2, "float16")}, "bf16", '"w" is float16, but the weights of policy "bf16" are bfloat16'),
        ({"w": jnp.ones(2, "bfloat16")}, "fp32", '"w" is bfloat16, but the weights of policy "fp32" are float32'),
        ({"w": jnp.ones(2, "bfloat16")}, "bf16-mixed", 'of policy "bf16-mixed" are float32'),
        ({"w": jnp.ones(2, jnp.float8_e5m2)}, "bf16", "float8_e5m2, which has no masters"),
    ],
)
def test_init(params, policy, message) -> None:
    with pytest.raises(OptimizerError, match=message):
        dj.masters(ADAM, policy).init(params)


def test_an_empty_tree_is_none() -> None:
    tx = dj.masters(ADAM, "fp16")
    for empty in ({}, [], {"absent": None}):
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert jax.tree.leaves(updates) == []
        assert not bool(state.found_inf)
        assert int(state.loss_scale.growth_tracker) == 1


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("bf16", {"params": None}, r"write tx.update\(grads, state, params\)"),
        (
            "bf16",
            {"state": ADAM.init(parameters())},
            "the state that tx.init of this very optimizer returned, not tuple",
        ),
        ("bf16", {"params": parameters()}, r'"w" is float32, but the state holds the tail.*cast\(params, "bf16"\)'),
        ("bf16", {"grads": {"w": jnp.ones((2, 3))}}, 'another structure.*only one of them has "LayerNorm_0.scale"'),
        ("bf16", {"grads": {**parameters(), "w": None}}, 'gradient of "w" is NoneType'),
        ("bf16", {"grads": {**parameters(), "w": {"a": 1.0}}}, 'gradient of "w" is dict'),
        (
            "bf16",
            {"grads": {**parameters(), "w": jnp.ones((3, 2))}},
            r"of shape \(3, 2\), but its .* of shape \(2, 3\)",
        ),
        ("bf16", {"grads": {**parameters(), "w": jnp.ones((2, 3), "float16")}}, "must be bfloat16 or float32 of that"),
        ("bf16", {"grads": {**parameters(), "w": jnp.ones((2, 3), "int32")}}, '"w" is int32'),
        (
            "bf16",
            {"grads": {"w": jnp.ones((2, 3)), "LayerNorm_0": {"scale": jnp.ones(3, "bfloat16")}}},
            "must be float32 of that shape",
        ),
        (
            "fp16",
            {"grads": {**parameters(), "w": jnp.ones((2, 3), "float16")}},
            r"has a loss scale and takes true gradients, in float32; take those of duotone.jax.value_and_grad",
        ),
        ("fp16,loss_scale=1024", {"grads": {**parameters(), "w": jnp.ones((2, 3), "float16")}}, "takes true gradients"),
        (
            "bf16",
            {"state": dj.masters(ADAM, "bf16").init({**parameters(), "w": jnp.ones((3, 3))})},
            r"has shape \(2, 3\), but its tail in the state \(3, 3\)",
        ),
        ("bf16", {"state": dj.masters(ADAM, "bf16; w: param=float32").init(parameters())}, "has no tail of it"),
        (
            "bf16",
            {"state": dj.masters(ADAM, "bf16").init({"w": jnp.ones(2)})},
            "the tails in the state of masters have another str",
        ),
    ],
)
def test_update(policy, change, message) -> None:
    tx = dj.masters(ADAM, policy)
    given = {"grads": parameters(), "state": tx.init(parameters()), "params": dj.cast(parameters(), policy)} | change
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(OptimizerError, match=message):
            update(given["grads"], given["state"], given["params"])


def test_gradients_without_a_scale_need_none_to_be_16_bit() -> None:
    tx = dj.masters(ADAM, "fp16,loss_scale=1")
    params = dj.cast(parameters(), "fp16")
    tx.update(params, tx.init(parameters()), params)


@pytest.mark.parametrize(
    ("params", "state", "message"),
    [
        (parameters(), ADAM.init(parameters()), "no state of duotone.jax.masters in this tuple"),
        (dj.cast({"v": jnp.ones(2)}, "bf16"), dj.masters(ADAM, "bf16").init(parameters()), 'no tail of "v"'),
        (dj.cast({"w": jnp.ones(2)}, "bf16"), dj.masters(ADAM, "bf16").init(parameters()), 'no tail of "w"'),
    ],
)
def test_master_weights(params, state, message) -> None:
    with pytest.raises(OptimizerError, match=message):
        dj.master_weights(params, state)


def test_mixed_trees_train_what_can_be_trained() -> None:
    with jax.enable_x64(True):
        params = {
            "w": jnp.ones(2, jnp.float32),
            "double": jnp.ones(2, jnp.float64),
            "complex": jnp.ones(2, jnp.complex64),
            "steps": jnp.arange(2, dtype=jnp.int32),
            "key": jax.random.key(0),
            "number": 0.5,
            "none": None,
            "empty": jnp.ones((0, 3), jnp.float32),
            "scalar": jnp.float32(1),
        }
        tx = dj.masters(optax.sgd(0.5), "bf16", clip_norm=100.0)
        state = tx.init(params)
        params = dj.cast(params, "bf16")
        grads = dict(params, steps=np.zeros(2, jax.dtypes.float0), key=None)
        updates, after = jax.jit(tx.update)(grads, state, params)
        new = optax.apply_updates({**params, "key": None}, {**updates, "key": None})
        assert {name: str(leaf.dtype) for name, leaf in new.items() if hasattr(leaf, "dtype")} == {
            name: str(leaf.dtype) for name, leaf in params.items() if hasattr(leaf, "dtype") and name != "key"
        } | {"number": "float64"}
        assert float(new["w"][0]) == float(new["double"][0]) == float(new["scalar"]) == 0.5
        assert new["complex"].tolist() == [0.5, 0.5]
        assert new["steps"].tolist() == [0, 1]
        assert float(new["number"]) == 0.25
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert one.dtype == other.dtype
