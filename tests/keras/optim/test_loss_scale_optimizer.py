"""`LossScaleOptimizer` as Keras' own is used: the same updates, skips, settings and files, without its faults."""

import keras
import numpy as np
import pytest
from keras import ops

import duotone.keras as dk
from duotone.errors import DuotoneWarning, LossScaleError, OptimizerError, PolicyError

from .stepping import BACKEND, WAYS, state_of, step_of

SCALE = 2.0**16


def scaled(optimizer: dk.LossScaleOptimizer, *grads: float | None) -> list[np.ndarray | None]:
    """Return gradients of a loss that was scaled, as if it had been computed."""
    factor = ops.convert_to_numpy(optimizer.scale_loss(1.0))
    return [None if grad is None else np.float32(grad) * factor for grad in grads]


@pytest.mark.parametrize("way", WAYS)
def test_a_finite_step_is_the_inner_optimizers(way: str) -> None:
    variable = keras.Variable([1.0, 2.0, 3.0, 4.0])
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    step = step_of(optimizer, [variable], way)
    for done in range(3):
        assert int(ops.convert_to_numpy(optimizer.iterations)) == done
        step(scaled(optimizer, [1.0, 6.0, 7.0, 2.0]))
    np.testing.assert_array_equal(variable.numpy(), [-0.5, -7.0, -7.5, 1.0])
    report = optimizer.report()
    assert report.grad_norm == pytest.approx(90**0.5, rel=1e-6)
    assert (report.loss_scale, report.skipped, optimizer.non_finite()) == (SCALE, 0, [])


def test_apply_without_variables_takes_those_of_build() -> None:
    variable = keras.Variable([1.0])
    optimizer = dk.LossScaleOptimizer("sgd")
    optimizer.build([variable])
    optimizer.apply([ops.convert_to_tensor(grad) for grad in scaled(optimizer, [10.0])])
    np.testing.assert_allclose(variable.numpy(), [0.9], rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_skipped_step_leaves_everything_of_the_inner_optimizer(way: str, bad: float) -> None:
    variables = [keras.Variable([1.0, 2.0], name="first"), keras.Variable([3.0], name="second")]
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    inner = keras.optimizers.AdamW(schedule, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=1.0)
    optimizer = dk.LossScaleOptimizer(inner)
    step = step_of(optimizer, variables, way)
    for number in range(1, 9):
        before = [*map(np.copy, (variable.numpy() for variable in variables)), *state_of(inner)] if inner.built else []
        grads = scaled(optimizer, [0.1, 0.2], [0.3])
        if number % 2 == 0:
            grads[1][0] = bad
        step(grads)
        after = [*(variable.numpy() for variable in variables), *state_of(inner)]
        if number % 2 == 0:
            assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
            assert optimizer.non_finite() == [variables[1].path]
            assert not np.isfinite(optimizer.report().grad_norm)
        else:
            assert optimizer.non_finite() == []
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 4
    assert (optimizer.report().skipped, optimizer.report().skipped_in_a_row) == (4, 1)


@pytest.mark.parametrize("way", WAYS)
def test_overflow_at_every_step_and_place_of_a_short_run(way: str) -> None:
    """A run with one overflow ends where the run without that step ends, bit for bit."""

    def run(bad: tuple[int, int] | None) -> list[np.ndarray]:
        variables = [keras.Variable([1.0, -2.0], name="a"), keras.Variable(np.ones((2, 2)), name="b", dtype="float32")]
        inner = keras.optimizers.Adam(0.1)
        optimizer = dk.LossScaleOptimizer(inner, dk.LossScale(growth_interval=2))
        step = step_of(optimizer, variables, way)
        optimizer.scale_loss(1.0)
        rng = np.random.default_rng(0)
        for number in range(4):
            grads = [rng.normal(size=variable.shape).astype("float32") for variable in variables]
            if bad and number == bad[0]:
                lost = [grad * optimizer.report().loss_scale for grad in grads]
                flat = lost[bad[1] >= 2].reshape(-1)
                flat[bad[1] % 2 if bad[1] < 2 else bad[1] - 2] = np.inf
                step(lost)
            factor = ops.convert_to_numpy(optimizer.scale_loss(1.0))
            step([grad * factor for grad in grads])
        return [*(variable.numpy() for variable in variables), *state_of(inner)]

    expected = run(None)
    places = [(number, place) for number in range(4) for place in range(6)]
    # a compilation each
    for bad in places[:: 1 if way in ("eager", "stateless") else 13]:
        assert all(np.array_equal(a, b) for a, b in zip(expected, run(bad), strict=True)), bad


def test_the_true_gradient_is_clipped() -> None:
    variable = keras.Variable([0.0, 0.0])
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=1.0))
    step_of(optimizer, [variable], "eager")(scaled(optimizer, [0.03, 0.04]))
    np.testing.assert_allclose(variable.numpy(), [-0.03, -0.04], rtol=1e-6)
    step_of(optimizer, [variable], "eager")(scaled(optimizer, [30.0, 40.0]))
    np.testing.assert_allclose(variable.numpy(), [-0.63, -0.84], rtol=1e-6)
    assert optimizer.report().grad_norm == 50.0


