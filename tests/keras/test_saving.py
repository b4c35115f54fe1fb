"""What is saved is every bit that the next step depends on: files, callbacks that save, and interrupted runs."""

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import duotone.keras as dk
from duotone.errors import DuotoneWarning, OptimizerError
from duotone.loss_scale import LossScale

from .runs import bits, build, data, fit

# the policy of the model's layers, and what trains it
KINDS = {
    "fp16-mixed": ("mixed_float16", lambda: dk.LossScaleOptimizer(keras.optimizers.AdamW(0.01), "fp16-mixed")),
    "fp16": ("float16", lambda: dk.LossScaleOptimizer(dk.Masters(keras.optimizers.AdamW(0.01)), "fp16")),
    "bf16": ("bfloat16", lambda: dk.LossScaleOptimizer(dk.Masters(keras.optimizers.AdamW(0.01)), "bf16")),
    "masters alone": ("bfloat16", lambda: dk.Masters(keras.optimizers.SGD(0.01, momentum=0.9))),
    "static": ("mixed_float16", lambda: dk.LossScaleOptimizer(keras.optimizers.SGD(0.01), LossScale.static(128.0))),
}
# overflows before and after, so that counts, flags and a search for the scale are open when it is saved
BEFORE, AFTER = "x.x..", ".x..."

QUICK = {("fp16", "float32"), ("static", "bfloat16"), ("fp16-mixed", "float32"), ("masters alone", "bfloat16")}


def kinds(*quick: str) -> Any:
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in KINDS]
    )


def made(kind: str, **settings: Any) -> Any:
    policy, optimizer = KINDS[kind]
    keras.config.set_dtype_policy(policy)
    model = build(optimizer(), norm=True, **settings)
    keras.config.set_dtype_policy("float32")
    return model


def pattern(kind: str, letters: str) -> str:
    # nobody skips there
    return letters.replace("x", ".") if kind == "masters alone" else letters


def trained(kind: str) -> Any:
    model = made(kind)
    fit(model, pattern(kind, BEFORE))
    return model


def is_same_from_here_on(kind: str, model: Any, loaded: Any) -> None:
    assert bits(loaded) == bits(model)
    fit(model, pattern(kind, AFTER))
    fit(loaded, pattern(kind, AFTER))
    assert bits(loaded) == bits(model)


