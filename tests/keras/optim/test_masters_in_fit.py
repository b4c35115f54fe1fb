"""`Masters` in `fit`: exact resume, changes of weights by others, averages, callbacks, and FP16's largest number."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import optimizers as ko

import duotone.keras as dk
from duotone.errors import DuotoneWarning
from duotone.keras.weights.codec import LARGEST_OF_FLOAT16

from .masters_cases import model_in, numpy, same

BACKEND = keras.backend.backend()
INPUTS = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
TARGETS = (INPUTS * 0.5).astype(np.float32)


def compiled(optimizer=None, dtype="bfloat16", **options):
    """Return a model that runs in the way that takes least time here, unless options say otherwise."""
    model = model_in(dtype)
    model.compile(optimizer or dk.Masters(ko.AdamW(1e-3)), "mse", **{"run_eagerly": BACKEND != "jax", **options})
    return model


def fit(model, epochs=1, **options):
    return model.fit(INPUTS, TARGETS, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)


def state(model):
    """Return all that a run goes on from: weights, tails, moments, counts."""
    return [np.array(ops.convert_to_numpy(variable)) for variable in [*model.weights, *model.optimizer.variables]]


def same_state(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.tobytes()) == (other.dtype, other.tobytes())


def tails(model):
    return [ops.convert_to_numpy(master.tail) for master in model.optimizer.masters]


@pytest.mark.parametrize(
    ("form", "scaled"),
    [
        ("keras", False),
        pytest.param("keras", True, marks=pytest.mark.slow),
        pytest.param("weights", False, marks=pytest.mark.slow),
        pytest.param("weights", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(tmp_path, form, scaled):
    def optimizer():
        masters = dk.Masters(ko.AdamW(1e-3))
        return dk.LossScaleOptimizer(masters, "fp16") if scaled else masters

    options = {"dtype": "float16" if scaled else "bfloat16", "run_eagerly": BACKEND == "torch"}
    model = compiled(optimizer(), **options)
    fit(model, 2)
    if form == "keras":
        model.save(tmp_path / "model.keras")
        other = keras.saving.load_model(tmp_path / "model.keras")
        assert type(other.optimizer) is type(model.optimizer)
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        other = compiled(optimizer(), **options)
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "model.weights.h5")
    same_state(state(model), state(other))
    for each in (model, other):
        fit(each)
    same_state(state(model), state(other))


def test_moments_are_saved_once(tmp_path):
    h5py = pytest.importorskip("h5py")
    model = compiled()
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    stored = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda _, item: stored.append(item.size) if isinstance(item, h5py.Dataset) else None)
    parameters = sum(int(np.prod(weight.shape)) for weight in model.weights)
    # weight, tail, two moments; checksums, count of steps, learning rate
    assert sum(stored) == 4 * parameters + len(model.weights) + 2


def test_a_run_that_is_killed_and_restored_by_keras_ends_as_one_that_was_not(tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    whole = compiled()
    fit(whole, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), 3, callbacks=[backup(), Kill()])
    resumed = compiled()
    fit(resumed, 3, callbacks=[backup()])
    same_state(state(whole), state(resumed))


def test_a_file_without_tails_is_said_and_masters_begin_as_its_weights(tmp_path):
    plain = compiled(ko.AdamW(1e-3))
    fit(plain)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = compiled()
    fit(model)
    with pytest.warns(DuotoneWarning, match="so none is loaded and masters begin as the weights are"):
        model.load_weights(tmp_path / "plain.weights.h5")
    same(dk.master_weights(model).values(), plain.weights)


def double(variable):
    variable.assign(ops.convert_to_tensor(variable) * 2)


@pytest.mark.parametrize("way", ["assign", "set_weights", "one element"])
def test_weights_that_others_write_are_masters_from_then_on(way):
    model = compiled(dk.Masters(ko.SGD(2.0**-12)))
    fit(model)
    kernel, *rest = model.weights
    kept = numpy(model.optimizer.masters[1:])
    if way == "assign":
        double(kernel)
    elif way == "set_weights":
        model.set_weights([numpy([kernel])[0] * 2, *numpy(rest)])
    else:
        values = numpy([kernel])[0]
        values[2, 3] += 1
        kernel.assign(values)
    same([model.optimizer.masters[0]], [kernel])
    # the others were not written into, or with what they were
    same(model.optimizer.masters[1:], kept)
    before = numpy([kernel])[0]
    model.optimizer.apply([ops.ones(each.shape) for each in model.weights], model.weights)
    same([model.optimizer.masters[0]], [before - np.float32(2.0**-12)])


def test_masters_that_others_assign_are_kept():
    model = compiled()
    fit(model)
    for master in model.optimizer.masters:
        double(master)
    doubled = numpy(model.optimizer.masters)
    model.optimizer.learning_rate = 0.0
    fit(model)
    same(model.optimizer.masters, doubled)
    assert all(each.any() for each in tails(model))


@pytest.mark.parametrize("scaled", [False, True])
def test_averages_are_of_masters_and_swapped_with_every_bit(scaled):
    masters = dk.Masters(ko.AdamW(1e-3, use_ema=True, ema_momentum=0.5))
    model = compiled(dk.LossScaleOptimizer(masters, "bf16") if scaled else masters)
    seen = []

    class See(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(numpy(masters.masters))

        def on_epoch_begin(self, epoch, logs=None):
            seen.append(None if epoch == 0 else numpy(masters.masters))

    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=False)
    fit(model, 2, validation_data=(INPUTS, TARGETS), callbacks=[See(), swap])
    averages = [each for each in masters.variables if each.name.endswith("average")]
    assert len(averages) == 4
    same(masters.masters, averages)
    assert all(ops.convert_to_numpy(master.tail).any() for master in masters.masters)


def test_callbacks_that_set_the_learning_rate_and_restore_weights_find_what_they_need():
    model = compiled()
    stop = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    fit(model, 2, callbacks=[halve, stop, keras.callbacks.ReduceLROnPlateau("loss")])
    assert float(model.optimizer.learning_rate) == np.float32(1e-3 / 4)
    assert int(model.optimizer.iterations) == 4


@pytest.mark.backends("tensorflow", "jax")
def test_several_steps_in_one_call_are_those_steps():
    model = compiled(steps_per_execution=2, jit_compile=False, run_eagerly=False)
    other = compiled(jit_compile=False, run_eagerly=False)
    for each in (model, other):
        fit(each, 2)
    for mine, theirs in zip(numpy(model.optimizer.masters), numpy(other.optimizer.masters), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=1e-7)
    assert int(model.optimizer.iterations) == 4


def test_frozen_layers_have_no_masters():
    model = model_in("bfloat16")
    model.layers[0].trainable = False
    model.compile(dk.Masters(ko.SGD(2.0**-12)), "mse", run_eagerly=True)
    before = numpy(model.layers[0].weights)
    fit(model)
    assert [master.path.split("/")[-2] for master in model.optimizer.masters] == ["second", "second"]
    same(model.layers[0].weights, before)


def test_excluded_from_weight_decay_are_the_variables_that_were_named():
    for by_list in (True, False):
        model = model_in("bfloat16")
        ours = dk.Masters(ko.SGD(0.5, weight_decay=0.5))
        exclusion = {"var_list": [model.weights[0]]} if by_list else {"var_names": ["bias"]}
        ours.exclude_from_weight_decay(**exclusion)
        before = numpy(model.weights)
        ours.apply([ops.zeros(each.shape) for each in model.weights], model.weights)
        moved = [not np.array_equal(new, old) for new, old in zip(numpy(ours.masters), before, strict=True)]
        assert moved == ([False, True, True, True] if by_list else [True, False, True, False])


def test_a_float16_weight_stops_at_the_largest_number_and_is_named():
    model = compiled(dk.Masters(ko.SGD(1.0)), "float16")
    model.optimizer.apply(
        [ops.full(each.shape, -1e5 if "first/kernel" in each.path else 0.0) for each in model.weights], model.weights
    )
    assert (numpy([model.weights[0]])[0] == 65504).all()
    assert (numpy([model.optimizer.masters[0]])[0] == LARGEST_OF_FLOAT16).all()
    assert model.optimizer.at_limit() == [model.weights[0].path]
    with pytest.warns(DuotoneWarning, match="FP16 weights have reached 65520, .*first/kernel"):
        model.optimizer.finalize_variable_values(model.weights)
    # and it comes back from there
    model.optimizer.apply([ops.full(each.shape, 1e3) for each in model.weights], model.weights)
    assert model.optimizer.at_limit() == []


def test_nothing_to_do_is_said():
    model = model_in("float32")
    with pytest.warns(DuotoneWarning, match="the 4 trainable variables are float32"):
        dk.Masters(ko.SGD(0.1)).build(model.weights)


def test_an_error_in_a_step_of_fit_is_the_one_that_is_raised():
    class Broken(keras.Sequential):
        def train_step(self, *arguments):
            raise RuntimeError("of the step")

    model = Broken([keras.Input((4,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(dk.LossScaleOptimizer(dk.Masters(keras.optimizers.SGD(0.1)), "bf16"), "mse")
    with pytest.raises(RuntimeError, match="of the step"):
        model.fit(np.ones((4, 4), "float32"), np.ones((4, 2), "float32"), verbose=0)
