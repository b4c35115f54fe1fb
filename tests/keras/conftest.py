"""What the tests of duotone.keras share: KERAS_BACKEND's backend, a fresh global state, several devices.

A process has one backend, so the three run in processes of their own; `make test-keras` starts them.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of tests that concern one backend, or some."""
    config.addinivalue_line("markers", "backends(*names): runs on these backends of Keras alone")
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # two devices of a strategy; TensorFlow takes that before it runs anything alone
        cpus = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked with other backends."""
    import keras

    mark = item.get_closest_marker("backends")
    if mark and keras.backend.backend() not in mark.args:
        pytest.skip(f"concerns Keras on {', '.join(mark.args)}")


@pytest.fixture(autouse=True)
def _fresh_global_state() -> Iterator[None]:
    """Give every test Keras' defaults and its own seed, and leave none of its own behind."""
    import keras

    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    keras.distribution.set_distribution(None)
