"""`Masters` on several devices, and with gradients of embeddings as rows."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import optimizers as ko

import duotone.keras as dk

from .masters_cases import gradients, model_in, numpy, same
from .stepping import two_replicas

INPUTS = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"global_clipnorm": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_replicas_of_tensorflow_keep_one_master(options):
    def trained(dtype, wrap):
        with two_replicas().scope():
            model = model_in(dtype)
            model.compile(wrap(ko.AdamW(1e-2, **options)), "mse")
        model.fit(INPUTS, INPUTS, batch_size=8, epochs=2, verbose=0, shuffle=False)
        return model

    model = trained("bfloat16", dk.Masters)
    for master in model.optimizer.masters:
        for variable in (master.weight, master.tail):
            first, second = (ops.convert_to_numpy(ops.cast(each, "float32")) for each in variable.value.values)
            np.testing.assert_array_equal(first, second)
        assert ops.convert_to_numpy(master.tail).any()
    plain = trained("float32", lambda inner: inner)
    for mine, theirs in zip(dk.master_weights(model).values(), numpy(plain.weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0.05, atol=0.02)
    kept = dk.master_weights(model)
    double = model.weights[0]
    double.assign(2 * double)
    now = dk.master_weights(model)
    same(list(now.values())[:1], [double])
    same(list(now.values())[1:], list(kept.values())[1:])
    dk.load_master_weights(model, plain)
    same(dk.master_weights(model).values(), plain.weights)
    for master in model.optimizer.masters:
        first, second = (ops.convert_to_numpy(each) for each in master.tail.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_replicas_of_tensorflow_keep_one_master_under_a_loss_scale():
    with two_replicas().scope():
        masters = dk.Masters(ko.AdamW(1e-2))
        model = model_in("float16")
        model.compile(dk.LossScaleOptimizer(masters, "fp16"), "mse")
    model.fit(INPUTS, INPUTS, batch_size=8, epochs=3, verbose=0, shuffle=False)
    assert model.optimizer.report().skipped < 6
    assert int(ops.convert_to_numpy(masters.iterations)) == 6 - model.optimizer.report().skipped
    for master in masters.masters:
        first, second = (each.numpy() for each in master.tail.value.values)
        np.testing.assert_array_equal(first, second)
        assert first.any()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("make", [lambda: ko.SGD(0.1), lambda: ko.SGD(0.1, momentum=0.9), lambda: ko.Adam(1e-2)])
def test_rows_of_an_embedding_move_as_in_fp32(make):
    import tensorflow as tf

    start = np.random.default_rng(0).integers(-64, 64, (6, 4)) / 64
    ours, theirs = dk.Masters(make()), make()
    half, whole = (keras.Variable(start, dtype=dtype, name="table") for dtype in ("bfloat16", "float32"))
    for step in range(3):
        values = np.random.default_rng(step).standard_normal((3, 4)).astype(np.float32)
        rows = tf.cast(values, "bfloat16")
        # a row that comes twice
        indices = tf.constant([1, 4, 1])
        ours.apply([tf.IndexedSlices(rows, indices, tf.constant([6, 4]))], [half])
        theirs.apply([tf.IndexedSlices(tf.cast(rows, "float32"), indices, tf.constant([6, 4]))], [whole])
    same(ours.masters, [whole])


@pytest.mark.backends("jax")
def test_tails_and_moments_lie_as_their_weights_do():
    import jax

    devices = keras.distribution.list_devices()[:4]
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = (None, "model")
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))

    def trained(dtype, wrap):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, dtype=dtype)])
        model.weights[0].assign(np.random.default_rng(0).integers(-64, 64, (4, 6)) / 64)
        model.compile(wrap(ko.AdamW(1e-2)), "mse")
        model.fit(INPUTS[:, :4], np.tile(INPUTS[:, :3], 2), batch_size=8, verbose=0, shuffle=False)
        return model

    model = trained("bfloat16", dk.Masters)
    kernel = model.weights[0].value.sharding
    assert kernel.spec == jax.sharding.PartitionSpec(None, "model")
    held = [each for each in model.optimizer.variables if tuple(each.shape) == (4, 6)]
    assert len(held) == 3
    for variable in held:
        assert variable.value.sharding.is_equivalent_to(kernel, 2), variable.path
    assert ops.convert_to_numpy(model.optimizer.masters[0].tail).any()
    plain = trained("float32", lambda inner: inner)
    for mine, theirs in zip(dk.master_weights(model).values(), numpy(plain.weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0.05, atol=0.02)


@pytest.mark.backends("jax")
def test_data_parallel_training_on_jax_has_one_master():
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:2]))
    model, alone = model_in("bfloat16"), model_in("bfloat16")
    ours, theirs = dk.Masters(ko.SGD(2.0**-7)), dk.Masters(ko.SGD(2.0**-7))
    for grads in gradients("bfloat16", 2):
        ours.apply(grads, model.trainable_variables)
        theirs.apply(grads, alone.trainable_variables)
    assert all(len(master.tail.value.sharding.device_set) == 2 for master in ours.masters)
    same(ours.masters, theirs.masters)
