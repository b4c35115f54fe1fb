"""Marks of losses that were not finite: which arithmetic keeps them, and that nothing else is taken for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from duotone.jax.loss_marks import is_marked, mark

DTYPES = ["float32", "float16", "bfloat16"]
YES, NO = jnp.bool_(True), jnp.bool_(False)


def tree(dtype):
    return {"a": jnp.ones((3, 4), dtype), "b": jnp.zeros((), dtype), "count": jnp.int32(1), "none": None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mark_is_seen_in_and_out_of_jit_and_no_mark_changes_nothing(dtype):
    for function in (mark, jax.jit(mark)):
        marked, unmarked = function(tree(dtype), NO), function(tree(dtype), YES)
        assert is_marked(marked)
        assert jax.jit(is_marked)(marked)
        assert all(jnp.isnan(marked[name]).all() for name in ("a", "b"))
        assert marked["count"] == 1
        assert marked["a"].dtype == dtype
        assert not is_marked(unmarked)
        jax.tree.map(np.testing.assert_array_equal, unmarked, tree(dtype))


# what users do with gradients
@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.astype(jnp.float32),
        lambda grad: grad / 3,
        lambda grad: -2.0 * grad,
        lambda grad: jnp.ones_like(grad) + grad,
        lambda grad: grad + jnp.inf,
        lambda grad: grad[:1],
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arithmetic_on_cpus_keeps_marks(dtype, change):
    assert jax.jit(lambda grads: is_marked(jax.tree.map(change, grads)))(mark([jnp.ones((3, 4), dtype)], NO))


def test_one_device_s_loss_marks_the_mean_of_all():
    mesh = Mesh(jax.devices(), ("data",))

    def averaged(finite):
        return is_marked(lax.pmean(mark({"w": jnp.ones(3)}, finite[0]), "data"))

    spread = jax.shard_map(averaged, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    assert spread(jnp.array([True, True, False, True]))
    assert not spread(jnp.array([True] * 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nans_of_arithmetic_are_no_marks(dtype):
    zero = jnp.zeros(3, dtype)
    # the last is how NVIDIA's return it
    bits = np.uint32(0x7FFFFFFF) if dtype == "float32" else np.uint16(0x7FFF)

    @jax.jit
    def found(zero):
        nans = [
            zero / zero,
            jnp.full(3, jnp.nan, dtype),
            jnp.inf - (zero + jnp.inf),
            jnp.sqrt(zero - 1),
            zero + jnp.inf,
        ]
        nans.append(lax.bitcast_convert_type(jnp.full(3, bits), dtype))
        return [is_marked([each]) for nan in nans for each in (nan, -nan)]

    assert not any(found(zero))


def test_fp64_has_marks_too():
    with jax.enable_x64(True):
        marked = mark([jnp.ones(3, jnp.float64)], jnp.bool_(False))
        assert marked[0].dtype == jnp.float64
        assert is_marked(marked)
        assert is_marked([marked[0].astype(jnp.float32)])


@pytest.mark.parametrize("grads", [None, {}, [jnp.zeros((0, 3))], [jnp.int32(3)]])
def test_a_tree_without_a_floating_number_has_no_mark(grads):
    assert not is_marked(mark(grads, NO))


def test_marks_do_not_stand_in_the_way_of_a_second_derivative():
    def first(x):
        return mark(jax.grad(lambda x: x**3)(x), YES)

    assert jax.grad(first)(2.0) == 12.0
