"""How a run ends that only skips: on every backend the weights of the last good step are there, and it is said why."""

import re
from typing import Any

import keras
import numpy as np
import pytest

import duotone.keras as dk
from duotone.errors import LossScaleCollapse, NonFiniteLoss
from duotone.keras.report.collapse import collapse_error
from duotone.loss_scale import LossScale

from ..runs import bits, build, data, fit, scaled


def test_gradients_that_overflow_ever_again_end_the_run() -> None:
    model = build()
    with pytest.raises(LossScaleCollapse) as caught:
        fit(model, "..xxxxxx", dk.ScaleReport(every=1, patience=5))
    text = str(caught.value)
    assert text.startswith("5 steps in a row were skipped, the last at loss scale ")
    assert "2 of 4 gradients are not finite (" in text
    assert 'the backward pass met the first in layer "first", or between it and layer "second"' in text
    # and what it says to write can be read, and is about that layer
    (policy,) = re.findall(r'dk\.policy\("(.*?)"\)', text)
    with dk.policy(policy):
        layers = build().layers
    assert [layer.dtype_policy.name for layer in layers if layer.name == "first"] == ["float32"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_is_as_the_last_good_step_left_it(compiled: bool) -> None:
    settings = {"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}
    model, good = build(compiled=compiled, **settings), build(compiled=compiled, **settings)
    good.set_weights(model.get_weights())
    fit(good, "..")
    with pytest.raises(LossScaleCollapse):
        fit(model, ".." + "x" * 8, dk.ScaleReport(every=4, patience=3))
    for ours, theirs in zip(model.get_weights(), good.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(model.predict(data("..")[0], verbose=0)).all()
    assert model.optimizer.report().skipped_in_a_row >= 3
    # and it trains on
    assert np.isfinite(fit(model, "....", dk.ScaleReport())["grad_norm"][0])


def test_a_loss_that_is_no_number_is_told_apart() -> None:
    model = build()
    with pytest.raises(NonFiniteLoss, match="5 steps in a row were skipped, and the last loss is not finite"):
        fit(model, "..nnnnnn", dk.ScaleReport(every=1, patience=5))
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


def test_a_loss_that_was_no_number_once_is_forgotten_in_the_next_epoch() -> None:
    model = build()
    fit(model, "n...", dk.ScaleReport(every=1, patience=5))
    with pytest.raises(LossScaleCollapse):
        fit(model, "xxxxxx", dk.ScaleReport(every=1, patience=5))


def test_two_overflows_at_the_floor_are_enough() -> None:
    model = build(scaled(LossScale(init_scale=4.0, min_scale=2.0)))
    with pytest.raises(LossScaleCollapse, match=r"3 steps in a row were skipped, the last at loss scale 2, its floor"):
        fit(model, "xxxxxx", dk.ScaleReport(every=1))


def test_patience_none_ends_no_run() -> None:
    assert fit(build(), "x" * 8, dk.ScaleReport(every=1, patience=None))["skipped"] == [8]


def test_it_is_found_at_most_every_batches_later() -> None:
    model = build()
    with pytest.raises(LossScaleCollapse):
        fit(model, "." * 9 + "x" * 40, dk.ScaleReport(every=8, patience=2))
    # readings after 1, 2, 4, 8, 16 batches
    assert model.optimizer.report().skipped == 7


def test_what_was_saved_before_is_usable(tmp_path: Any) -> None:
    path = str(tmp_path / "best.weights.h5")
    model = build()
    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    x, y = data("..")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[saving, dk.ScaleReport()])
    before = bits(model)
    with pytest.raises(LossScaleCollapse):
        fit(model, "xxxx", saving, dk.ScaleReport(every=1, patience=2))
    fresh = build()
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(path)
    assert bits(fresh) == before


def test_the_layer_is_that_of_the_last_variable_that_failed() -> None:
    paths = ["a/kernel", "a/bias", "b/inner/kernel", "c/kernel"]
    text = str(collapse_error(paths[:3], paths, 17, 1.0, LossScale()))
    assert 'in layer "b/inner", or between it and layer "c": keep that in FP32' in text
    text = str(collapse_error(paths, paths, 17, 1.0, LossScale()))
    assert 'in layer "c", or in what comes after it, such as the loss: keep' in text
    assert "by a rule of dk.policy" in str(collapse_error(["kernel"], ["kernel"], 17, 1.0, LossScale()))
