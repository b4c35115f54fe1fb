"""A small model in 16 bits and its twin in FP32, gradients for both, and every optimizer of Keras, in many settings."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras import optimizers as ko

SHAPES = ((5, 5), (5,), (5, 5), (5,))

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: ko.SGD(0.1),
    "sgd-nesterov": lambda: ko.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam-clipvalue": lambda: ko.Adam(1e-3, clipvalue=0.1, amsgrad=True),
    "adam-clipnorm": lambda: ko.Adam(1e-3, clipnorm=0.1, weight_decay=0.01),
    "adam-global-clipnorm": lambda: ko.Adam(1e-3, global_clipnorm=0.1),
    "adam-loss-scale-factor": lambda: ko.Adam(1e-3, loss_scale_factor=8.0),
    "adamw": lambda: ko.AdamW(1e-3),
    "adamw-schedule": lambda: ko.AdamW(ko.schedules.ExponentialDecay(1e-3, 2, 0.5)),
    "adamw-accumulation": lambda: ko.AdamW(1e-3, gradient_accumulation_steps=3),
    "adamw-average": lambda: ko.AdamW(1e-3, use_ema=True, ema_overwrite_frequency=2),
    "adamax": lambda: ko.Adamax(1e-3),
    "nadam": lambda: ko.Nadam(1e-3, weight_decay=0.01),
    "rmsprop": lambda: ko.RMSprop(1e-3, centered=True, momentum=0.9),
    "adagrad": lambda: ko.Adagrad(1e-2),
    "adadelta": lambda: ko.Adadelta(1.0),
    "adafactor": lambda: ko.Adafactor(1e-2),
    "lion": lambda: ko.Lion(1e-4),
    "lamb": lambda: ko.Lamb(1e-3),
    "ftrl": lambda: ko.Ftrl(1e-3),
    "muon": lambda: ko.Muon(1e-3, weight_decay=0.01),
    "schedule-free-adamw": lambda: ko.ScheduleFreeAdamW(1e-3),
    "multi": lambda: ko.MultiOptimizer(ko.OptimizerMap(ko.SGD(0.1), {"first/.*": ko.Adam(1e-3)})),
}


def model_in(dtype: str, constraint: Any = None) -> Any:
    """Return a model of two layers, whose biases are not 0, always with the same values, rounded to 16 bits."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(5, dtype=dtype, name=name, bias_initializer="random_normal", kernel_constraint=constraint)
        for name in ("first", "second")
    ]
    model = keras.Sequential([keras.Input((5,)), *layers])
    for variable, values in zip(model.trainable_variables, start(dtype), strict=True):
        variable.assign(ops.cast(values, variable.dtype))
    return model


def start(dtype: str) -> list[np.ndarray]:
    """Return FP32 values that BF16 and FP16 both hold exactly."""
    draws = np.random.default_rng(3)
    return [(draws.integers(-100, 100, shape) / 128).astype(np.float32) for shape in SHAPES]


def gradients(dtype: str, steps: int) -> Iterator[list[Any]]:
    """Yield gradients of a 16-bit format, as tensors, of very different sizes from step to step."""
    draws = np.random.default_rng(0)
    for _ in range(steps):
        size = 10.0 ** draws.integers(-4, 2)
        yield [ops.cast(draws.standard_normal(shape).astype(np.float32) * size, dtype) for shape in SHAPES]


def numpy(values: Sequence[Any]) -> list[np.ndarray]:
    """Return copies in NumPy, FP32 for what is in 16 bits."""
    return [np.array(ops.convert_to_numpy(ops.cast(value, "float32"))) for value in values]


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Compare bit for bit."""
    for mine, other in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_array_equal(mine.view(np.uint32), other.view(np.uint32))
