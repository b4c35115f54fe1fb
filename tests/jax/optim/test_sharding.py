"""The state of `masters` on several devices: where it lies, what its program sends, and how ranks agree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import duotone.jax as dj
from duotone.errors import OptimizerError
from duotone.jax.optim import start

SPECS = {"kernel": P("data", None), "table": P(None, "data"), "bias": P()}
SHAPES = {"kernel": (8, 6), "table": (3, 4), "bias": (6,)}


def mesh_of(count: int = 4, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


def placed(mesh: jax.sharding.Mesh, tree: dict) -> dict:
    return {name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name])) for name, leaf in tree.items()}


def parameters(dtype: str = "float32", seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_same_bits(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_step(one: tuple, other: tuple) -> None:
    """Compare parameters and state after a step: XLA's CPU compiler contracts multiply-adds in some loops alone."""
    pairs = [(dj.master_weights(*each), each[1].inner) for each in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def assert_lies_beside(state: object, params: dict) -> int:
    """Check each array of a parameter's shape, whose path ends in its name, and return how many there are."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = getattr(path[-1], "key", None)
        if name in params and leaf.shape == params[name].shape:
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), jax.tree_util.keystr(path)
            found += 1
    return found


@pytest.mark.parametrize("under", [lambda init: init, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tails_and_moments_lie_where_the_parameters_lie(under, dtype):
    params = placed(mesh_of(), parameters(dtype))
    tx = dj.masters(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), "bf16")
    assert assert_lies_beside(under(tx.init)(params), params) == 3 * len(params)


def test_without_that_jit_would_put_all_moments_on_every_device(monkeypatch):
    monkeypatch.setattr(start, "placed_beside", lambda state, params: state)
    params = placed(mesh_of(), parameters())
    with pytest.raises(AssertionError, match="mu"):
        assert_lies_beside(jax.jit(dj.masters(optax.adam(1e-3), "bf16").init)(params), params)


def test_a_new_state_is_the_same_numbers_wherever_it_is_made():
    params = parameters()
    params["bias"] = params["bias"].at[:2].set(jnp.array([jnp.nan, jnp.inf]))
    tx = dj.masters(
        optax.multi_transform(
            {"a": optax.adagrad(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, {"kernel": "a", "table": "b", "bias": "a"}
        ),
        "fp16",
    )
    assert_same_bits(jax.jit(tx.init)(params), tx.init(params))


def test_a_partitioned_step_sends_numbers_and_no_arrays_and_gives_what_one_device_gives():
    tx = dj.masters(optax.adamw(1e-2), "bf16")
    masters, grads = parameters(), parameters("bfloat16", seed=1)
    params = dj.cast(masters, "bf16")
    alone = jax.jit(step_of(tx))(params, tx.init(masters), grads)
    mesh = mesh_of()
    given = placed(mesh, params), jax.jit(tx.init)(placed(mesh, masters)), placed(mesh, grads)
    compiled = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(*given).compile()
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    # no more than two sums for each gradient, and whether the loss was finite
    for shape in re.findall(r"= \w+\[([\d,]*)\][^=]* all-reduce\(", text):
        assert np.prod([int(each) for each in shape.split(",") if each]) <= 2 * len(params) + 1
    many = compiled(*given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given[0], given[1].tails, given[1].inner)))
    assert_lies_beside(many, given[2])
    assert_same_step(many, alone)


def test_explicit_axes_of_a_mesh_stay_in_the_types():
    mesh = mesh_of(kind=AxisType.Explicit)
    tx = dj.masters(optax.adamw(1e-2), "fp16", clip_norm=1.0)
    with jax.set_mesh(mesh):
        masters = placed(mesh, parameters())
        params = dj.cast(masters, "fp16")
        state = jax.jit(tx.init)(masters)
        assert_lies_beside(state, params)
        new, state = jax.jit(step_of(tx))(params, state, placed(mesh, parameters(seed=1)))
    for name, leaf in new.items():
        assert jax.typeof(leaf) == jax.typeof(params[name])
    assert assert_lies_beside((new, state), params) == 4 * len(params)


@pytest.mark.parametrize("check_vma", [True, False])
def test_ranks_of_a_shard_map_agree_on_norm_and_skips(check_vma):
    """Every rank has a part of the kernel, and all of the bias; one of them overflows."""
    mesh = mesh_of()
    masters = {"kernel": parameters()["kernel"]} | ({"bias": parameters()["bias"]} if check_vma else {})
    specs = {name: SPECS[name] for name in masters}
    alone = dj.masters(optax.adamw(1e-2), "fp16", clip_norm=0.5)
    tx = alone if check_vma else dj.masters(optax.adamw(1e-2), "fp16", clip_norm=0.5, axis_name="data")
    params = dj.cast(masters, "fp16")
    state = tx.init(masters)
    state_specs = jax.tree_util.tree_map_with_path(
        lambda path, _: specs.get(getattr(path[-1], "key", None), P()), state
    )
    types = (specs, state_specs)
    mapped = jax.shard_map(step_of(tx), mesh=mesh, in_specs=(*types, specs), out_specs=types, check_vma=check_vma)
    mapped, whole = jax.jit(mapped), jax.jit(step_of(alone))
    grads = {name: parameters(seed=1)[name] for name in masters}
    new, after = mapped(params, state, grads)
    expected, expected_after = whole(params, state, grads)
    np.testing.assert_allclose(after.grad_norm, expected_after.grad_norm, rtol=1e-6)
    for one, other in zip(
        jax.tree.leaves((new, after.inner)), jax.tree.leaves((expected, expected_after.inner)), strict=True
    ):
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-3, atol=1e-6)
    # on the third rank alone
    grads["kernel"] = grads["kernel"].at[5, 0].set(jnp.inf)
    kept, skipped = mapped(new, after, grads)
    assert_same_bits((kept, skipped.tails, skipped.inner), (new, after.tails, after.inner))
    assert bool(skipped.found_inf)
    assert int(skipped.loss_scale.skipped) == 1
    np.testing.assert_array_equal(skipped.non_finite, whole(params, state, grads)[1].non_finite)


def test_an_axis_that_is_not_there_is_an_error():
    tx = dj.masters(optax.sgd(0.1), "bf16", axis_name="data")
    params = parameters("bfloat16")
    with pytest.raises(OptimizerError, match="axis_name='data' names no axis here"):
        tx.update(params, tx.init(params), params)


def test_orbax_saves_every_bit_and_restores_it_onto_another_mesh(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = dj.masters(optax.adamw(1e-2), "bf16")
    masters = placed(mesh_of(), parameters())
    params, state = jax.jit(step_of(tx))(
        dj.cast(masters, "bf16"), jax.jit(tx.init)(masters), placed(mesh_of(), parameters("bfloat16", seed=1))
    )
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        pair = placed(mesh_of(2), masters)
        abstract = {"params": dj.cast(pair, "bf16"), "state": jax.jit(tx.init)(pair)}
        restored = checkpointer.restore(
            tmp_path / "step", jax.tree.map(checkpoint.utils.to_shape_dtype_struct, abstract)
        )
    assert_same_bits(restored, {"params": params, "state": state})
    assert restored["state"].settings == state.settings
    assert assert_lies_beside(restored["state"], abstract["params"]) == 3 * len(params)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored["params"])} == {2}
    grads = parameters("bfloat16", seed=2)
    again = jax.jit(step_of(tx))(restored["params"], restored["state"], placed(mesh_of(2), grads))
    assert_same_step(again, jax.jit(step_of(tx))(params, state, placed(mesh_of(), grads)))


def test_equinox_writes_and_reads_every_bit(tmp_path):
    eqx = pytest.importorskip("equinox")
    tx = dj.masters(optax.adamw(1e-2), "fp16")
    state = tx.init(parameters())
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    read = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", tx.init(parameters(seed=3)))
    assert_same_bits(read, state)
