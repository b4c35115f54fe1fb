"""What Keras' layers lose in 16 bits against FP64, and that under dk.policy none loses more than rounding does."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import duotone.keras as dk
from duotone.keras.policies.safety import family_of

RANDOM = np.random.RandomState(0)
WIDE = RANDOM.randn(4, 512) * 300
# half an ulp is rounding once; norms and softmax round their operands' scale too
EPSILON = {"fp16-mixed": 2.0**-10, "bf16-mixed": 2.0**-7}
HALVES = ["fp16-mixed", "bf16-mixed"]


def on_grid(values: np.ndarray) -> np.ndarray:
    """Return values that FP16 and BF16 hold, so that rounding the input is no error."""
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float16).astype(np.float32)


def error(make: Callable[..., Any], inputs: np.ndarray, policy: str, **options: Any) -> float:
    """Return the largest error of a layer's output, in ulps of the policy's format at the largest output."""
    inputs = on_grid(inputs)
    # JAX has no FP64 unless it is asked for at its start
    wide = "float32" if keras.backend.backend() == "jax" else "float64"
    true = ops.convert_to_numpy(make(dtype=wide)(inputs, **options))
    with dk.policy(policy):
        output = make()(inputs, **options)
    difference = np.abs(ops.convert_to_numpy(ops.cast(output, "float32")).astype(np.float64) - true)
    return float(difference.max() / (np.abs(true).max() * EPSILON[policy]))


@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize(
    ("make", "inputs", "options"),
    [
        (layers.LayerNormalization, WIDE, {}),
        (layers.RMSNormalization, WIDE, {}),
        (lambda **given: layers.GroupNormalization(4, **given), WIDE, {}),
        (layers.BatchNormalization, WIDE.T, {"training": True}),
        (layers.UnitNormalization, WIDE, {}),
        (layers.Softmax, WIDE / 100, {}),
        (layers.GlobalAveragePooling1D, np.abs(WIDE.T[None]), {}),
        (lambda **given: layers.AveragePooling2D(64, **given), np.full((1, 64, 64, 1), 100.0), {}),
        (lambda **given: layers.Activation("log_softmax", **given), WIDE / 100, {}),
        (lambda **given: layers.Activation("squareplus", **given), WIDE, {}),
        (lambda **given: layers.Rescaling(1 / 65535, **given), np.full((2, 2), 65280.0), {}),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_what_a_policy_leaves_in_16_bits_loses_no_more_than_rounding(make, inputs, options, policy):
    assert error(make, inputs, policy, **options) <= 1.0


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (layers.UnitNormalization, WIDE),
        (lambda **given: layers.Activation("squareplus", **given), WIDE),
        (lambda **given: layers.Activation("sigmoid", **given), np.linspace(9, 15, 7)),
        (lambda **given: layers.Normalization(mean=1e5, variance=1e8, **given), np.full((2, 1), 98304.0)),
    ],
)
def test_keras_alone_loses_them(make, inputs):
    """Each of these is why the table has a line; a version of Keras that mends one fails here."""
    inputs = np.asarray(inputs, np.float32)
    lost = ops.convert_to_numpy(ops.cast(make(dtype="mixed_float16")(inputs), "float32"))
    true = ops.convert_to_numpy(make(dtype="float32")(inputs))
    with dk.policy("fp16-mixed"):
        kept = ops.convert_to_numpy(make()(inputs))
    assert np.allclose(kept, true, rtol=1e-5)
    # 1 - p of a probability is what its loss sees
    wrong = np.abs((1 - lost) - (1 - true)) / np.abs(1 - true)
    assert not (wrong < 0.1).all()


def test_the_gradient_of_a_row_that_is_read_often_is_a_sum():
    """On torch a 16-bit table adds it up in 16 bits: 4,096 ones in BF16 come to 256."""
    tokens = np.zeros((1, 4096), np.int32)
    with dk.policy("bf16-mixed"):
        model = keras.Sequential([keras.Input((4096,), dtype="int32"), layers.Embedding(4, 2)])
    model.compile(keras.optimizers.SGD(1.0), loss=lambda true, given: ops.sum(given, axis=(1, 2)), run_eagerly=True)
    before = np.array(model.get_weights()[0])
    model.fit(tokens, np.zeros((1, 1)), verbose=0)
    assert (before - model.get_weights()[0])[0] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("preset", ["fp16", "bf16"])
def test_statistics_and_penalties_are_of_fp32_variables(preset):
    with dk.policy(preset):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, kernel_regularizer="l2", name="penalized"),
                layers.BatchNormalization(name="norm"),
                layers.Dense(4, name="plain"),
            ]
        )
    dtypes = {
        layer.name: {keras.backend.standardize_dtype(each.dtype) for each in layer.weights} for layer in model.layers
    }
    assert dtypes == {
        "penalized": {"float32"},
        "norm": {"float32"},
        "plain": {"float16" if preset == "fp16" else "bfloat16"},
    }
    # squares of weights of 1e-4 are 0 in FP16
    model.get_layer("penalized").kernel.assign(np.full((4, 4), 1e-4, np.float32))
    assert float(ops.sum(model.losses[0])) == pytest.approx(16 * 0.01 * 1e-8, rel=1e-3)


def test_losses_take_16_bit_predictions_in_fp32():
    predicted = ops.cast(np.full((4, 8), 300.0, np.float32), "float16")
    loss = keras.losses.MeanSquaredError()(np.zeros((4, 8)), predicted)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert float(loss) == 90000.0


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        (lambda: layers.Dense(2, activation=keras.ops.softmax), "softmax"),
        (lambda: layers.Conv1D(2, 3, activation="sigmoid"), "loss_of_probabilities"),
        (lambda: layers.Dot(1, normalize=True), "vector_norm"),
        (lambda: layers.Dot(1), None),
        (lambda: layers.Dense(2, activity_regularizer="l1"), "loss"),
        (lambda: layers.Dense(2, bias_regularizer="l1"), "loss"),
        (lambda: layers.LSTM(2), "factorization"),
        (lambda: layers.Dense(2, kernel_initializer="orthogonal"), "factorization"),
        (lambda: layers.ReversibleEmbedding(4, 2), None),
        (layers.GlobalAveragePooling2D, None),
        (lambda: layers.Activation("gelu"), None),
        (lambda: layers.Lambda(lambda x: x), None),
    ],
)
def test_what_a_layer_is_known_by(layer, family):
    assert family_of(layer()) == family
