"""The FP32 weights of a model whose variables are in 16 bits: masters where there are some."""

from typing import Any

import keras
import numpy as np

from duotone.errors import OptimizerError
from duotone.keras.internals import is_released, ops
from duotone.keras.weights.paths import weights_by_path


def master_weights(model: keras.Model, optimizer: Any = None) -> dict[str, np.ndarray]:
    """Return all weights of a model by their paths: masters, and what has none in FP32.

    Args:
        model: trained with `Masters`, alone or inside of another optimizer, such as `LossScaleOptimizer`.
        optimizer: that it is trained by; None for the one that it was compiled with.

    Returns:
        NumPy arrays, in the order of `model.weights`, by path: the names of the layers inside the model, and the
        weight's, such as `encoder/dense/kernel`. A model that was saved and loaded has the same. FP32 for
        floating-point weights, FP64 ones and integers as they are. A master of a weight that was written into since
        the last step is the weight.

    Raises:
        OptimizerError: there is no optimizer with `Masters`, two weights have the same path, or the values are in the
            hands of a `fit` on JAX.

    >>> import duotone.keras as dk
    >>> dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="bfloat16", name="dense")
    >>> model = keras.Sequential([keras.Input((1,)), dense])
    >>> model.compile(dk.Masters(keras.optimizers.SGD(2.0**-12)), "mse", run_eagerly=True)
    >>> model.optimizer.apply([ops.ones((1, 1))], model.trainable_variables)
    >>> {path: weight.tolist() for path, weight in dk.master_weights(model).items()}
    {'dense/kernel': [[0.999755859375]]}
    """
    masters = masters_of(model, optimizer, "master_weights")
    return {path: in_float32(masters.get(id(weight), weight)) for path, weight in weights_by_path(model).items()}


def masters_of(model: keras.Model, optimizer: Any, asked: str) -> dict[int, Any]:
    """Return the masters of a model's optimizer by the identity of their weights; values can be read.

    Args:
        model: of Keras.
        optimizer: that it is trained by; None for its own.
        asked: the function that the user has called.

    Raises:
        OptimizerError: as `master_weights`.
    """
    if not isinstance(model, keras.Model):
        raise OptimizerError(f"{asked} takes a model of Keras, not {model!r:.60}; give the compiled model")
    outer: Any = getattr(model, "optimizer", None) if optimizer is None else optimizer
    inner: Any = outer
    while inner is not None and not hasattr(inner, "masters"):
        inner = getattr(inner, "inner_optimizer", None)
    if inner is None:
        raise OptimizerError(
            f'model "{model.name}" has no optimizer with masters; compile it with '
            "duotone.keras.Masters(keras.optimizers.AdamW(1e-3)), or in a loop of your own give that optimizer: "
            f"{asked}(model, ..., optimizer=optimizer)"
        )
    if any(map(is_released, [*model.weights, *outer.variables])):
        raise OptimizerError(
            "the model's values are with the fit that runs on JAX; call model.jax_state_sync() in the callback before "
            f"{asked}"
        )
    return {id(master.weight): master for master in inner.masters}


def in_float32(variable: Any) -> np.ndarray:
    """Return a copy of the value of a variable or a tensor: FP32 of 16-bit numbers, others as they are."""
    value = ops.convert_to_tensor(variable)
    if keras.backend.standardize_dtype(value.dtype) in ("bfloat16", "float16"):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))
