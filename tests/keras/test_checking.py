"""What `check` says of models that are wrong, and that it says nothing of those that are right."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.policies.models import INPUTS, Net, attention, functional, sequential

import duotone.keras as dk
from duotone.errors import DuotoneWarning, PolicyError

SCALED = "LossScaleOptimizer"


def findings(model, optimizer=None) -> str:
    return "\n".join(dk.check(model, optimizer))


def under(policy, make):
    keras.config.set_dtype_policy(policy)
    model = make()
    if not model.built:
        model(INPUTS)
    keras.config.set_dtype_policy("float32")
    return model


def convnet():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, activation="relu", kernel_regularizer="l2"),
            layers.GroupNormalization(2),
            layers.AveragePooling2D(2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="sigmoid"),
        ]
    )


def text_model():
    return keras.Sequential([keras.Input((6,)), layers.Embedding(10, 4), layers.GRU(4), layers.Dense(2)])


@pytest.mark.parametrize("make", [sequential, functional, attention, convnet, text_model, Net])
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"])
def test_nothing_is_said_of_a_model_that_is_right(policy, make):
    model = under(dk.policy(policy), make)
    optimizer = keras.optimizers.Adam()
    if policy in ("bf16", "fp16"):
        optimizer = dk.Masters(optimizer)
    if policy.startswith("fp16"):
        optimizer = dk.LossScaleOptimizer(optimizer, policy)
    optimizer.build(model.trainable_variables)
    assert dk.check(model, optimizer) == []
    assert dk.check(model) == []


def test_keras_own_scale_is_said_to_reach_0():
    model = under("mixed_float16", functional)
    model.compile("adam", "mse")
    assert "Keras' LossScaleOptimizer has no floor" in findings(model)
    assert 'write dk.LossScaleOptimizer(Adam(...), "fp16-mixed")' in findings(model)
    model.compile(dk.LossScaleOptimizer("adam", "fp16-mixed"), "mse")
    assert findings(model) == ""


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_fp16_layers_without_a_scale(policy):
    model = under(policy, functional)
    model.compile("adam", "mse", auto_scale_loss=False)
    said = findings(model)
    assert "left, right, both and 2 more compute in FP16, but Adam does not scale the loss" in said
    masters = "dk.Masters(Adam(...))" if policy == "float16" else "Adam(...)"
    assert f"train with dk.{SCALED}({masters}, " in said


def test_a_layer_in_fp16_under_a_float32_policy_is_found():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, dtype="mixed_float16", name="head")(inputs))
    model.compile("adam", "mse")
    assert "head computes in FP16, but Adam does not scale the loss" in findings(model)


def test_a_static_scale_is_a_scale_and_two_are_one_too_many():
    model = under("mixed_float16", functional)
    assert findings(model, keras.optimizers.SGD(loss_scale_factor=1024.0)) == ""
    twice = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    # Keras' constructor takes away the one that is there
    twice.inner_optimizer.loss_scale_factor = 2.0
    assert "SGD has a loss_scale_factor inside a LossScaleOptimizer, so gradients are divided twice" in findings(
        model, twice
    )


@pytest.mark.parametrize(("policy", "lost"), [("bfloat16", 256), ("float16", 2048)])
def test_16_bit_variables_without_masters(policy, lost):
    model = under(policy, functional)
    optimizer = keras.optimizers.Adam()
    said = findings(model, optimizer)
    assert f"without FP32 masters, so Adam loses updates smaller than about 1/{lost} of a weight" in said
    assert "keeps its state" not in said
    optimizer.build(model.trainable_variables)
    assert "Adam keeps its state in" in findings(model, optimizer)
    assert f"norm computes with {'BF16' if policy == 'bfloat16' else 'FP16'} variables" in said
    assert f'dtype="mixed_{policy}"' in said


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (layers.Softmax, "probabilities are rounded"),
        (lambda **given: layers.Dense(2, activation="softmax", **given), "probabilities are rounded"),
        (lambda **given: layers.Dense(1, activation="sigmoid", **given), "has no fraction left"),
        (lambda **given: layers.Activation("exponential", **given), "overflow"),
        (lambda **given: layers.Dense(2, activity_regularizer="l2", **given), "a penalty is a sum"),
        (layers.UnitNormalization, "sums of powers"),
        (layers.Normalization, "data beyond 65504 are Inf"),
    ],
)
def test_a_layer_that_16_bits_are_not_safe_in(layer, said):
    model = keras.Sequential([keras.Input((4,)), layer(dtype="mixed_float16", name="unsafe")])
    assert f"unsafe computes in FP16: {said}" in findings(model) or said in findings(model)
    assert findings(keras.Sequential([keras.Input((4,)), layer(dtype="float32")])) == ""


def test_functions_between_layers_that_outgrow_16_bits():
    def model(dtype):
        inputs = keras.Input((4,))
        hidden = layers.Dense(3, dtype=dtype)(inputs)
        wide = ops.sum(ops.cast(hidden, "float32"), axis=1)
        return keras.Model(inputs, [ops.sum(hidden, axis=1), ops.cumsum(hidden), ops.mean(hidden), wide])

    said = findings(model("mixed_float16"))
    assert said.count("which it outgrows") == 2
    assert "(keras.ops.Sum) runs in FP16" in said
    assert "(keras.ops.Cumsum) runs in FP16" in said
    assert findings(model("mixed_bfloat16")).count("which it outgrows") == 1
    assert findings(model("float32")) == ""


def test_global_settings_that_do_nothing_or_too_much():
    model = functional()
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert "the global dtype policy is mixed_bfloat16, but every layer of this model was made before" in findings(model)
    keras.config.set_dtype_policy("float32")
    assert findings(model) == ""
    keras.config.set_floatx("float16")
    assert "keras.config.floatx() is float16" in findings(model)


def test_losses_and_metrics_in_16_bits():
    model = functional()
    model.compile("sgd", keras.losses.MeanSquaredError(dtype="float16"))
    assert 'mean_squared_error adds up in FP16; make it with dtype="float32"' in findings(model)


def test_what_is_inside_layers_is_seen():
    keras.config.set_dtype_policy("float16")
    model = Net()
    model(INPUTS)
    keras.config.set_dtype_policy("float32")
    assert "block0/norm" in findings(model)


def test_check_runs_nothing_and_changes_nothing():
    model = under("mixed_float16", sequential)
    model.compile("adam", "mse")
    before = [np.array(weight) for weight in model.get_weights()]
    dk.check(model)
    assert not model.optimizer.built
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_a_scale_report_says_it_once():
    model = under("mixed_bfloat16", sequential)
    model.compile("sgd", "mse")
    report = dk.ScaleReport()
    with pytest.warns(DuotoneWarning, match="probabilities computes in BF16"):
        report.set_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.set_model(model)


def test_what_is_no_model_is_refused():
    for given in (3, None, keras.layers.Dense(1)):
        with pytest.raises(PolicyError, match="check takes a model of Keras, not"):
            dk.check(given)
