"""The loss scale in Keras moves as `duotone.loss_scale.update` says, bit for bit, eagerly and compiled."""

import keras
import numpy as np
import pytest

import duotone.keras as dk
from duotone.loss_scale import LossScale, init_state, update

from .stepping import WAYS, step_of

SETTINGS = {
    "dynamic": LossScale(growth_interval=3),
    "hysteresis": LossScale(growth_interval=4, hysteresis=3),
    "static": LossScale.static(1024),
    "floor": LossScale(init_scale=4.0, min_scale=2.0, growth_interval=2),
    "ceiling": LossScale(init_scale=2.0**30, growth_interval=1, max_scale=2.0**31),
    "largest": LossScale(init_scale=2.0**126, growth_interval=1, max_scale=2.0**127),
    "below 1": LossScale(init_scale=1.0, min_scale=2.0**-20, growth_interval=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_scale_moves_as_in_python(name: str, way: str) -> None:
    settings = SETTINGS[name]
    optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(0.5), settings)
    optimizer.scale_loss(1.0)
    variable = keras.Variable([1.0, 2.0])
    step = step_of(optimizer, [variable], way)
    expected, rng = init_state(settings), np.random.default_rng(7)
    pattern = [True, *(rng.random(19) < 0.35), *[True] * 6, *[False] * 8]
    for overflow in pattern:
        scale = expected.scale
        expected = update(settings, expected, bool(overflow))
        step([np.float32([np.inf if overflow else 0.0, 0.0])])
        found = {leaf: getattr(optimizer.scale_state, leaf).numpy().item() for leaf in vars(expected)}
        assert found == vars(expected)
        assert optimizer.report().loss_scale == scale
    assert optimizer.report().skipped == sum(pattern)
