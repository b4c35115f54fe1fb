"""Any Optax optimizer inside of `masters` trains as it trains FP32 weights on the same gradients.

Run operation by operation the masters are equal bit for bit. Under `jit` XLA's CPU compiler contracts products and
sums, and not the same ones in both programs: within units of the last place, which are stated.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import duotone.jax as dj

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.01),
    "momentum": lambda: optax.sgd(0.01, 0.9),
    "nesterov": lambda: optax.sgd(0.01, 0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01),
    "schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 8)),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01)),
    "hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.01),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(0.01), "b": optax.sgd(0.1)}, {"dense": "a", "LayerNorm_0": "b"}
    ),
    "masked": lambda: optax.masked(optax.adam(0.01), {"dense": True, "LayerNorm_0": False}),
    "nadam": lambda: optax.nadam(0.01),
    "adamax": lambda: optax.adamax(0.01),
    "amsgrad": lambda: optax.amsgrad(0.01),
    "lion": lambda: optax.lion(0.001),
    "lars": lambda: optax.lars(0.01),
    "adagrad": lambda: optax.adagrad(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01),
    "adadelta": lambda: optax.adadelta(0.01),
    "novograd": lambda: optax.novograd(0.01),
    "yogi": lambda: optax.yogi(0.01),
    "radam": lambda: optax.radam(0.01),
    "adabelief": lambda: optax.adabelief(0.01),
    "adan": lambda: optax.adan(0.01),
    "sm3": lambda: optax.sm3(0.01),
    "fromage": lambda: optax.fromage(0.01),
    "optimistic_adam": lambda: optax.optimistic_adam_v2(0.01),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=jax.random.key(1)),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.01),
    "prodigy": lambda: contrib.prodigy(0.1),
    "dadapt": lambda: contrib.dadapt_adamw(0.1),
    "ademamix": lambda: contrib.ademamix(0.01),
    "adopt": lambda: contrib.adopt(0.01),
    "madgrad": lambda: contrib.madgrad(0.01),
    "cocob": lambda: contrib.cocob(alpha=100),
}
# they compile for seconds
SLOW = {
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "adafactor": lambda: optax.adafactor(0.01),
    "muon": lambda: contrib.muon(0.01),
    "galore": lambda: contrib.galore(0.01),
    "lamb": lambda: optax.lamb(0.01),
    "rprop": lambda: optax.rprop(0.01),
    "mechanic": lambda: contrib.mechanize(optax.adam(0.01)),
}
# of these the step is compiled, too: an update by elements, by norms of leaves, by matrices, by factors
COMPILED = [("adamw", "bf16"), ("adamw", "fp16"), ("lars", "bf16"), ("schedule_free", "fp16")]
COMPILED_SLOWLY = [("nadam", "fp16"), ("muon", "bf16"), ("adafactor", "fp16"), ("fromage", "bf16")]


@cache
def parameters() -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jax.random.normal(keys[1], (16,))},
        "LayerNorm_0": {"scale": 1 + jax.random.normal(keys[2], (16,)) / 8},
    }


@cache
def gradients(seed: int) -> dict:
    def draw(leaf: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), leaf.ndim)
        # as BF16 and FP16 both hold them
        return jax.random.randint(key, leaf.shape, -100, 101) / 64

    return jax.tree.map(draw, parameters())


def train(inner: optax.GradientTransformation, policy: str, steps: int, *, compiled: bool) -> tuple[dict, dict]:
    """Return the masters, and the weights of training in FP32."""
    tx = dj.masters(inner, policy)

    def step(ours: tuple, reference: tuple, grads: dict) -> tuple:
        params, state = ours
        updates, state = tx.update(grads, state, params)
        wide, inner_state = reference
        own, inner_state = inner.update(grads, inner_state, wide)
        return (optax.apply_updates(params, updates), state), (optax.apply_updates(wide, own), inner_state)

    params = parameters()
    ours, reference = (dj.cast(params, policy), tx.init(params)), (params, inner.init(params))
    step = jax.jit(step) if compiled else step
    for seed in range(steps):
        ours, reference = step(ours, reference, gradients(seed))
    assert not bool(ours[1].found_inf)
    return dj.master_weights(*ours), reference[0]


def assert_same_bits(masters: dict, reference: dict) -> None:
    for name, one, other in zip(
        ["scale", "bias", "kernel"], jax.tree.leaves(masters), jax.tree.leaves(reference), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), name


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_masters_are_float32_training_bit_for_bit(name: str) -> None:
    inner = (OPTIMIZERS | SLOW)[name]()
    masters, reference = train(inner, "bf16", 3, compiled=False)
    before = jax.tree.leaves(parameters())
    moved = [not np.array_equal(*pair) for pair in zip(jax.tree.leaves(reference), before, strict=True)]
    # one does not move what it masks, the other waits
    assert all(moved) or name in ("masked", "mechanic")
    assert_same_bits(masters, reference)


@pytest.mark.parametrize("name", ["adamw", "momentum", "schedule"])
def test_so_are_masters_of_fp16(name: str) -> None:
    # no weight of these is below 2^-16, where its masters are rounded to 2^-41
    assert_same_bits(*train(OPTIMIZERS[name](), "fp16", 3, compiled=False))


@pytest.mark.parametrize(
    ("name", "policy"), [*COMPILED, *(pytest.param(*each, marks=pytest.mark.slow) for each in COMPILED_SLOWLY)]
)
def test_compiled_within_units_in_the_last_place_of_weights_near_one(name: str, policy: str) -> None:
    masters, reference = train((OPTIMIZERS | SLOW)[name](), policy, 5, compiled=True)
    for one, other in zip(jax.tree.leaves(masters), jax.tree.leaves(reference), strict=True):
        # 8 units of 2^-23, which is the spacing from 1 to 2
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-20)


@pytest.mark.parametrize("name", ["polyak_sgd", pytest.param("lbfgs", marks=pytest.mark.slow)])
def test_extra_arguments_reach_the_inner_optimizer(name: str) -> None:
    def loss(params: dict) -> jax.Array:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    inner = getattr(optax, name)()
    tx = dj.masters(inner, "bf16")
    params, wide = dj.cast(parameters(), "bf16"), parameters()
    state, inner_state = tx.init(wide), inner.init(wide)

    @jax.jit
    def step(params: dict, state: object, wide: dict, inner_state: object) -> tuple:
        value, grads = jax.value_and_grad(loss)(wide)
        extra = {"value": value} if name == "polyak_sgd" else {"value": value, "grad": grads, "value_fn": loss}
        updates, state = tx.update(grads, state, params, **extra)
        own, inner_state = inner.update(grads, inner_state, wide, **extra)
        return optax.apply_updates(params, updates), state, optax.apply_updates(wide, own), inner_state

    for _ in range(2):
        params, state, wide, inner_state = step(params, state, wide, inner_state)
    for one, other in zip(jax.tree.leaves(dj.master_weights(params, state)), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-20)


# Optax's own generic test of optimizers: init and update under jit, and dtypes of their state
@pytest.mark.parametrize("name", [*OPTIMIZERS, *SLOW])
@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_the_state_keeps_its_dtypes_and_shapes(name: str, policy: str) -> None:
    inner = (OPTIMIZERS | SLOW)[name]()
    tx = dj.masters(inner, policy)
    params = dj.cast(parameters(), policy)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients(0), state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    new = jax.eval_shape(optax.apply_updates, params, updates)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