@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_16_bits_become_true_ones_in_fp32(way: str) -> None:
    """1 / 65536 of an FP16 gradient is no FP16 number, but the inner optimizer sees it."""
    variable = keras.Variable([0.0])
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    optimizer.scale_loss(1.0)
    step_of(optimizer, [variable], way)([np.float16([2.0**-10])])
    assert variable.numpy()[0] == -(2.0**-26)


@pytest.mark.parametrize("way", WAYS)
def test_variables_that_take_their_gradient_are_not_unscaled(way: str) -> None:
    variables = [keras.Variable([1.0], name="amax"), keras.Variable([1.0], name="weight")]
    variables[0].overwrite_with_gradient = True
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    step = step_of(optimizer, variables, way)
    factor = ops.convert_to_numpy(optimizer.scale_loss(1.0))
    step([np.float32([7.0]), np.float32([2.0]) * factor])
    assert [variable.numpy()[0] for variable in variables] == [7.0, 0.0]
    assert optimizer.report().grad_norm == 2.0
    step([np.float32([np.inf]), np.float32([2.0]) * factor])
    assert [variable.numpy()[0] for variable in variables] == [7.0, 0.0]
    assert optimizer.non_finite() == [variables[0].path]


def test_no_gradient_and_some_of_the_variables() -> None:
    variables = [keras.Variable([1.0], name=name) for name in "abc"]
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build(variables)
    step = step_of(optimizer, variables, "eager")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        step(scaled(optimizer, [1.0], None, [0.0]))
    step(scaled(optimizer, [1.0], None, [np.inf]))
    assert optimizer.non_finite() == [variables[2].path]
    optimizer.apply([ops.convert_to_tensor(grad) for grad in scaled(optimizer, [1.0], [np.inf])], variables[1:])
    assert optimizer.non_finite() == [variables[2].path]
    optimizer.apply([ops.convert_to_tensor(grad) for grad in scaled(optimizer, [1.0])], variables[1:2])
    assert [variable.numpy()[0] for variable in variables] == [0.0, 0.0, 1.0]
    assert optimizer.non_finite() == []
    optimizer.apply([])
    assert optimizer.report().skipped == 2


@pytest.mark.parametrize("way", WAYS)
def test_gradients_accumulate_and_a_skipped_one_is_left_out(way: str) -> None:
    variable = keras.Variable([1.0])
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    step = step_of(optimizer, [variable], way)
    for grad, expected in [(2.0, 1.0), (np.inf, 1.0), (4.0, -2.0), (np.nan, -2.0), (1.0, -2.0), (1.0, -3.0)]:
        step(scaled(optimizer, [grad]))
        assert variable.numpy()[0] == expected


def test_a_forgotten_scale_loss_is_an_error() -> None:
    optimizer = dk.LossScaleOptimizer("sgd")
    variable = keras.Variable([1.0])
    with pytest.raises(LossScaleError, match="no loss was scaled, so each update would be 65536 times too small"):
        optimizer.apply([ops.ones(1)], [variable])
    assert variable.numpy()[0] == 1.0
    without = dk.LossScaleOptimizer("sgd", "bf16-mixed")
    without.apply([ops.ones(1)], [variable])
    assert variable.numpy()[0] < 1.0


@pytest.mark.parametrize("policy", ["bf16-mixed", dk.LossScale.none()])
def test_without_a_loss_scale_bad_steps_are_skipped_all_the_same(policy: str | dk.LossScale) -> None:
    variable = keras.Variable([1.0])
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0), policy)
    loss = ops.ones((), "bfloat16")
    assert optimizer.scale_loss(loss).dtype == loss.dtype
    optimizer.apply([ops.convert_to_tensor([np.float32(np.inf)])], [variable])
    optimizer.apply([ops.ones(1)], [variable])
    assert (variable.numpy()[0], optimizer.report().skipped, optimizer.report().loss_scale) == (0.0, 1, 1.0)


def test_the_loss_is_scaled_in_fp32_whatever_the_default_format() -> None:
    keras.config.set_floatx("float16")
    optimizer = dk.LossScaleOptimizer("sgd")
    assert float(ops.convert_to_numpy(optimizer.scale_loss(ops.ones((), "float16")))) == SCALE
    variable = keras.Variable([1.0], dtype="float32")
    optimizer.build([variable])
    assert keras.backend.standardize_dtype(optimizer.dynamic_scale.dtype) == "float32"
    step = step_of(optimizer, [variable], WAYS[-1])
    for grad in (1.0, np.inf, 2.0**-20):
        step([np.float16([grad])])
    assert (optimizer.report().skipped, optimizer.report().loss_scale) == (1, SCALE / 2)


