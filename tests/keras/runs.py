"""Small models whose steps overflow in the backward pass, or whose loss is no number, where a test asks for it."""

from typing import Any

import keras
import numpy as np
from keras import ops

import duotone.keras as dk

BATCH = 4


@keras.saving.register_keras_serializable("duotone_tests")
class Gate(keras.layers.Layer):
    """Its input, whose gradient is NaN in rows where the gate is 0."""

    def call(self, inputs: Any) -> Any:
        values, gate = inputs
        return values + ops.sqrt(ops.cast(gate, values.dtype) + 0 * values) - ops.sqrt(ops.cast(gate, values.dtype))


def build(optimizer: Any = None, *, compiled: bool = False, norm: bool = False, **settings: Any) -> Any:
    """Return a compiled model of a few parameters.

    Args:
        optimizer: SGD with momentum in a `LossScaleOptimizer` by default.
        compiled: whether a step is compiled; most tests ask for nothing that depends on it.
        norm: whether there is a layer with statistics in it.
        settings: of `compile`.
    """
    inputs = keras.Input((4,), name="inputs")
    values = keras.layers.Dense(4, name="first")(inputs)
    if norm:
        values = keras.layers.BatchNormalization(name="norm")(values)
    values = Gate(name="gate")([values, inputs[:, :1]])
    model = keras.Model(inputs, keras.layers.Dense(1, name="second", dtype="float32")(values), name="net")
    settings = {"loss": "mse", "run_eagerly": not compiled, **settings}
    model.compile(scaled() if optimizer is None else optimizer, **settings)
    # TensorFlow leaves it to the first step
    model.optimizer.build(model.trainable_variables)
    return model


def scaled(policy: Any = "fp16-mixed", learning_rate: Any = 0.01) -> Any:
    return dk.LossScaleOptimizer(keras.optimizers.SGD(learning_rate, momentum=0.9), policy)


def data(pattern: str, batch: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch for each letter: "." is an ordinary one, "x" overflows in the backward pass, "n" has no loss."""
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(len(pattern) * batch, 4)).astype("float32")
    targets = inputs[:, 1:2] - 0.5 * inputs[:, 2:3]
    inputs[:, 0] = np.repeat([0.0 if letter == "x" else 1.0 for letter in pattern], batch)
    targets[np.repeat([letter == "n" for letter in pattern], batch)] = np.nan
    return inputs, targets


def fit(model: Any, pattern: str, *callbacks: Any, **settings: Any) -> dict[str, list[float]]:
    """Train on the batches of a pattern, in order, and return the history."""
    inputs, targets = data(pattern)
    settings = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **settings}
    return model.fit(inputs, targets, callbacks=list(callbacks), **settings).history


def bits(model: Any) -> dict[str, bytes]:
    """Return every bit of every variable, the optimizer's included, by place and path."""
    variables = [*model.variables, *model.optimizer.variables]
    return {
        f"{place} {variable.path.partition('/')[2]}": ops.convert_to_numpy(variable).tobytes()
        for place, variable in enumerate(variables)
    }
