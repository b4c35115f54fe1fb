"""FP32 weights into a model whose variables are in 16 bits, and into its masters: the inverse of `master_weights`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from duotone.call_site import warn
from duotone.errors import OptimizerError, nearest_names
from duotone.keras import internals
from duotone.keras.weights.codec import SPLIT_DTYPES, encode
from duotone.keras.weights.master_weights import in_float32, master_weights, masters_of
from duotone.keras.weights.paths import weights_by_path

# the smallest magnitude that rounds to Inf in FP16
_FLOAT16_OVERFLOW = 65520.0


def load_master_weights(model: keras.Model, weights: Any, optimizer: Any = None) -> None:
    """Write FP32 weights into a model and its masters: the inverse of `master_weights`.

    A 16-bit weight that is trained gets all bits of what it is given, the upper ones itself and the lower ones in its
    tail (in FP16 from 2^-16 on); one that is not trained is rounded to nearest. Moments and the loss scale stay as they
    are. An optimizer that is not built yet is built.

    Args:
        model: built, and trained with `Masters`, alone or inside of another optimizer, such as `LossScaleOptimizer`.
        weights: all weights of the model, in FP32, FP64 or 16 bits: arrays or tensors by path, as `master_weights`
            returns them or by `variable.path`; a list of them in the order of `model.weights`, as
            `model.get_weights()` returns; a model in FP32 that is built alike, or one with masters; or the path of a
            `.weights.h5`, `.keras` or other file that `model.load_weights` reads, saved from a model in FP32.
        optimizer: that the model is trained by; None for the one that it was compiled with.

    Raises:
        OptimizerError: the model is not built or has no optimizer with `Masters`; a weight is missing or there is one
            more; an array has another shape or holds no numbers; a value is too large for a weight in FP16; or the
            values are in the hands of a `fit` on JAX. Nothing is written then.

    >>> import duotone.keras as dk
    >>> def build(policy):
    ...     with dk.policy(policy):
    ...         return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> trained, model = build("fp32"), build("bf16")
    >>> model.compile(dk.Masters(keras.optimizers.Adam(1e-3)), "mse")
    >>> dk.load_master_weights(model, trained)
    >>> bool((dk.master_weights(model)["head/kernel"] == trained.get_weights()[0]).all())
    True
    """
    masters = masters_of(model, optimizer, "load_master_weights")
    if not model.built:
        raise OptimizerError(
            f'model "{model.name}" is not built, so it has no weights to write to; call it on a batch, or '
            "model.build(shape), before load_master_weights"
        )
    trained_by = model.optimizer if optimizer is None else optimizer
    if not trained_by.built:
        trained_by.build(model.trainable_variables)
        masters = masters_of(model, optimizer, "load_master_weights")
    named = weights_by_path(model)
    values = {path: _value(path, value, named[path]) for path, value in _given(weights, model, named).items()}
    for path, value in values.items():
        masters.get(id(named[path]), named[path]).assign(value)


def _given(weights: Any, model: keras.Model, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given for each weight, by path."""
    if isinstance(weights, str | os.PathLike):
        return _in_file(os.fspath(weights), model, named)
    if isinstance(weights, keras.Model):
        weights = _of_model(weights)
    if isinstance(weights, Mapping):
        return _by_path(weights, named)
    if not isinstance(weights, Sequence):
        raise OptimizerError(
            f"load_master_weights takes arrays by path, a list of arrays, a model or the path of a file, not "
            f"{type(weights).__name__}; give what master_weights of such a model returned"
        )
    if len(weights) != len(named):
        raise OptimizerError(
            f"load_master_weights got {len(weights)} weights, but the model has {len(named)}; give one for each of "
            "model.weights, in that order"
        )
    return dict(zip(named, weights, strict=True))


def _by_path(weights: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    rest, found = dict(weights), {}
    for path, weight in named.items():
        name = path if path in rest else weight.path
        if name not in rest:
            others = rest.keys() - named.keys() - {each.path for each in named.values()}
            near = f" ({nearest_names(path, sorted(map(str, others)))})" if others else ""
            raise OptimizerError(
                f'the weight "{path}" is missing{near}; give all of them, as master_weights returns them, or, where '
                "layers have other names, a list in the order of model.weights"
            )
        found[path] = rest.pop(name)
    for name in rest:
        raise OptimizerError(f'the model has no weight "{name}"; {nearest_names(str(name), named)}')
    return found


def _of_model(source: keras.Model) -> list[Any]:
    """Return the weights of another model in FP32: its masters, if it has some."""
    optimizers = internals.nested_optimizers(source.optimizer) if getattr(source, "optimizer", None) is not None else ()
    if any(hasattr(each, "masters") for each in optimizers):
        return list(master_weights(source).values())
    return list(source.weights)


def _in_file(path: str, model: keras.Model, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights that a file holds for a model."""
    try:
        values = internals.values_in_file(model, path, list(named.values()))
    except FileNotFoundError:
        raise
    except Exception as error:
        # h5py, zipfile and Keras have no error in common; where Keras says several things, the second is an example
        said = str(error).split("\n\n")
        raise OptimizerError(
            f"{path} does not hold the weights of this model ({said[min(1, len(said) - 1)]}); give the file of a model "
            "that is built alike"
        ) from error
    missing = [name for name, value in zip(named, values, strict=True) if value is None]
    if missing:
        raise OptimizerError(f'{path} has no weight "{missing[0]}"; give the file of a model that is built alike')
    found = dict(zip(named, values, strict=True))
    tails = [
        encode(internals.ops.cast(found[name], "float32"), weight.dtype)[1]
        for name, weight in named.items()
        if weight.dtype in SPLIT_DTYPES
    ]
    if tails and not any(in_float32(tail).any() for tail in tails):
        warn(
            f"every weight in {path} is one of 16 bits already, so nothing is gained over model.load_weights; where "
            "that model had masters, their tails are with its optimizer: load_model and load_weights read both"
        )
    return found


def _value(path: str, value: Any, weight: keras.Variable) -> np.ndarray:
    """Return what is to be written to a weight, if that is possible."""
    is_tensor = isinstance(value, keras.Variable) or keras.ops.is_tensor(value)
    array = in_float32(value) if is_tensor else np.asarray(value)
    # bool, integers, floats, and the 16-bit floats of ml_dtypes, whose kind is V
    if array.dtype.kind not in "biuf" and not array.dtype.name.startswith(("bfloat16", "float")):
        raise OptimizerError(f'what is given for the weight "{path}" is {array.dtype}; give an array of numbers')
    if array.shape != tuple(weight.shape):
        raise OptimizerError(
            f'the weight "{path}" has shape {tuple(weight.shape)}, but what is given for it has {array.shape}; give '
            "the weights of a model that is built alike"
        )
    if not keras.backend.is_float_dtype(weight.dtype) or weight.dtype == "float64":
        return array
    array = array.astype(np.float32)
    if weight.dtype == "float16":
        magnitude = np.abs(array[np.isfinite(array)])
        if magnitude.size and magnitude.max() >= _FLOAT16_OVERFLOW:
            raise OptimizerError(
                f'the weight "{path}" would be {magnitude.max():.6g}, beyond FP16\'s largest 65504; use policy "bf16", '
                "or keep its layer in FP32 by a rule"
            )
    return array
