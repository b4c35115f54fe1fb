"""The little that `keras.ops` lacks, said for TensorFlow, JAX and torch.

A backend's framework is imported where it is used, so that nothing is imported that Keras has not imported itself.
"""

from typing import Any

import keras

# a tensor of the backend
Tensor = Any


def bits(floats: Tensor) -> Tensor:
    """Return the bit patterns of floats as signed integers of their size: int32 of float32, int16 of 16-bit formats."""
    size = 32 if keras.backend.standardize_dtype(floats.dtype) == "float32" else 16
    return _bitcast(floats, f"int{size}")


def floats(bits: Tensor, dtype: str) -> Tensor:
    """Return the floats of a format whose bit patterns are given as signed integers of its size."""
    return _bitcast(bits, dtype)


def _bitcast(tensor: Tensor, dtype: str) -> Tensor:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(tensor, dtype)
    if backend == "jax":
        from jax import lax

        return lax.bitcast_convert_type(tensor, dtype)
    import torch

    return tensor.detach().view(getattr(torch, dtype))


def is_traced(value: Any) -> bool:
    """Return whether a tensor is part of a program that is being traced, so that no number can be read from it.

    >>> is_traced(keras.ops.ones(1))
    False
    """
    backend = keras.backend.backend()
    if backend == "jax":
        from jax.core import Tracer

        return isinstance(value, Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.is_symbolic_tensor(value)
    return False


def takes_branches() -> bool:
    """Return whether a branch costs nothing in JAX's programs: on a CPU, where no host waits for a device."""
    from jax import default_backend

    return default_backend() == "cpu"
