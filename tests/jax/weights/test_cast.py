"""`cast`: which leaves of which trees become 16-bit, by path, by class and by what they are."""

from collections import OrderedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze

import duotone.jax as dj
from duotone.errors import PolicyError

KEY = jax.random.key(0)


def narrow(tree: object) -> set[str]:
    """Return the paths of the 16-bit leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = [path for path, leaf in leaves if getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in found}


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.param("pos_embedding", linen.initializers.ones, (1, 4, 8))
        x = linen.Dense(8)(linen.LayerNorm()(x))
        x = linen.BatchNorm(use_running_average=False)(x)
        return linen.Dense(1)(linen.RMSNorm(name="before_head")(x))


def test_linen() -> None:
    shapes = jax.eval_shape(LinenModel().init, KEY, jnp.ones((2, 4, 8)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    dense = {f"{name}.{leaf}" for name in ("Dense_0", "Dense_1") for leaf in ("kernel", "bias")}
    assert narrow(dj.cast(variables["params"], "bf16")) == dense
    assert narrow(dj.cast(freeze(variables["params"]), "bf16")) == dense
    # other collections stay as they are, and paths have no "params"
    cast = dj.cast(variables, "fp16; Dense_1: param=float32")
    assert narrow(cast) == {"params.Dense_0.kernel", "params.Dense_0.bias"}
    assert "pos_embedding" in narrow(dj.cast(variables["params"], "bf16,residual=compute"))


def test_boxes_of_linen_are_looked_through() -> None:
    box = linen.Partitioned(jnp.ones((2, 2)), names=("a", "b"))
    params = {"Dense_0": {"kernel": box}, "LayerNorm_0": {"scale": linen.Partitioned(jnp.ones(2), names=("a",))}}
    cast = dj.cast(params, "bf16")
    assert cast["Dense_0"]["kernel"].names == ("a", "b")
    assert narrow(cast) == {"Dense_0.kernel"}
    assert narrow(dj.cast(params, "bf16; LayerNorm_0.scale: param=bfloat16")) == {"Dense_0.kernel", "LayerNorm_0.scale"}


def test_haiku() -> None:
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
        "mlp/~/layer_norm": {"scale": jnp.ones(2), "offset": jnp.ones(2)},
        "mlp/~/batch": {"scale": jnp.ones(2), "offset": jnp.ones(2)},
    }
    assert narrow(dj.cast(params, "bf16")) == {"mlp/~/linear_0.w", "mlp/~/linear_0.b"}
    assert narrow(dj.cast(params, "bf16; mlp.linear_0.b: param=float32")) == {"mlp/~/linear_0.w"}


class OwnNorm(eqx.Module):
    gain: jax.Array


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list
    own: OwnNorm
    activation: object
    rate: float

    def __init__(self) -> None:
        self.embed = eqx.nn.Embedding(5, 4, key=KEY)
        self.layers = [eqx.nn.Linear(4, 4, key=KEY), eqx.nn.LayerNorm(4), eqx.nn.MLP(4, 1, 4, 1, key=KEY)]
        self.own = OwnNorm(jnp.ones(4))
        self.activation = jax.nn.relu
        self.rate = 0.5


def test_equinox() -> None:
    model = dj.cast(EquinoxModel(), "bf16")
    linear = {"layers.0.weight", "layers.0.bias"}
    mlp = {f"layers.2.layers.{index}.{name}" for index in (0, 1) for name in ("weight", "bias")}
    assert narrow(model) == {"embed.weight", *linear, *mlp}
    assert (model.rate, model.activation) == (0.5, jax.nn.relu)
    assert narrow(dj.cast(EquinoxModel(), "bf16; type=MLP: param=float32")) == {"embed.weight", *linear}
    # a rule that names a norm goes before what norms are; one for what holds it does not
    assert "layers.1.weight" in narrow(dj.cast(EquinoxModel(), "bf16; type=LayerNorm: param=bfloat16"))
    assert "layers.1.weight" in narrow(dj.cast(EquinoxModel(), "bf16; layers.1: param=bfloat16"))
    assert "layers.1.weight" not in narrow(dj.cast(EquinoxModel(), "bf16; layers: param=bfloat16"))
    filtered = eqx.filter(EquinoxModel(), eqx.is_inexact_array)
    assert narrow(dj.cast(filtered, "bf16")) == narrow(model)


def test_the_state_of_a_model_of_equinox_stays() -> None:
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    weights = {"linear": jnp.ones(2)}
    assert narrow(dj.cast((model, state, weights), "bf16")) == {"2.linear"}


class NnxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.tied = self.linear
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.count = nnx.Variable(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norms[1](self.norms[0](self.tied(self.linear(x)))))


def test_nnx() -> None:
    model = NnxModel()
    cast = dj.cast(model, "bf16")
    assert cast.tied is cast.linear
    assert cast.linear.kernel.dtype == jnp.bfloat16
    assert model.linear.kernel.dtype == jnp.float32
    assert narrow(nnx.state(cast)) == {"linear.kernel", "linear.bias"}
    assert narrow(dj.cast(nnx.state(model), "bf16")) == {"linear.kernel", "linear.bias"}
    assert narrow(dj.cast(nnx.as_pure(nnx.state(model, nnx.Param)), "bf16")) == {"linear.kernel", "linear.bias"}
    assert cast(jnp.ones((2, 4))).shape == (2, 4)


def test_what_is_no_weight_is_the_same_object() -> None:
    tree = OrderedDict(
        integer=jnp.arange(3),
        flag=jnp.bool_(True),
        complex=jnp.complex64([1j]),
        key=KEY,
        number=0.5,
        nothing=None,
        text="text",
        float8=jnp.ones(2, jnp.float8_e4m3fn),
        weight=(np.ones(2, np.float32), jnp.ones((0, 3))),
    )
    cast = dj.cast(tree, "bf16")
    assert all(cast[name] is tree[name] for name in tree if name != "weight")
    assert [leaf.dtype for leaf in cast["weight"]] == [jnp.bfloat16] * 2
    with jax.enable_x64(True):
        assert dj.cast({"a": jnp.ones(1, "float64"), "b": jnp.ones(1, "float32")}, "bf16")["a"].dtype == jnp.float64


def test_rounding_is_that_of_the_tails_under_jit_too() -> None:
    # ties go away from zero in BF16, to even in FP16; convert would take both to even
    params = {"w": jnp.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, -0.0, jnp.inf])}
    for cast in (dj.cast, jax.jit(dj.cast, static_argnums=1)):
        assert cast(params, "bf16")["w"].tolist() == [1.0078125, 1.015625, 1, 0, jnp.inf]
        assert cast(params, "fp16")["w"].tolist() == [1.00390625, 1.01171875, 1, 0, jnp.inf]
    again = dj.cast(dj.cast(params, "bf16"), "fp32")["w"]
    assert (again.dtype, again.tolist()[0]) == (jnp.float32, 1.0078125)


@pytest.mark.parametrize(
    ("tree", "policy", "message"),
    [
        ({"n": jnp.arange(3)}, "bf16", "no float32, bfloat16 or float16 array to cast in this dict"),
        ({}, "bf16", "no float32, bfloat16 or float16 array to cast"),
        (None, "bf16", "array to cast in this NoneType"),
        ({"w": 1.0}, "bf16", "array to cast in this dict"),
        ({"w": jnp.float32([7e4])}, "fp16", r'"w" holds 70000, beyond FP16.*"w: param=float32,compute=float32"'),
        ({"head": jnp.ones(1)}, "bf16; haed: param=float32", "holds for no weight, whose paths are such as head;"),
        ({"w": jnp.ones(1)}, "bf16; type=Linear: param=float32", "for nothing in this pytree has a class"),
        (EquinoxModel(), "bf16; type=Linaer: param=float32", "its classes are Linear"),
        ({"w": jnp.ones(1)}, "bf16,frozen=tail", "JAX has no frozen=tail"),
        ({"w": jnp.ones(1)}, "bf61", "bf61"),
        ({"w": jnp.ones(1)}, jnp.bfloat16, 'a policy is a text such as "bf16"'),
    ],
)
def test_bad_input_is_a_sentence(tree: object, policy: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dj.cast(tree, policy)


def test_a_finite_weight_that_fp16_still_holds_is_cast() -> None:
    assert dj.cast({"w": jnp.float32([65519.0])}, "fp16")["w"].tolist() == [65504.0]
