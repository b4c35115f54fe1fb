"""A loss scale in JAX: the trajectory of Python, wherever it is traced, and jmp's behaviours of loss scales."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from duotone.jax.loss_scale import after_step, initial_state
from duotone.loss_scale import LossScale, LossScaleState, init_state, update

NAMES = [field.name for field in fields(LossScaleState)]
SETTINGS = {
    "dynamic": LossScale(),
    "short windows": LossScale(2.0**8, growth_interval=3, hysteresis=2, max_scale=2.0**9),
    "wide": LossScale(2.0**100, growth_factor=2.0**8, growth_interval=1, min_scale=2.0**-126, max_scale=2.0**127),
    "falls alone": LossScale(growth_factor=1.0),
    "static": LossScale.static(2.0**10),
    "none": LossScale.none(),
}
STEPS = 100


def drawn(seed):
    """Return flags of overflows and of finite losses, bool, (STEPS, 4): rare ones, many, none, and all."""
    random = np.random.default_rng(seed)
    overflows = random.random((STEPS, 4)) < np.array([0.03, 0.5, 0.0, 1.0])
    # the search's overflow comes first in most runs
    overflows[0, :2] = True
    return overflows, random.random((STEPS, 4)) < 0.8


def in_python(settings, overflows, finite):
    """Return the states after each step, each a row of numbers."""
    state, rows = init_state(settings), []
    for found_inf, loss_is_finite in zip(overflows.tolist(), finite.tolist(), strict=True):
        state = update(settings, state, found_inf, loss_is_finite=loss_is_finite)
        rows.append([float(getattr(state, name)) for name in NAMES])
    return np.array(rows)


def rows_of(states):
    return np.stack([np.asarray(getattr(states, name), np.float64) for name in NAMES], axis=-1)


def check_types(state):
    assert {name: getattr(state, name).dtype.name for name in NAMES} == {
        name: "float32" if name == "scale" else "int32" for name in NAMES
    }
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("x64", [False, True])
def test_the_trajectory_is_python_s_under_scan_and_vmap(name, x64):
    settings, (overflows, finite) = SETTINGS[name], drawn(7)

    def run(overflows, finite):
        def body(state, flags):
            after = after_step(settings, state, *flags)
            return after, after

        return lax.scan(body, initial_state(settings), (overflows, finite))[1]

    with jax.enable_x64(x64):
        states = jax.jit(jax.vmap(run, in_axes=1))(overflows, finite)
        check_types(states)
    for column in range(4):
        expected = in_python(settings, overflows[:, column], finite[:, column])
        np.testing.assert_array_equal(rows_of(states)[column], expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trajectory_is_python_s_under_jit_step_by_step(name):
    settings, (overflows, finite) = SETTINGS[name], drawn(8)
    step = jax.jit(lambda state, *flags: after_step(settings, state, *flags))
    for column in range(2):
        state, found = initial_state(settings), []
        for flags in zip(overflows[:30, column], finite[:30, column], strict=True):
            state = step(state, *flags)
            check_types(state)
            found.append(rows_of(state))
        np.testing.assert_array_equal(found, in_python(settings, overflows[:30, column], finite[:30, column]))
    # states that were saved, and those of another process, have the same types: one program for all
    assert step._cache_size() == 1


@pytest.mark.parametrize("flag", [jnp.bool_(True), jnp.float32(1), jnp.int32(3), jnp.float32(jnp.nan)])
def test_every_kind_of_flag_is_an_overflow(flag):
    state = jax.jit(lambda flag: after_step(LossScale(), initial_state(LossScale()), flag))(flag)
    assert (state.scale, state.skipped) == (1.0, 1)
    check_types(state)


def test_a_state_is_a_pytree_with_key_paths():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(initial_state(LossScale()))]
    assert paths == [f".{name}" for name in NAMES]


def test_a_state_can_be_made_inside_of_jit():
    check_types(jax.jit(lambda: initial_state(LossScale()))())


def test_the_step_of_a_scale_that_stands_still_is_no_more_than_counting():
    program = jax.make_jaxpr(lambda state, flag: after_step(LossScale.none(), state, flag))(
        initial_state(LossScale.none()), jnp.bool_(False)
    )
    assert "mul" not in {eqn.primitive.name for eqn in program.eqns}


# what jmp's own tests ask of its loss scales: growth after a period, halving down to a floor, one that is given
@pytest.mark.parametrize(("period", "factor"), [(20, 2), (30, 4)])
def test_as_in_jmp_the_scale_grows_when_a_period_was_finite(period, factor):
    settings = LossScale(8.0, growth_factor=factor, growth_interval=period)
    step = jax.jit(lambda state: after_step(settings, state, jnp.bool_(False)))
    state = initial_state(settings)
    for clean in range(1, period):
        state = step(state)
        assert (state.scale, state.growth_tracker) == (8.0, clean)
    state = step(state)
    assert (state.scale, state.growth_tracker) == (8.0 * factor, 0)


@pytest.mark.parametrize("floor", [1.0, 0.25, 2.0**-100])
def test_as_in_jmp_the_scale_falls_to_its_floor_and_no_further(floor):
    settings = LossScale(16.0, min_scale=floor, growth_factor=1.0)
    step = jax.jit(lambda state: after_step(settings, state, jnp.bool_(True)))
    state = initial_state(settings)
    for overflow in range(1, 120):
        # a map over the leaves keeps the floor, which jmp's loses
        state = jax.tree.map(lambda leaf: leaf + 0, step(state))
        assert (state.scale, state.skipped) == (max(floor, 16.0 / 2**overflow), overflow)


def test_the_scale_stops_at_its_ceiling():
    settings = LossScale(2.0**30, growth_interval=1, max_scale=2.0**127)
    state = lax.fori_loop(
        0, 200, lambda _, state: after_step(settings, state, jnp.bool_(False)), initial_state(settings)
    )
    assert state.scale == 2.0**127
