"""What goes wrong in Keras does not with Duotone: the scenarios of benchmarks/keras_faults.py, on this backend."""

import importlib
from pathlib import Path

import keras
import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    keras_scenarios = importlib.import_module("keras_scenarios")
SCENARIOS, found_by = keras_scenarios.SCENARIOS, keras_scenarios.found_by

# those that take less than a second or two
QUICK = {"forgets_to_scale", "applies_eagerly", "softmax_underflows", "loads_another_optimizer"}
# apply outside of compiled functions is a fault of Keras' on JAX alone
SOUND_IN_KERAS = {"applies_eagerly"} if keras.backend.backend() != "jax" else set()


def _param(name):
    quick = SCENARIOS[name].__name__ in QUICK
    return pytest.param(name, marks=[] if quick else pytest.mark.slow, id=SCENARIOS[name].__name__)


@pytest.mark.parametrize("name", [_param(name) for name in SCENARIOS])
def test_nothing_goes_wrong_with_duotone(name):
    found = found_by(keras_scenarios.Duotone(), [name])[name]
    assert found.sound, found.text


@pytest.mark.slow
@pytest.mark.parametrize("name", [_param(name) for name in SCENARIOS])
def test_keras_has_the_fault_still(name):
    # one that Keras mends no longer belongs into the table
    found = found_by(keras_scenarios.Keras(), [name])[name]
    assert found.sound == (SCENARIOS[name].__name__ in SOUND_IN_KERAS), found.text


def test_an_error_in_a_scenario_is_a_result_and_not_sound(monkeypatch):
    def fails(side):
        raise ValueError("no. Never")

    monkeypatch.setitem(SCENARIOS, "a scenario", fails)
    found = found_by(keras_scenarios.Keras(), ["a scenario"])["a scenario"]
    assert found == keras_scenarios.Found("`ValueError: no`", False)
