"""autocast with meshes, shard_map, kernels, callbacks and ordered effects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import duotone.jax as dj

from .equations import WEIGHT, X, assert_near, operand_dtypes

BATCH = jax.random.normal(jax.random.key(2), (8, 8))


def mesh(kind: AxisType = AxisType.Auto):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def test_shardings_are_kept() -> None:
    place = NamedSharding(mesh(), P("data"))

    def loss(weight, x):
        return jnp.tanh(lax.with_sharding_constraint(x @ weight, place)).sum()

    weight = jax.device_put(WEIGHT, NamedSharding(mesh(), P(None, "data")))
    found = jax.jit(jax.grad(dj.autocast(loss, "bf16")), out_shardings=weight.sharding)(
        weight, jax.device_put(BATCH, place)
    )
    assert found.sharding == weight.sharding
    assert_near(found, jax.grad(lambda w, x: jnp.tanh(x @ w).sum())(WEIGHT, BATCH))


def test_an_inner_jit_keeps_its_shardings() -> None:
    place = NamedSharding(mesh(), P("data"))
    inner = jax.jit(lambda x, weight: x @ weight, in_shardings=(place, None), out_shardings=place)
    fast = dj.autocast(lambda weight, x: inner(x, weight), "bf16")
    assert operand_dtypes(fast, WEIGHT, BATCH) == ["bfloat16"]
    found = jax.jit(fast)(WEIGHT, BATCH)
    assert found.sharding.is_equivalent_to(place, 2)
    assert_near(found, BATCH @ WEIGHT)


def test_sharding_in_types() -> None:
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x, weight = jax.device_put(BATCH, P("data", None)), jax.device_put(WEIGHT, P(None, None))

        def loss(weight, x):
            return jnp.tanh(jnp.einsum("bi,ij->bj", x, weight, out_sharding=P("data", None)) * 0.999 + 1e-12).sum()

        found = jax.jit(jax.grad(dj.autocast(loss, "fp16")))(weight, x)
        assert_near(found, jax.grad(loss)(weight, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shard_map_inside(dtype: str) -> None:
    def loss(weight, x):
        def local(weight, x):
            return lax.psum(jnp.tanh(x @ weight * 0.999).sum(), "data")

        return jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())(weight, x)

    fast, weight = dj.autocast(loss, "bf16"), WEIGHT.astype(dtype)
    assert set(operand_dtypes(fast, weight, BATCH)) == {"bfloat16"}
    assert_near(jax.jit(fast)(weight, BATCH), loss(WEIGHT, BATCH))
    grads = jax.jit(jax.grad(fast))(weight, BATCH)
    assert grads.dtype == dtype
    assert_near(grads, jax.grad(loss)(WEIGHT, BATCH))


def test_shard_map_outside() -> None:
    fast = dj.autocast(lambda weight, x: lax.pmean(jax.nn.softmax(x @ weight).max(), "data"), "bf16")
    found = jax.shard_map(fast, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())(WEIGHT, BATCH)
    assert_near(found, jax.nn.softmax(BATCH @ WEIGHT).reshape(4, 2, 8).max((1, 2)).mean())


def double(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def test_kernels_run_on_what_they_were_traced_for() -> None:
    fast = dj.autocast(lambda weight, x: double(x @ weight) @ weight, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="pallas_call") == ["float32"]
    assert operand_dtypes(fast, WEIGHT, X) == ["bfloat16", "bfloat16"]
    assert_near(jax.jit(fast)(WEIGHT, X), 2 * (X @ WEIGHT) @ WEIGHT)


def test_callbacks_get_what_they_were_traced_for() -> None:
    seen = []

    def twice(array):
        seen.append(array.dtype)
        return np.asarray(array) * 2

    def forward(weight, x):
        hidden = x @ weight
        return jax.pure_callback(twice, jax.ShapeDtypeStruct(hidden.shape, jnp.float32), hidden)

    assert_near(jax.jit(dj.autocast(forward, "bf16"))(WEIGHT, X), 2 * (X @ WEIGHT))
    assert {str(each) for each in seen} == {"float32"}


def test_ordered_effects_keep_their_order() -> None:
    seen = []

    def forward(weight, x):
        def turn(h, number):
            h = jnp.tanh(h @ weight)
            io_callback(lambda each: seen.append(int(each)), None, number, ordered=True)
            return h, None

        jax.debug.print("{}", x.sum(), ordered=True)
        return lax.scan(turn, x, jnp.arange(3))[0]

    jax.block_until_ready(jax.jit(dj.autocast(forward, "bf16"))(WEIGHT, X))
    jax.effects_barrier()
    assert seen == [0, 1, 2]


def test_references_hold_what_they_were_made_for() -> None:
    def forward(weight, x):
        total = jax.new_ref(jnp.zeros((5, 8)))
        total[...] = x @ weight
        total[...] += x @ weight
        return total[...]

    assert_near(jax.jit(dj.autocast(forward, "bf16", save="everything"))(WEIGHT, X), 2 * (X @ WEIGHT))


def test_exported_with_symbolic_sizes() -> None:
    from jax import export

    fast = jax.jit(dj.autocast(lambda weight, x: jax.nn.softmax(x @ weight + weight[0]), "bf16"))
    (size,) = export.symbolic_shape("batch")
    exported = export.export(fast)(WEIGHT, jax.ShapeDtypeStruct((size, 8), jnp.float32))
    assert_near(exported.call(WEIGHT, X), jax.nn.softmax(X @ WEIGHT + WEIGHT[0]))


def test_profiles_name_the_user_s_scopes() -> None:
    def forward(weight, x):
        with jax.named_scope("head"):
            return x @ weight

    text = jax.jit(dj.autocast(forward, "bf16")).lower(WEIGHT, X).as_text(debug_info=True)
    assert "head/dot_general" in text
