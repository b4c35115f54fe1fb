"""The FP32 weights of a model whose variables are in 16 bits: masters where there are some."""

from typing import Any

import keras
import numpy as np

from duotone.errors import OptimizerError
from duotone.keras.internals import is_released, ops


def master_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Return all weights of a model by their paths: masters, and what has none in FP32.

    Args:
        model: compiled with `Masters`, alone or inside of another optimizer, such as `LossScaleOptimizer`.

    Returns:
        NumPy arrays by `variable.path`: FP32 for floating-point weights, FP64 ones and integers as they are. A master
        of a weight that was written into since the last step is the weight.

    Raises:
        OptimizerError: the model is not compiled with `Masters`, two weights have the same path, or the values are in
            the hands of a `fit` on JAX.

    >>> import duotone.keras as dk
    >>> dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="bfloat16", name="dense")
    >>> model = keras.Sequential([keras.Input((1,)), dense], name="model")
    >>> model.compile(dk.Masters(keras.optimizers.SGD(2.0**-12)), "mse", run_eagerly=True)
    >>> model.optimizer.apply([ops.ones((1, 1))], model.trainable_variables)
    >>> {path: weight.tolist() for path, weight in dk.master_weights(model).items()}
    {'model/dense/kernel': [[0.999755859375]]}
    """
    masters = _masters_of(model)
    held = [*model.weights, *model.optimizer.variables]
    if any(map(is_released, held)):
        raise OptimizerError(
            "the model's values are with the fit that runs on JAX; call model.jax_state_sync() in the callback before "
            "master_weights"
        )
    found: dict[str, np.ndarray] = {}
    for weight in model.weights:
        if weight.path in found:
            raise OptimizerError(
                f'two weights of the model have the path "{weight.path}"; give their layers names of their own'
            )
        found[weight.path] = _in_float32(masters.get(id(weight), weight))
    return found


def _masters_of(model: keras.Model) -> dict[int, Any]:
    """Return the masters of a model's optimizer by the identity of their weights."""
    if not isinstance(model, keras.Model):
        raise OptimizerError(f"master_weights takes a model of Keras, not {model!r:.60}; give the compiled model")
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None and not hasattr(optimizer, "masters"):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    if optimizer is None:
        raise OptimizerError(
            f'model "{model.name}" has no optimizer with masters; compile it with '
            "duotone.keras.Masters(keras.optimizers.AdamW(1e-3))"
        )
    return {id(master.weight): master for master in optimizer.masters}


def _in_float32(variable: Any) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    value = ops.convert_to_tensor(variable)
    if dtype in ("bfloat16", "float16"):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))
