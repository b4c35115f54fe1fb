"""Epochs that trained nothing do not count for callbacks that count epochs, in any order of callbacks."""

from typing import Any

import keras
import pytest

import duotone.keras as dk

from ..runs import build, data, scaled

HALF = 0.5


def per_epoch(*patterns: str, callbacks: list[Any], model: Any = None, place: int = 0) -> Any:
    """Train one epoch for each pattern, in one `fit`, and return the history."""
    length = len(patterns[0])
    assert {len(pattern) for pattern in patterns} == {length}
    model = build() if model is None else model
    callbacks = list(callbacks)
    callbacks.insert(place, dk.ScaleReport(patience=None))
    x, y = data("".join(patterns))

    def batches() -> Any:
        for start in range(0, len(x), 4):
            yield x[start : start + 4], y[start : start + 4]

    return model.fit(batches(), steps_per_epoch=length, epochs=len(patterns), verbose=0, callbacks=callbacks).history


@pytest.mark.parametrize("place", [0, 1])
def test_a_schedule_of_the_epochs_number_sees_the_same_epoch_again(place: int) -> None:
    asked: list[int] = []

    def schedule(epoch: int, learning_rate: float) -> float:
        asked.append(epoch)
        return [0.1, 0.05, 0.025, 0.0125, 0.00625][epoch]

    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    history = per_epoch("xx", "..", "xx", "xx", "..", callbacks=[scheduler], place=place)
    assert asked == [0, 0, 1, 1, 1]
    assert history["learning_rate"] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05])
    assert scheduler.schedule is schedule


@pytest.mark.parametrize("place", [0, 1])
def test_a_schedule_of_the_last_rate_starts_from_the_same_rate_again(place: int) -> None:
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, learning_rate: learning_rate * HALF)
    history = per_epoch("xx", "xx", "..", "x.", "..", callbacks=[scheduler], place=place)
    # an epoch with one step that was taken is an epoch
    assert history["learning_rate"] == pytest.approx([0.005, 0.005, 0.005, 0.0025, 0.00125])


def test_a_schedule_that_takes_the_epoch_alone() -> None:
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch))
    history = per_epoch("..", "xx", "..", callbacks=[scheduler])
    assert history["learning_rate"] == pytest.approx([0.1, 0.05, 0.05])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_early_stopping_does_not_count_them(patience: int, place: int) -> None:
    # the loss of every epoch but the first is no improvement
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=patience, min_delta=1e9)
    history = per_epoch("..", *["xx"] * 4, *[".."] * 4, callbacks=[stopping], place=place)
    assert len(history["loss"]) == 1 + 4 + max(patience, 1)


@pytest.mark.parametrize("place", [0, 1])
def test_early_stopping_warms_up_by_number(place: int) -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=1, min_delta=1e9, start_from_epoch=2)
    history = per_epoch("xx", "..", "..", "xx", "..", "..", callbacks=[stopping], place=place)
    # 2 is the first that counts, 3 does not, 4 is no improvement
    assert len(history["loss"]) == 5


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("patience", [0, 1])
def test_a_plateau_does_not_count_them(patience: int, place: int) -> None:
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=patience, min_delta=1e9, factor=HALF)
    history = per_epoch("..", "xx", "xx", "..", "..", callbacks=[plateau], place=place)
    # what is logged is the rate before the callback changes it
    assert history["learning_rate"] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005])


@pytest.mark.parametrize("place", [0, 1])
def test_a_plateaus_cooldown_does_not_count_them(place: int) -> None:
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e9, factor=HALF, cooldown=2)
    history = per_epoch("..", "..", "xx", "..", "xx", "..", "..", "..", callbacks=[plateau], place=place)
    # reduced after the second epoch; then two of cooldown, in the last of which patience counts again
    assert history["learning_rate"] == pytest.approx([0.01, 0.01, *[0.005] * 4, 0.0025, 0.0025])
    assert plateau.wait == 0


def test_without_it_keras_counts_them_all() -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=1, min_delta=1e9)
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, learning_rate: learning_rate * HALF)
    x, y = data("xx")
    model = build()
    history = model.fit(x, y, batch_size=4, epochs=4, verbose=0, callbacks=[stopping, scheduler]).history
    assert history["learning_rate"] == pytest.approx([0.005, 0.0025])


def test_a_schedule_of_steps_needs_no_hold() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 1, HALF)
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=9)
    model = build(scaled(learning_rate=decay))
    per_epoch("xx", "xx", ".x", callbacks=[stopping], model=model)
    assert int(model.optimizer.iterations) == 1
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.05)


def test_accumulating_alone_is_no_skip() -> None:
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.01, gradient_accumulation_steps=8), "fp16-mixed")
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, learning_rate: learning_rate * HALF)
    history = per_epoch("..", "..", callbacks=[scheduler], model=build(optimizer))
    assert history["learning_rate"] == pytest.approx([0.005, 0.0025])