def test_what_keras_refuses_is_refused_with_the_way_out() -> None:
    sgd = keras.optimizers.SGD
    for name, value in [
        ("clipnorm", 0.5),
        ("weight_decay", 0.5),
        ("use_ema", True),
        ("gradient_accumulation_steps", 2),
    ]:
        with pytest.raises(ValueError, match=f"set `{name}` on the `inner_optimizer`"):
            dk.LossScaleOptimizer(sgd(), **{name: value})
    with pytest.raises(ValueError, match="arguments: `foo`, `bar`"):
        dk.LossScaleOptimizer(sgd(), foo=True, bar=3)
    with pytest.raises(
        LossScaleError, match=r"write LossScaleOptimizer\(optimizer, LossScale\(init_scale=4.0, growth_"
    ):
        dk.LossScaleOptimizer(sgd(), initial_scale=4.0, dynamic_growth_steps=2)
    with pytest.raises(LossScaleError, match="dynamic=False is said by the policy here"):
        dk.LossScaleOptimizer(sgd(), dynamic=False)
    with pytest.raises(LossScaleError, match="not 1024"):
        dk.LossScaleOptimizer(sgd(), 1024)  # type: ignore[arg-type]
    with pytest.raises(PolicyError):
        dk.LossScaleOptimizer(sgd(), "fp17")
    for inner in (keras.optimizers.LossScaleOptimizer(sgd()), dk.LossScaleOptimizer(sgd())):
        with pytest.raises(OptimizerError, match="one loss scale is enough"):
            dk.LossScaleOptimizer(inner)
    optimizer = dk.LossScaleOptimizer(sgd())
    with pytest.raises(OptimizerError, match="this optimizer was not built"):
        optimizer.apply([ops.ones(1)])
    with pytest.raises(OptimizerError, match="apply got 1 gradients for 2 variables"):
        optimizer.apply([ops.ones(1)], [keras.Variable([1.0]), keras.Variable([1.0])])


def test_a_loss_scale_factor_inside_is_taken_away_and_said() -> None:
    variable = keras.Variable([1.0])
    with pytest.warns(DuotoneWarning, match="loss_scale_factor=100 of sgd is not used"):
        optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5, loss_scale_factor=100.0, name="sgd"))
    step_of(optimizer, [variable], "eager")(scaled(optimizer, [1.0]))
    assert variable.numpy()[0] == 0.5


def test_it_is_keras_own_to_keras() -> None:
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="mixed_float16")])
    model.compile(optimizer, "mse")
    assert model.optimizer is optimizer
    assert optimizer.learning_rate.numpy() == 0.5
    optimizer.learning_rate = 0.25
    assert optimizer.inner_optimizer.learning_rate.numpy() == 0.25
    optimizer.build(model.trainable_variables)
    assert optimizer.step_counter.numpy() == 0
    assert optimizer.variables[-len(optimizer.inner_optimizer.variables) :] == optimizer.inner_optimizer.variables


def test_decay_is_left_out_by_the_inner_optimizer() -> None:
    variables = [keras.Variable([1.0], name="kernel"), keras.Variable([1.0], name="bias")]
    optimizer = dk.LossScaleOptimizer(keras.optimizers.AdamW(0.5, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    step_of(optimizer, variables, "eager")(scaled(optimizer, [0.0], [0.0]))
    assert [variable.numpy()[0] for variable in variables] == [0.75, 1.0]


@pytest.mark.backends("jax")
def test_apply_inside_of_jit_leaves_no_tracers() -> None:
    import jax

    variable = keras.Variable([1.0])
    optimizer = dk.LossScaleOptimizer("sgd")
    optimizer.build([variable])
    optimizer.scale_loss(1.0)
    with pytest.raises(OptimizerError, match="would leave tracers in the variables"):
        jax.jit(lambda grad: optimizer.apply([grad], [variable]))(ops.ones(1))
    assert variable.numpy()[0] == 1.0
    assert optimizer.report().skipped == 0


@pytest.mark.backends("jax")
def test_64_bit_numbers_do_not_change_the_state() -> None:
    import jax

    with jax.enable_x64(True):
        variables = [keras.Variable([1.0], dtype="float64"), keras.Variable([1.0], dtype="float32")]
        optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0))
        step = step_of(optimizer, variables, "compiled")
        for grad in (1.0, np.inf, 2.0**-60):
            factor = ops.convert_to_numpy(optimizer.scale_loss(1.0))
            step([np.float64([grad]) * factor, np.float32([0.0])])
        kinds = {str(variable.value.dtype) for variable in vars(optimizer.scale_state).values()}
        assert kinds == {"float32", "int32"}
        assert variables[0].numpy()[0] == 0.0 - 2.0**-60
        assert (optimizer.report().skipped, BACKEND) == (1, "jax")
