"""What a step did, from the state, in and out of jit, and wherever the state is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import duotone.jax as dj
from duotone.errors import OptimizerError

PARAMS = {"w": jnp.float32([3.0, 4.0])}


def loss_of(params, factor):
    return (params["w"].astype(jnp.float32) * factor).sum()


def run(tx, params, factors):
    """Return the reports of steps by one scan over factors of the loss."""
    state = tx.init(params)
    params = dj.cast(params, "fp16")

    def step(carry, factor):
        params, state = carry
        _, grads = dj.value_and_grad(loss_of)(state, params, factor)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), dj.report(state)

    return jax.jit(lambda: lax.scan(step, (params, state), factors))()


def test_reports_of_a_scan_are_stacked():
    settings = dj.LossScale.static(2.0**10)
    # 2**10 is the scale: the third step's gradient overflows FP16, the others' do not
    (_, state), reports = run(
        dj.masters(optax.sgd(0.1), "fp16", loss_scale=settings), PARAMS, jnp.float32([1.0, 2.0, 1e4, 1e4, 0.5])
    )
    assert reports.skipped.tolist() == [False, False, True, True, False]
    assert reports.skipped_in_a_row.tolist() == [0, 0, 1, 2, 0]
    assert reports.skipped_in_all.tolist() == [0, 0, 1, 2, 2]
    assert reports.loss_scale.tolist() == [2.0**10] * 5
    root = np.sqrt(np.float32(2))
    np.testing.assert_allclose(reports.grad_norm, [root, 2 * root, np.nan, np.nan, root / 2], rtol=1e-6)
    assert jax.tree.map(lambda leaf: leaf[-1].item(), reports) == jax.tree.map(lambda x: x.item(), dj.report(state))


def test_the_scale_is_the_one_that_the_loss_was_multiplied_by():
    # grows after every step that it can
    settings = dj.LossScale(2.0**4, growth_interval=1)
    (_, state), reports = run(
        dj.masters(optax.sgd(0.0), "fp16", loss_scale=settings), PARAMS, jnp.float32([1.0, 1.0, 1e4, 1.0])
    )
    assert reports.loss_scale.tolist() == [16.0, 32.0, 64.0, 32.0]
    assert state.loss_scale.scale == 64.0


def test_before_the_first_step_nothing_was_skipped():
    found = dj.report(dj.masters(optax.sgd(0.1), "fp16").init(PARAMS))
    assert (found.skipped, found.grad_norm, found.loss_scale, found.skipped_in_a_row) == (False, 0.0, 2.0**16, 0)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(found)] == ["bool", "float32", "float32", *["int32"] * 4]


def test_parameters_that_were_16_bit_at_the_start_are_counted():
    params = {"w": PARAMS["w"].astype(jnp.float16), "norm": jnp.ones(2)}
    assert dj.report(dj.masters(optax.sgd(0.1), "fp16").init(params)).exact_starts == 1
    assert dj.report(dj.masters(optax.sgd(0.1), "fp16").init(PARAMS)).exact_starts == 0


@pytest.mark.parametrize(
    "state_of",
    [
        lambda tx: optax.chain(optax.identity(), tx).init(PARAMS),
        lambda tx: TrainState.create(apply_fn=None, params=PARAMS, tx=tx),
        lambda tx: nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param),
        lambda tx: optax.inject_hyperparams(lambda rate: dj.masters(optax.sgd(rate), "fp16"))(0.1).init(PARAMS),
    ],
)
def test_it_is_found_wherever_the_state_is_kept(state_of):
    assert dj.report(state_of(dj.masters(optax.adamw(1e-3), "fp16"))).loss_scale == 2.0**16


def test_other_states_have_no_report():
    with pytest.raises(OptimizerError):
        dj.report(optax.adam(1e-3).init(PARAMS))


def test_nothing_of_it_waits_for_the_device():
    tx = dj.masters(optax.sgd(0.1), "fp16")
    state = tx.init(PARAMS)
    with jax.transfer_guard("disallow"):
        dj.report(state)
    # nor does a step: no callback to the host is in the program
    step = jax.make_jaxpr(lambda state: (dj.value_and_grad(loss_of)(state, PARAMS, 1.0), dj.report(state)))(state)
    assert "callback" not in str(step)


def test_a_report_shows_itself_where_there_are_numbers_and_where_there_are_none():
    found = dj.report(dj.masters(optax.sgd(0.1), "fp16").init(PARAMS))
    assert repr(found).startswith("StepReport(skipped=False, grad_norm=0, loss_scale=65536, skipped_in_a_row=0")
    assert "loss_scale=[65536. 65536.]" in repr(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), found))
    shown = []
    jax.make_jaxpr(lambda found: shown.append(repr(found)))(found)
    assert "float32[]" in shown[0]
