"""`LossScaleOptimizer` in `fit`: as FP32 training where nothing overflows; compiled, in several steps, saved."""

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import duotone.keras as dk
from duotone.errors import DuotoneWarning, OptimizerError
from duotone.keras.optim import scaled_step

from .stepping import BACKEND, WAYS, state_of, step_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype("float32")
Y = RNG.integers(0, 3, 32)


# where JAX compiles for ten seconds what `test_saving` has in steps that are not compiled
slow_on_jax = pytest.mark.slow if BACKEND == "jax" else lambda test: test


def model_of(optimizer: Any, dtype: str = "mixed_float16", **settings: Any) -> keras.Model:
    """Return a compiled model of two layers, the same every time."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="relu", dtype=dtype), keras.layers.Dense(3, dtype=dtype)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if BACKEND == "tensorflow":
        # XLA compiles for seconds, and some tests ask for it
        settings.setdefault("jit_compile", False)
    model.compile(optimizer, loss, **settings)
    return model


def fit(model: keras.Model, x: np.ndarray = X, epochs: int = 1, **settings: Any) -> list[float]:
    """Return the losses of the epochs."""
    history = model.fit(x, Y[: len(x)], batch_size=8, epochs=epochs, verbose=0, shuffle=False, **settings)
    return history.history["loss"]


@pytest.mark.parametrize("jit_compile", [False, True] if BACKEND != "torch" else [False])
def test_fp32_training_is_the_same_with_and_without(jit_compile: bool) -> None:
    """The scale is a power of two, so it rounds nothing."""
    inner = {"learning_rate": 0.1, "momentum": 0.9, "global_clipnorm": 0.2}
    plain = model_of(keras.optimizers.SGD(**inner), "float32", jit_compile=jit_compile)
    scaled = model_of(dk.LossScaleOptimizer(keras.optimizers.SGD(**inner)), "float32", jit_compile=jit_compile)
    np.testing.assert_allclose(fit(scaled, epochs=2), fit(plain, epochs=2), rtol=1e-6)
    for one, other in zip(scaled.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.backends("tensorflow", "jax")
def test_several_steps_in_one_execution() -> None:
    bad = X.copy()
    # overflows in FP16's backward pass or before: those steps are skipped
    bad[8:16] *= 1e5
    models = [model_of(dk.LossScaleOptimizer("sgd"), steps_per_execution=steps) for steps in (1, 4)]
    for model in models:
        fit(model, bad)
        assert model.optimizer.report().skipped == 1
        assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 3
    for one, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_loss_that_is_not_finite_does_not_move_the_scale(run_eagerly: bool) -> None:
    model = model_of(dk.LossScaleOptimizer("sgd"), run_eagerly=run_eagerly)
    fit(model)
    fit(model, np.full_like(X, np.nan))
    report = model.optimizer.report()
    assert (report.skipped, report.loss_scale, report.loss_is_finite) == (4, 2.0**16, False)
    # a unit that is always off has a gradient of 0 all the same
    assert len(model.optimizer.non_finite()) >= 3
    fit(model)
    assert (model.optimizer.report().loss_is_finite, model.optimizer.report().skipped_in_a_row) == (True, 0)


def test_overflow_at_the_floor_is_counted_and_the_scale_stays_above_0() -> None:
    variable = keras.Variable([1.0])
    optimizer = dk.LossScaleOptimizer("sgd", dk.LossScale(init_scale=4.0, growth_interval=2))
    optimizer.scale_loss(1.0)
    step = step_of(optimizer, [variable], WAYS[-1])
    # from 4 the search begins at 1
    for expected in (0, 1, 2, 3):
        step([np.float32([np.inf])])
        assert optimizer.report().overflows_at_floor == expected
    assert optimizer.dynamic_scale.numpy() == 1.0
    step([np.float32([0.0])])
    assert optimizer.report().overflows_at_floor == 0


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "bfloat16"])
def test_a_saved_model_goes_on_under_any_global_policy(policy: str, tmp_path: Path) -> None:
    bad = X.copy()
    bad[:8] *= 1e5
    inner = keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(1e-2, 20))
    model = model_of(dk.LossScaleOptimizer(inner, dk.LossScale(growth_interval=3, hysteresis=2)))
    fit(model, bad)
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy(policy)
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is dk.LossScaleOptimizer
    assert again.optimizer.settings == model.optimizer.settings
    assert again.optimizer.report() == model.optimizer.report()
    for one, other in zip(state_of(again.optimizer), state_of(model.optimizer), strict=True):
        np.testing.assert_array_equal(one, other)
    fit(model)
    fit(again)
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_alone_keep_the_scale_and_the_moments(tmp_path: Path) -> None:
    first, second = (model_of(dk.LossScaleOptimizer("adam", "fp16-mixed")) for _ in range(2))
    fit(first, X * np.float32(1e5))
    first.save_weights(tmp_path / "all.weights.h5")
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "all.weights.h5")
    for one, other in zip(state_of(first.optimizer), state_of(second.optimizer), strict=True):
        np.testing.assert_array_equal(one, other)
    second.optimizer.set_weights([np.zeros_like(value) for value in state_of(first.optimizer)])
    assert not any(value.any() for value in state_of(second.optimizer))


def test_settings_come_back_from_a_configuration() -> None:
    for policy in ("fp16-mixed", "fp16-mixed,loss_scale=1024", dk.LossScale(hysteresis=2)):
        optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5, nesterov=True, momentum=0.5), policy, name="mine")
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
        assert type(again) is dk.LossScaleOptimizer
        assert again.get_config() == optimizer.get_config()
        assert again.settings == optimizer.settings


def test_a_model_of_keras_own_goes_on_here(tmp_path: Path) -> None:
    own = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=3000.0, dynamic_growth_steps=9)
    model = model_of(own)
    fit(model)
    own.dynamic_scale.assign(0.0)
    path = tmp_path / "own.keras"
    model.save(path)
    again = model_of(dk.LossScaleOptimizer.from_config(own.get_config()))
    optimizer = again.optimizer
    # the power of two below
    assert (optimizer.settings.init_scale, optimizer.settings.growth_interval) == (2048.0, 9)
    optimizer.build(again.trainable_variables)
    again.load_weights(path)
    # the floor in the place of 0
    assert (optimizer.dynamic_scale.numpy(), optimizer.step_counter.numpy()) == (1.0, 4)
    for one, other in zip(state_of(optimizer.inner_optimizer), state_of(own.inner_optimizer), strict=True):
        np.testing.assert_array_equal(one, other)
    fit(again)


@slow_on_jax
def test_masters_inside_see_true_gradients_and_hold_still_on_a_skip() -> None:
    bad = X.copy()
    bad[8:16] *= 1e5
    model = model_of(dk.LossScaleOptimizer(dk.Masters(keras.optimizers.SGD(1e-3, momentum=0.9)), "fp16"), "float16")
    fit(model, bad)
    assert (model.optimizer.report().skipped, int(ops.convert_to_numpy(model.optimizer.iterations))) == (1, 3)
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


def test_16_bit_variables_without_masters_are_refused_or_said() -> None:
    bare = model_of(dk.LossScaleOptimizer("sgd", "fp16"), "float16")
    with pytest.raises(
        OptimizerError, match=r"4 of 4 variables are kept in 16 bits .* has masters; write LossScaleOpt"
    ):
        bare.optimizer.build(bare.trainable_variables)
    bare = model_of(dk.LossScaleOptimizer("sgd", dk.LossScale()), "float16")
    with pytest.warns(DuotoneWarning, match="without FP32 masters, so SGD loses updates smaller than about 1/2048"):
        bare.optimizer.build(bare.trainable_variables)
    on_purpose = model_of(dk.LossScaleOptimizer("sgd", "fp16-true,rounding=nearest"), "float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DuotoneWarning)
        on_purpose.optimizer.build(on_purpose.trainable_variables)


def test_16_bit_variables_are_said_once() -> None:
    model = model_of(dk.LossScaleOptimizer("sgd", dk.LossScale()), "float16")
    with pytest.warns(DuotoneWarning) as said:
        model.fit(X[:8], Y[:8], verbose=0, callbacks=[dk.ScaleReport()])
    assert len([each for each in said if "without FP32 masters" in str(each.message)]) == 1


def test_embeddings() -> None:
    tokens = RNG.integers(0, 6, (32, 3))

    def trained(optimizer: Any, scale: float = 1.0) -> keras.Model:
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Embedding(6, 4), keras.layers.Flatten(), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(tokens, Y, batch_size=8, verbose=0, shuffle=False)
        return model

    plain, scaled = trained(keras.optimizers.SGD(0.5)), trained(dk.LossScaleOptimizer(keras.optimizers.SGD(0.5)))
    for one, other in zip(scaled.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.backends("tensorflow")
def test_rows_that_come_twice_are_added_in_the_norm() -> None:
    import tensorflow as tf

    variable = keras.Variable(np.zeros((4, 1)), dtype="float32")
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0), dk.LossScale.static(2.0))
    optimizer.build([variable])
    optimizer.scale_loss(1.0)
    slices = tf.IndexedSlices(
        tf.constant([[6.0], [2.0], [4.0], [-4.0]]), tf.constant([1, 3, 1, 0]), tf.constant([4, 1])
    )
    for step in (optimizer.apply, tf.function(optimizer.apply), tf.function(optimizer.apply, jit_compile=True)):
        step([slices])
        assert optimizer.report().grad_norm == np.float32(30**0.5)
    np.testing.assert_array_equal(variable.numpy()[:, 0], [6.0, -15.0, 0.0, -3.0])


@pytest.mark.backends("jax")
def test_devices_that_share_a_batch_decide_as_one() -> None:
    expected = model_of(dk.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    bad = X.copy()
    # of the last device alone
    bad[14:16] *= 1e5
    fit(expected, bad)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:4]))
    model = model_of(dk.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    fit(model, bad)
    assert (model.optimizer.report().skipped, int(ops.convert_to_numpy(model.optimizer.iterations))) == (1, 3)
    assert model.optimizer.dynamic_scale.numpy() == expected.optimizer.dynamic_scale.numpy()
    for one, other in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.backends("jax")
def test_a_branch_and_a_choice_skip_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators values are chosen; a branch is for CPUs."""
    bad = X.copy()
    bad[8:16] *= 1e5
    states = []
    for is_cpu in (True, False):
        monkeypatch.setattr(scaled_step, "takes_branches", lambda is_cpu=is_cpu: is_cpu)
        model = model_of(dk.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
        fit(model, bad)
        assert model.optimizer.report().skipped == 1
        states.append([*model.get_weights(), *state_of(model.optimizer)])
    for one, other in zip(*states, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.backends("jax")
def test_a_step_on_a_cpu_copies_neither_weights_nor_moments() -> None:
    """Of all operands of a conditional XLA makes copies, if its first branch is the one that keeps them."""
    import jax

    model = model_of(dk.LossScaleOptimizer(keras.optimizers.Adam(0.01)), jit_compile=True)
    model.optimizer.build(model.trainable_variables)
    model._symbolic_build(data_batch=(X, Y))
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    state = tuple([variable.value for variable in group] for group in (*groups, model.metrics_variables))
    text = jax.jit(model.train_step, donate_argnums=0).lower(state, (X, Y)).compile().as_text()
    assert " conditional(" in text
    copies = [line for line in text.splitlines() if " copy(" in line and "transpose" not in line]
    copies = [line for line in copies if "= f32[4,8]" in line or "= f32[8,3]" in line]
    # of each gradient, which comes out of its product transposed; not of weights and moments
    assert len(copies) <= 2
