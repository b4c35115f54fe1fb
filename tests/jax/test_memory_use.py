"""`dj.memory`: bytes by role, exactly, of any optimizer and module, for all devices or for one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import duotone.jax as dj
from duotone.wording.memory import Memory

PARAMS = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "steps": jnp.int32(3)}
COUNT = 30


def trained(inner: optax.GradientTransformation, policy: str = "bf16") -> tuple:
    params = PARAMS["dense"]
    tx = dj.masters(inner, policy)
    return dj.cast(params, policy), tx.init(params)


@pytest.mark.parametrize(
    ("inner", "policy", "expected"),
    [
        (optax.adamw(1e-3), "bf16", 14.0),
        (optax.adamw(1e-3), "fp16", 14.0),
        (optax.adamw(1e-3), "bf16,grad=float32", 16.0),
        (optax.adamw(1e-3, mu_dtype="bfloat16"), "bf16", 12.0),
        (optax.sgd(1e-3), "bf16", 6.0),
        (optax.sgd(1e-3, momentum=0.9), "bf16", 10.0),
        (optax.MultiSteps(optax.adamw(1e-3), 2), "bf16", 18.0),
        (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), "bf16", 14.0),
    ],
)
def test_bytes_per_parameter(inner, policy, expected):
    assert dj.memory(*trained(inner, policy)).bytes_per_parameter == expected


def test_every_role_of_bf16_with_adamw():
    params = {**dj.cast(PARAMS["dense"], "bf16"), "steps": PARAMS["steps"]}
    state = dj.masters(optax.adamw(1e-3), "bf16").init(PARAMS["dense"])
    # Adam's count and schedule beside a loss scale's three counts and scale, a norm, a flag and two of parameters
    arrays = jax.tree.leaves(state)
    rest = sum(each.nbytes for each in arrays if each.shape not in ((4, 6), (6,))) + PARAMS["steps"].nbytes
    assert dj.memory(params, state) == Memory(COUNT, 2 * COUNT, 2 * COUNT, 2 * COUNT, 8 * COUNT, rest)


def test_plain_optax_has_no_tails_and_no_state_has_no_moments():
    params = PARAMS["dense"]
    state = optax.adamw(1e-3).init(params)
    assert dj.memory(params, state) == Memory(COUNT, 4 * COUNT, 0, 4 * COUNT, 8 * COUNT, 4)
    assert dj.memory(params).moments_bytes == 0
    assert dj.memory({"n": 3, "name": "x"}) == Memory(0, 0, 0, 0, 0, 0)


def test_factors_of_a_moment_are_moments():
    params = {"kernel": jnp.ones((128, 256))}
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=128).init(params)
    # a row and a column, and one number in place of what is not factored
    assert dj.memory(params, state).moments_bytes == 4 * (128 + 256 + 1)


def test_one_array_as_parameters():
    params = jnp.ones((4, 6))
    assert dj.memory(params, optax.adam(1e-3).init(params)) == Memory(24, 96, 0, 96, 192, 4)


def test_shapes_are_enough():
    params, state = jax.eval_shape(lambda: trained(optax.adamw(1e-3)))
    assert dj.memory(params, state) == dj.memory(*trained(optax.adamw(1e-3)))


def test_a_device_holds_its_shards_and_its_copies():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    params = {"kernel": jax.device_put(jnp.ones((4, 6)), sharding), "bias": jnp.ones(6)}
    tx = dj.masters(optax.adamw(1e-3), "bf16")
    state = tx.init(params)
    params = dj.cast(params, "bf16")
    (first, second, *_) = mesh.devices.flat
    whole = dj.memory(params, state)
    assert whole.parameters == COUNT
    assert whole.bytes_per_parameter == 14.0
    on_first = dj.memory(params, state, device=first)
    # the bias was made on the first device and is on no other
    assert (on_first.parameters, dj.memory(params, state, device=second).parameters) == (18, 12)
    assert on_first.bytes_per_parameter == 14.0
    arrays = [shard for each in jax.tree.leaves((params, state)) for shard in each.addressable_shards]
    held = sum(shard.data.nbytes for shard in arrays if shard.device == first)
    roles = on_first.weights_bytes + on_first.tails_bytes + on_first.moments_bytes + on_first.other_bytes
    assert roles == held
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, state))
    assert dj.memory(*shapes, device=first) == on_first
    # what is on no device is on none
    assert dj.memory({"w": np.ones(3, np.float32)}, device=first).weights_bytes == 0


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_statistics_and_keys_of_nnx_are_no_weights():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    counted = dj.memory(model, optimizer)
    assert counted.parameters == 4 * 6 + 6 + 2 * 6
    assert counted.bytes_per_parameter == 16.0
    # running mean and variance, at least
    assert counted.other_bytes >= 2 * 6 * 4


def test_collections_of_linen_and_a_train_state():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.BatchNorm(use_running_average=False)(linen.Dense(6)(x))

    variables = Model().init(jax.random.key(0), jnp.ones((2, 4)))
    state = TrainState.create(apply_fn=None, params=variables["params"], tx=optax.adamw(1e-3))
    counted = dj.memory(variables, state)
    assert (counted.parameters, counted.bytes_per_parameter) == (42, 16.0)
    # running mean and variance, and the counts of Adam; the step of a new train state is a Python number
    assert counted.other_bytes == 2 * 6 * 4 + 4


def test_equinox():
    model = eqx.nn.MLP(4, 6, 8, 1, key=jax.random.key(0))
    state = optax.adamw(1e-3).init(eqx.filter(model, eqx.is_array))
    assert dj.memory(model, state).bytes_per_parameter == 16.0


def test_it_shows_itself_as_torchs_does():
    params, state = trained(optax.sgd(1e-3))
    shown = dj.memory(params, state)
    assert str(shown).startswith("6 bytes for each of 30 parameters: weights 60 B, tails 60 B, gradients 60 B")
    assert "<table" in shown._repr_html_()
