"""`master_weights(model)`: FP32 weights by path, whoever holds the masters."""

import keras
import numpy as np
import pytest
from keras import ops

import duotone.keras as dk
from duotone.errors import OptimizerError
from duotone.keras import internals


def model_of(*layers, optimizer=None):
    model = keras.Sequential([keras.Input((4,)), *layers], name="model")
    model.compile(optimizer or dk.Masters(keras.optimizers.SGD(2.0**-12)), "mse")
    return model


def test_masters_and_all_other_weights_in_fp32():
    layers = [
        keras.layers.Dense(3, dtype="bfloat16", name="half"),
        keras.layers.BatchNormalization(dtype="bfloat16", name="norm"),
        keras.layers.Dense(2, name="whole"),
    ]
    model = model_of(*layers)
    before = {
        weight.path.removeprefix("model/"): ops.convert_to_numpy(ops.cast(weight, "float32"))
        for weight in model.weights
    }
    model.optimizer.apply([ops.ones(each.shape) for each in model.trainable_variables], model.trainable_variables)
    found = dk.master_weights(model)
    assert list(found) == list(before)
    assert len(found) == 8
    assert {weight.dtype for weight in found.values()} == {np.dtype(np.float32)}
    for path, weight in found.items():
        moved = np.float32(0 if "moving" in path else 2.0**-12)
        np.testing.assert_array_equal(weight, before[path] - moved, err_msg=path)


def test_masters_inside_of_another_optimizer_are_found():
    inner = dk.Masters(keras.optimizers.SGD(0.1))
    model = model_of(
        keras.layers.Dense(3, dtype="float16", name="dense"), optimizer=dk.LossScaleOptimizer(inner, "fp16")
    )
    model.optimizer.build(model.trainable_variables)
    inner.masters[0].assign(np.full((4, 3), 1.001, np.float32))
    assert (dk.master_weights(model)["dense/kernel"] == np.float32(1.001)).all()


def test_it_is_a_copy():
    model = model_of(keras.layers.Dense(3, name="dense"))
    found = dk.master_weights(model)["dense/kernel"]
    found[:] = 7.0
    assert not (dk.master_weights(model)["dense/kernel"] == 7.0).any()


class Twins(keras.Model):
    """A model of two layers of one name."""

    def __init__(self):
        super().__init__()
        self.one, self.two = keras.layers.Dense(4, name="twin"), keras.layers.Dense(4, name="twin")

    def call(self, inputs):
        return self.two(self.one(inputs))


def test_paths_are_the_same_after_saving_and_loading(tmp_path):
    inside = keras.Sequential([keras.layers.Dense(3, name="first"), keras.layers.LSTM(2, name="memory")], name="inside")
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(inside(inputs)))
    model.compile(dk.Masters(keras.optimizers.SGD(0.1)), "mse")
    paths = list(dk.master_weights(model))
    of_memory = [f"inside/memory/lstm_cell/{name}" for name in ("kernel", "recurrent_kernel", "bias")]
    assert paths == ["inside/first/kernel", "inside/first/bias", *of_memory, "head/kernel", "head/bias"]
    # nor do they depend on how many models there were before
    model.save(tmp_path / "model.keras")
    assert list(dk.master_weights(keras.saving.load_model(tmp_path / "model.keras"))) == paths
    sequential = model_of(keras.layers.Dense(3, name="dense"))
    sequential.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(dk.master_weights(loaded)) == list(dk.master_weights(sequential)) == ["dense/kernel", "dense/bias"]


def test_what_it_cannot_read_is_said():
    with pytest.raises(OptimizerError, match="has no optimizer with masters"):
        dk.master_weights(model_of(keras.layers.Dense(3), optimizer=keras.optimizers.SGD(0.1)))
    twins = Twins()
    twins(np.ones((1, 4)))
    twins.compile(dk.Masters("sgd"), "mse")
    with pytest.raises(OptimizerError, match="two weights of the model have the path"):
        dk.master_weights(twins)


@pytest.mark.backends("jax")
def test_in_a_callback_on_jax_it_asks_for_the_values_first():
    model = model_of(keras.layers.Dense(3, dtype="bfloat16"))
    said = []

    class Reader(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with pytest.raises(OptimizerError, match="are with the fit that runs on JAX") as error:
                dk.master_weights(model)
            said.append(error)
            # a callback's own `model` gives them back
            assert dk.master_weights(self.model)
            assert not any(map(internals.is_released, model.weights))

    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0, callbacks=[Reader()])
    assert said


def test_what_is_no_model_is_refused():
    with pytest.raises(OptimizerError, match="master_weights takes a model of Keras, not 3"):
        dk.master_weights(3)
