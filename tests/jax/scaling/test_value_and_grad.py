"""Gradients of scaled losses: true values and dtypes, whatever transform is around, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import duotone.jax as dj
from duotone.errors import LossScaleError, OptimizerError
from duotone.jax.loss_marks import is_marked
from duotone.loss_scale import LossScale


def state_of(policy="fp16", settings=None):
    """Return a state of `masters` of one weight; where FP16 is scaled, by a static scale."""
    settings = settings or (LossScale.static(2.0**14) if policy.startswith("fp16") else LossScale.none())
    return dj.masters(optax.identity(), policy, loss_scale=settings).init(jnp.float32(0))


def loss_of(params, x):
    return jnp.mean((x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) + params["b"])


PARAMS = {"w": jnp.linspace(-1, 1, 6, dtype=jnp.float16).reshape(3, 2), "b": jnp.zeros(2)}
value_and_grad = dj.value_and_grad
X = jnp.linspace(0, 1, 12).reshape(4, 3)


def check_equal(found, expected, rtol=0.0):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol), found, expected)


def test_the_loss_is_the_true_one_and_gradients_are_true_in_fp32():
    loss, grads = jax.jit(value_and_grad(loss_of))(state_of(), PARAMS, X)
    expected, true = jax.value_and_grad(loss_of)(jax.tree.map(jnp.float32, PARAMS), X)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert {name: grad.dtype.name for name, grad in grads.items()} == {"w": "float32", "b": "float32"}
    check_equal(grads, true, rtol=2e-3)


def test_gradients_that_fp16_would_lose_are_there():
    # 2**-30 is less than half of FP16's smallest number
    def tiny(w):
        return (w * jnp.float16(2.0**-15)).astype(jnp.float32) * 2.0**-15

    w = jnp.float16(1)
    assert jax.grad(tiny)(w) == 0
    _, grad = value_and_grad(tiny)(state_of(), w)
    assert grad == 2.0**-30


def test_an_overflow_stays_one_and_carries_no_mark():
    loss, grads = jax.jit(value_and_grad(lambda w: (w * w).astype(jnp.float32)))(state_of(), jnp.float16(200))
    assert loss == 40000
    # a NaN and no Inf, which an elementwise clip would hide
    assert jnp.isnan(jnp.clip(grads, -1, 1))
    assert not is_marked(grads)


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_a_loss_that_is_not_finite_marks_all_gradients(policy):
    def infinite(params, x):
        # finite gradients of an infinite loss
        return loss_of(params, x) + jnp.inf

    loss, grads = jax.jit(value_and_grad(infinite))(state_of(policy), PARAMS, X)
    assert loss == jnp.inf
    assert is_marked(grads)


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("bf16", "bfloat16"), ("bf16,grad=float32", "float32"), ("fp16,loss_scale=1", "float16")],
)
def test_where_nothing_is_scaled_gradients_have_the_dtypes_of_the_policy(policy, dtype):
    params = {"w": PARAMS["w"].astype("bfloat16" if policy.startswith("bf16") else "float16")}
    settings = LossScale.none()
    loss, grads = value_and_grad(lambda p, x: (x.astype(p["w"].dtype) @ p["w"]).sum())(
        state_of(policy, settings), params, X
    )
    assert loss.dtype == params["w"].dtype
    assert grads["w"].dtype == dtype


def test_it_scales_nothing_where_there_is_no_scale():
    program = jax.make_jaxpr(value_and_grad(lambda w: w.sum()))(state_of("bf16"), jnp.ones(2, jnp.bfloat16))
    assert not {"mul", "div"} & {eqn.primitive.name for eqn in program.eqns}


def test_the_gradients_of_growing_scales_are_the_same():
    # a scale that doubles between the loss and the update must not halve them
    step = jax.jit(value_and_grad(loss_of))
    first, *others = [step(state_of(settings=LossScale.static(2.0**n)), PARAMS, X)[1] for n in (0, 7, 14)]
    for grads in others:
        check_equal(grads, first)


def test_arguments_of_jax_s_own():
    def function(a, b, *, factor=1.0):
        return a * b * factor, {"sum": a + b}

    (loss, aux), grads = value_and_grad(function, argnums=(0, 1), has_aux=True)(state_of(), 2.0, 3.0, factor=2.0)
    assert (loss, aux["sum"], *grads) == (12.0, 5.0, 6.0, 4.0)
    _, grads = value_and_grad(lambda w, n: w * n, argnums=(0, 1), allow_int=True)(state_of(), 2.0, 3)
    assert grads[0] == 3
    assert grads[1].dtype == jax.dtypes.float0


def test_gradients_are_added_up_in_fp32_over_micro_batches():
    micro_batches = jnp.stack([X, X + 1, X - 1])

    @jax.jit
    def accumulated(state, params):
        def body(total, x):
            loss, grads = value_and_grad(loss_of)(state, params, x)
            return jax.tree.map(jnp.add, total, grads), loss

        zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), params)
        total, losses = lax.scan(body, zeros, micro_batches)
        return losses.mean(), jax.tree.map(lambda grad: grad / 3, total)

    loss, grads = accumulated(state_of(), PARAMS)
    expected_loss, expected = value_and_grad(lambda p, xs: jax.vmap(partial(loss_of, p))(xs).mean())(
        state_of(), PARAMS, micro_batches
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    check_equal(grads, expected, rtol=2e-3)


def test_per_example_gradients_and_their_marks_by_vmap():
    xs = X.at[2, 1].set(jnp.nan)
    per_example = jax.jit(jax.vmap(value_and_grad(loss_of), in_axes=(None, None, 0)))
    losses, grads = per_example(state_of(), PARAMS, xs)
    assert grads["w"].shape == (4, 3, 2)
    assert jax.vmap(is_marked)(grads).tolist() == jnp.isnan(losses).tolist() == [False, False, True, False]


def test_many_states_at_once_each_with_its_scale():
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state_of())
    losses, grads = jax.vmap(value_and_grad(loss_of), in_axes=(0, None, None))(states, PARAMS, X)
    check_equal(grads["w"][0], grads["w"][1])
    assert losses.shape == (2,)


def on_four_devices(step, **settings):
    """Return a function of state, parameters and a batch, of which every device has a quarter."""
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    mesh = Mesh(jax.devices(), ("data",))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), **settings))


def test_devices_average_true_gradients():
    def step(state, params, x):
        return lax.pmean(value_and_grad(loss_of)(state, params, x), "data")

    found = on_four_devices(step, check_vma=False)(state_of(), PARAMS, X)
    check_equal(found, jax.jit(value_and_grad(loss_of))(state_of(), PARAMS, X), rtol=2e-3)


def test_gradients_that_shard_map_sums_itself_stay_the_same_on_all_devices():
    def step(state, params, x):
        # the sum over devices of the gradients of shared parameters
        _, grads = value_and_grad(loss_of)(state, params, x)
        return grads, is_marked(grads)

    run = on_four_devices(step)
    grads, marked = run(state_of(), PARAMS, X)
    assert not marked
    expected = jax.jit(value_and_grad(loss_of))(state_of(), PARAMS, X)[1]
    check_equal(grads, jax.tree.map(lambda grad: 4 * grad, expected), rtol=2e-3)
    # the loss of one device marks the gradients of all
    assert run(state_of(), PARAMS, X.at[3, 0].set(jnp.inf))[1]


def test_it_can_be_differentiated():
    _, hessian = value_and_grad(lambda w: value_and_grad(lambda w: w**3)(state_of(), w)[1])(state_of(), 2.0)
    assert hessian == 12.0


def test_x64_leaves_fp64_alone():
    with jax.enable_x64(True):
        loss, grad = value_and_grad(lambda w: w * 3)(state_of(), jnp.float64(0.1))
        assert (loss.dtype, grad.dtype, grad) == (jnp.float64, jnp.float64, 3.0)
        _, grad = value_and_grad(lambda w: w * 3)(state_of(), jnp.float16(0.1))
        assert grad.dtype == jnp.float32


def test_its_signature_counts_the_state():
    step = jax.jit(value_and_grad(lambda w, power: w**power), static_argnums=2)
    assert step(state_of(), 2.0, 3)[1] == 12.0


@pytest.mark.parametrize("around", [lambda s: (s,), lambda s: {"opt": [None, s]}, lambda s: (1, (s, jnp.ones(2)))])
def test_the_state_is_found_inside_of_others(around):
    assert value_and_grad(lambda w: w * 2)(around(state_of()), 1.0)[1] == 2.0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: value_and_grad(lambda w: w * 2)(state_of(), jnp.ones(3)),
            "the loss has shape (3,), not (); take its mean or its sum",
        ),
        (
            lambda: value_and_grad(lambda w: (w * 2).astype(int))(state_of(), 1.0),
            "a loss must be a floating-point number, not int32",
        ),
        (
            lambda: value_and_grad(lambda w: (w, w))(state_of(), 1.0),
            "the loss is a tuple; return one number, or (loss, aux) and write has_aux=True",
        ),
        (
            lambda: value_and_grad(lambda w: w, has_aux=True)(state_of(), 1.0),
            "with has_aux=True the function returns a pair of the loss and something else, but it returned one "
            "value; return (loss, aux), or leave has_aux out",
        ),
    ],
)
def test_what_is_refused(call, expected):
    with pytest.raises(LossScaleError) as caught:
        call()
    assert str(caught.value) == expected


def test_the_first_argument_is_the_state():
    with pytest.raises(OptimizerError, match=r"^there is no state of duotone\.jax\.masters in this dict"):
        value_and_grad(loss_of)(PARAMS, state_of(), X)