@pytest.mark.parametrize(
    ("kind", "current"),
    [
        # the policy that is global at the time matters to Keras alone, and one kind shows it
        pytest.param(kind, current, marks=() if (kind, current) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for current in ("float32", "mixed_float16", "float16", "bfloat16")
    ],
)
def test_a_whole_model_comes_back_under_every_global_policy(kind: str, current: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy(current)
    if (kind, current) == ("masters alone", "mixed_float16"):
        # `compile` puts Keras' own scaler there around whatever has none
        with pytest.raises(OptimizerError, match="Keras' own LossScaleOptimizer does not go around Masters"):
            keras.saving.load_model(tmp_path / "model.keras")
        return
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    assert type(loaded.optimizer) is type(model.optimizer)
    # an input layer has the policy of the moment, and nothing comes of it
    ours, theirs = ([layer.dtype_policy.name for layer in each.layers[1:]] for each in (loaded, model))
    assert ours == theirs
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    is_same_from_here_on(kind, model, loaded)


@kinds("fp16", "masters alone")
def test_weights_come_back_into_a_model_that_was_made_anew(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_weights(tmp_path / "model.weights.h5")
    other = made(kind)
    assert bits(other) != bits(model)
    other.load_weights(tmp_path / "model.weights.h5")
    is_same_from_here_on(kind, model, other)
    # and over a run that went on
    after = bits(other)
    model.load_weights(tmp_path / "model.weights.h5")
    assert bits(model) != after
    fit(model, pattern(kind, AFTER))
    assert bits(model) == after


@kinds("fp16", "masters alone")
def test_weights_come_back_where_the_optimizer_is_not_built_yet(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_weights(tmp_path / "model.weights.h5")
    other = made(kind)
    other.compile(KINDS[kind][1](), "mse", run_eagerly=True)
    assert not other.optimizer.built
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other.load_weights(tmp_path / "model.weights.h5")
    is_same_from_here_on(kind, model, other)


def test_a_file_without_a_state_of_the_optimizer_says_nothing_here(tmp_path: Path) -> None:
    other = made("fp16")
    keras.models.clone_model(other).save_weights(tmp_path / "model.weights.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DuotoneWarning)
        other.load_weights(tmp_path / "model.weights.h5")


class Interrupted(Exception):
    """The end of a run that nobody asked for."""


class Interruption(keras.callbacks.Callback):
    """Ends a run in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == self.at:
            raise Interrupted


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@kinds("fp16")
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(kind: str, compiled: bool, tmp_path: Path) -> None:
    def run(model: Any, *callbacks: Any) -> Any:
        return fit(model, pattern(kind, BEFORE), *callbacks, epochs=3)

    def report() -> list[Any]:
        return [] if kind == "masters alone" else [dk.ScaleReport(every=2)]

    straight, model = made(kind, compiled=compiled), made(kind, compiled=compiled)
    straight.set_weights(model.get_weights())
    history = run(straight, *report())
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(Interrupted):
        run(model, backup, *report(), Interruption(1, 3))
    resumed = made(kind, compiled=compiled)
    rest = run(resumed, keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), *report())
    assert len(rest["loss"]) == 2
    assert all(values[1:] == rest[name] for name, values in history.items())
    assert bits(resumed) == bits(straight)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@kinds("fp16-mixed")
def test_what_a_checkpoint_of_an_epoch_holds(kind: str, whole: bool, tmp_path: Path) -> None:
    path = str(tmp_path / ("{epoch}.keras" if whole else "{epoch}.weights.h5"))
    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=not whole)
    model = made(kind)
    fit(model, pattern(kind, BEFORE), saving, epochs=2)
    after = bits(model)
    if whole:
        loaded = keras.saving.load_model(path.format(epoch=1))
        loaded.run_eagerly = True
    else:
        loaded = made(kind)
        loaded.load_weights(path.format(epoch=1))
    fit(loaded, pattern(kind, BEFORE))
    assert bits(loaded) == after


@kinds("masters alone")
def test_the_best_weights_come_back_as_numbers(kind: str) -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=9, restore_best_weights=True)
    model = made(kind)
    seen: list[list[Any]] = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.get_weights()))
    losses = fit(model, "....", keep, stopping, epochs=4)["loss"]
    for ours, best in zip(model.get_weights(), seen[int(np.argmax(losses))], strict=True):
        assert ours.tobytes() == best.tobytes()
    # tails that belonged to other weights are not taken for theirs
    masters = list(dk.master_weights(model).values()) if kind in ("fp16", "bf16", "masters alone") else []
    for variable, master in zip(model.weights if masters else [], masters, strict=True):
        own = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
        assert np.abs(master - own).max() <= np.abs(own).max() * 2.0**-8
    assert np.isfinite(fit(model, "..")["loss"][0])


@kinds("masters alone")
def test_a_clone_trains_as_its_model_did(kind: str) -> None:
    model = made(kind)
    clone = keras.models.clone_model(model)
    clone.compile(type(model.optimizer).from_config(model.optimizer.get_config()), loss="mse", run_eagerly=True)
    clone.optimizer.build(clone.trainable_variables)
    clone.set_weights(model.get_weights())
    assert bits(clone) == bits(model)
    for each in (model, clone):
        fit(each, pattern(kind, BEFORE))
    assert bits(clone) == bits(model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizers_configuration_makes_the_same_one(kind: str) -> None:
    optimizer = KINDS[kind][1]()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()


def test_custom_objects_are_found_where_registration_is_not(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("elsewhere", name="Mine")
    class Mine(keras.optimizers.SGD):
        pass

    model = build(dk.LossScaleOptimizer(Mine(0.01, momentum=0.9)))
    fit(model, BEFORE)
    model.save(tmp_path / "model.keras")
    registered = keras.saving.get_custom_objects()
    held = registered.pop("elsewhere>Mine")
    try:
        loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"elsewhere>Mine": held})
    finally:
        registered["elsewhere>Mine"] = held
    assert bits(loaded) == bits(model)


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model = trained("fp16")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    inputs = data("..")[0]
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_a_compiled_model_can_be_exported(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(dk.LossScaleOptimizer(dk.Masters(keras.optimizers.Adam(1e-3)), "bf16"), "mse")
    model.optimizer.build(model.trainable_variables)
    model.export(tmp_path / "exported", verbose=False)
    assert (tmp_path / "exported" / "saved_model.pb").exists()
