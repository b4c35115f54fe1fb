"""States of an optimizer with a loss scale in files: its own, and that of Keras' own LossScaleOptimizer.

Keras stores an optimizer's variables by number, and those of an optimizer inside of it once more, where that is found.
Its own LossScaleOptimizer has four before those: iterations and learning rate, which are not used, the clean steps
since the scale moved, and the scale.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duotone.keras.internals import ops
from duotone.loss_scale import LossScale


def save_state(variables: Sequence[Any], store: Any) -> None:
    """Write the values of an optimizer's own variables into a store of arrays by number; the scale is the first."""
    for place, variable in enumerate(variables):
        store[str(place)] = ops.convert_to_numpy(variable.value)


def load_state(optimizer: Any, variables: Sequence[Any], store: Mapping[str, Any]) -> bool:
    """Read the values of its own variables that one of the two wrote; return False if none of them did."""
    arrays = {name: np.asarray(store[name]) for name in map(str, range(4)) if name in store.keys()}  # noqa: SIM118
    if not optimizer.built or len(arrays) < 4:
        return False
    if arrays["0"].dtype.kind == "f" and len(store.keys()) == len(variables):
        for place, variable in enumerate(variables):
            variable.assign(store[str(place)])
        return True
    if "".join(array.dtype.kind for array in arrays.values()) != "ifif" or any(
        array.shape for array in arrays.values()
    ):
        return False
    state, settings = optimizer.scale_state, optimizer.settings
    state.scale.assign(within(settings, arrays["3"].item()))
    optimizer.record.last_scale.assign(within(settings, arrays["3"].item()))
    state.growth_tracker.assign(arrays["2"].item() if settings.is_dynamic else 0)
    # a scale that was found is not searched for
    state.search.assign(0)
    return True


def within(settings: LossScale, scale: float) -> float:
    """Return the power of two at or below a scale that lies in the settings' bounds; of NaN the lowest.

    >>> within(LossScale(), 400.0), within(LossScale(), 0.0), within(LossScale(), math.inf) == 2.0**32
    (256.0, 1.0, True)
    """
    if not settings.is_dynamic:
        return settings.init_scale
    if not scale > settings.min_scale:
        return settings.min_scale
    if scale >= settings.max_scale:
        return settings.max_scale
    return 2.0 ** math.floor(math.log2(scale))


def settings_of_keras(config: Mapping[str, Any]) -> LossScale:
    """Return the settings of a configuration of Keras' own LossScaleOptimizer.

    >>> settings_of_keras({"initial_scale": 3.0, "dynamic_growth_steps": 20})
    LossScale(init_scale=2.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=20, hysteresis=1, ...)
    """
    scale = within(LossScale(), float(config.get("initial_scale", 2.0**15)))
    return LossScale(init_scale=scale, growth_interval=int(config.get("dynamic_growth_steps", 2000)))
