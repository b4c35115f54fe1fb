"""`fit` in the ways that people call it trains what it would train without Duotone, on every backend."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import duotone.keras as dk

from .runs import BATCH, bits, build, data, fit, scaled

# whether a step is compiled, and by what
WAYS = {
    "tensorflow": [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}],
    "jax": [{"run_eagerly": True}, {"jit_compile": True}],
    "torch": [{"run_eagerly": True}],
}[keras.backend.backend()]


def ways(*, slow_from: int = 1) -> Any:
    marks = [pytest.mark.slow if index > slow_from else () for index in range(len(WAYS))]
    return pytest.mark.parametrize(
        "way", [pytest.param(way, id=" ".join(way), marks=mark) for way, mark in zip(WAYS, marks, strict=True)]
    )


def weights(model: Any) -> list[bytes]:
    return [ops.convert_to_numpy(weight).tobytes() for weight in model.weights]


def pair(**settings: Any) -> tuple[Any, Any]:
    """Return a model with a loss scale, and the same with the optimizer inside of it alone, of the same weights."""
    ours = build(scaled(), compiled=True, **settings)
    plain = build(keras.optimizers.SGD(0.01, momentum=0.9), compiled=True, **settings)
    plain.set_weights(ours.get_weights())
    return ours, plain


@ways()
def test_clean_steps_are_those_of_the_optimizer_inside(way: dict[str, bool]) -> None:
    ours, plain = pair(**way)
    for model in (ours, plain):
        fit(model, "....", epochs=2)
    for one, other in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@ways()
def test_a_skipped_step_is_no_step(way: dict[str, bool]) -> None:
    ours, other = build(scaled(), compiled=True, **way), build(scaled(), compiled=True, **way)
    other.set_weights(ours.get_weights())
    x, y = data(".x..x")
    kept = np.repeat([True, False, True, True, False], BATCH)
    for model, rows in ((ours, slice(None)), (other, kept)):
        model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)
    # but for the scale, a power of two, which rounds nothing
    assert weights(ours) == weights(other)
    inner = [
        [ops.convert_to_numpy(each).tobytes() for each in model.optimizer.inner_optimizer.variables]
        for model in (ours, other)
    ]
    assert inner[0] == inner[1]
    assert ours.optimizer.report().skipped == 2


@ways(slow_from=0)
def test_class_weights_and_sample_weights(way: dict[str, bool]) -> None:
    x, y = data("....")
    labels = (y > 0).astype("int32")
    for weighting in ({"class_weight": {0: 1.0, 1: 3.0}}, {"sample_weight": np.linspace(0.0, 2.0, len(x))}):
        ours, plain = pair(loss="binary_crossentropy", **way)
        for model in (ours, plain):
            model.fit(x, labels, batch_size=BATCH, shuffle=False, verbose=0, **weighting)
        for one, other in zip(ours.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@ways(slow_from=0)
def test_validation_metrics_and_what_comes_after(way: dict[str, bool]) -> None:
    model = build(scaled(), compiled=True, metrics=["mae"], **way)
    x, y = data("..")
    history = fit(model, "x..", dk.ScaleReport(), validation_data=(x, y), epochs=2)
    assert set(history) == {"loss", "mae", "val_loss", "val_mae", "loss_scale", "skipped", "grad_norm"}
    before = bits(model)
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(history["val_loss"][-1])
    model.predict(x, verbose=0)
    # metrics count on; what is trained does not
    trained = [name for name in before if "optimizer" in name or "first" in name or "second" in name]
    after = bits(model)
    assert all(after[name] == before[name] for name in trained)


@pytest.mark.backends("jax", "tensorflow")
@pytest.mark.parametrize("steps", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_steps_in_one_execution_are_the_same_steps(steps: int) -> None:
    settings = {"jit_compile": keras.backend.backend() == "jax"}
    one, several = build(compiled=True, **settings), build(compiled=True, steps_per_execution=steps, **settings)
    several.set_weights(one.get_weights())
    histories = [fit(model, "x..x.", dk.ScaleReport(), epochs=2) for model in (one, several)]
    assert weights(one) == weights(several)
    assert [history["skipped"] for history in histories] == [[2, 4]] * 2
    assert histories[0]["loss_scale"] == histories[1]["loss_scale"]


@pytest.mark.backends("tensorflow", "torch")
def test_a_train_step_of_ones_own() -> None:
    class Own(keras.Model):
        def train_step(self, given: Any) -> Any:
            x, y = given[:2]
            if keras.backend.backend() == "torch":
                self.zero_grad()
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                self.optimizer.scale_loss(loss).backward()
                variables = self.trainable_variables
                import torch

                with torch.no_grad():
                    self.optimizer.apply([each.value.grad for each in variables], variables)
            else:
                import tensorflow as tf

                with tf.GradientTape() as tape:
                    loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                    scaled_loss = self.optimizer.scale_loss(loss)
                variables = self.trainable_variables
                self.optimizer.apply(tape.gradient(scaled_loss, variables), variables)
            return {"own": loss}

    plain = build()
    own = Own(plain.inputs, plain.outputs)
    own.compile(scaled(), loss="mse", run_eagerly=True)
    history = fit(own, "x..", dk.ScaleReport(every=1))
    assert set(history) == {"own", "loss_scale", "skipped", "grad_norm"}
    assert history["skipped"] == [1]


@pytest.mark.backends("jax")
def test_a_train_step_of_ones_own_on_jax() -> None:
    class Own(keras.Model):
        def train_step(self, state: Any, given: Any) -> Any:
            import jax

            trained, others, optimizer, metrics = state
            (_, aux), grads = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)(
                trained, others, metrics, *given, None, training=True, optimizer_variables=optimizer
            )
            trained, optimizer = self.optimizer.stateless_apply(optimizer, grads, trained)
            return {"own": aux[0]}, (trained, aux[2], optimizer, metrics)

    plain = build()
    own = Own(plain.inputs, plain.outputs)
    own.compile(scaled(), loss="mse")
    history = fit(own, "x..", dk.ScaleReport(every=1))
    assert set(history) == {"own", "loss_scale", "skipped", "grad_norm"}
    assert history["skipped"] == [1]


def test_batches_by_hand() -> None:
    model, other = build(), build()
    other.set_weights(model.get_weights())
    x, y = data("x..")
    for start in range(0, len(x), BATCH):
        model.train_on_batch(x[start : start + BATCH], y[start : start + BATCH])
    fit(other, "x..")
    assert weights(model) == weights(other)
    assert model.optimizer.report() == other.optimizer.report()


def test_a_callback_that_stops_within_an_epoch_leaves_everything_readable() -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 1

    model = build()
    history = fit(model, "x...", Stop(), dk.ScaleReport(every=1), epochs=3)
    assert history["skipped"] == [1]
    assert int(model.optimizer.iterations) == 1
