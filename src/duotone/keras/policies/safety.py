"""Which layers of Keras 16 bits are not safe in, by the families of `duotone.operations`, and what they get instead.

    float32          the layer computes in FP32, from FP32 variables
    float32_inside   where Keras computes in FP32 inside: 16 bits in and out, FP32 variables; elsewhere as float32

A layer is known by its class and its bases, by the activation that it ends in, by penalties, which are sums, and by
orthogonal initializers, which are factorizations. That Keras' norms compute in FP32 inside, and its softmax, means of
windows and unit norms do not, is measured (`tests/keras/policies/test_safety.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from duotone.operations import Kind, kinds_of

# family to classes of keras.layers
_LAYERS: Mapping[str, str] = MappingProxyType(
    {
        "normalization": "BatchNormalization GroupNormalization LayerNormalization RMSNormalization",
        "softmax": "Softmax",
        "average_pool": "AveragePooling1D AveragePooling2D AveragePooling3D",
        # the gradient of a row that was read often is a sum, on torch in the dtype of the row
        "lookup": "Embedding",
        # a lookup and the product with the same table
        "product": "ReversibleEmbedding",
        "vector_norm": "UnitNormalization",
        "fourier": "STFTSpectrogram MelSpectrogram",
        # what data enters through: its values are the user's, and those beyond 65504 are Inf in FP16
        "statistic": "Normalization Rescaling",
        "loss": "ActivityRegularization",
    }
)
# family to functions of keras.activations, and those of frameworks that mean the same
_ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "softmax": "softmax sparsemax softmax_v2",
        "log_softmax": "log_softmax log_softmax_v2",
        "exponential": "exponential exp squareplus",
        "loss_of_probabilities": "sigmoid",
        "distance": "tanh_shrink tanhshrink",
    }
)
_KINDS_OF_LAYERS = kinds_of(_LAYERS)
_KINDS_OF_ACTIVATIONS = kinds_of(_ACTIVATIONS)
_FLOAT32_INSIDE = frozenset(_LAYERS["normalization"].split())

# their softmax stands between two products, and its rounding to 16 bits is lost in theirs
_ATTENTION = frozenset({"MultiHeadAttention", "GroupedQueryAttention"})
_ONE_POLICY = _ATTENTION | {"LSTM", "GRU", "SimpleRNN", "ConvLSTM"}

_FLOAT32 = {"param": "float32", "compute": "float32"}
_FLOAT32_VARIABLES = {"param": "float32"}


def safe_roles(layer: Any, around: Sequence[str] = ()) -> dict[str, str]:
    """Return the roles that a layer needs where a policy has 16 bits and no rule says otherwise.

    Args:
        layer: of Keras.
        around: the names of the classes of the layer that it is in.

    >>> import keras
    >>> safe_roles(keras.layers.Softmax()), safe_roles(keras.layers.LayerNormalization())
    ({'param': 'float32', 'compute': 'float32'}, {'param': 'float32'})
    >>> safe_roles(keras.layers.Dense(4, activation="relu"))
    {}
    """
    if not _ATTENTION.isdisjoint(around):
        return {}
    # a recurrent layer makes its cell of its own dtype when it is loaded
    layer = getattr(layer, "cell", layer)
    for cls in type(layer).__mro__:
        kind = _KINDS_OF_LAYERS.get(cls.__name__)
        if kind == "compute":
            break
        if kind is not None:
            return _FLOAT32_VARIABLES if cls.__name__ in _FLOAT32_INSIDE else _FLOAT32
    if _activation_kind(layer) is not None or getattr(layer, "activity_regularizer", None) is not None:
        return _FLOAT32
    if type(layer).__name__ == "Dot" and getattr(layer, "normalize", False):
        return _FLOAT32
    return _FLOAT32_VARIABLES if has_penalty(layer) or _is_factored(layer) else {}


def is_loaded_with_one_policy(layer: Any) -> bool:
    """Return whether Keras makes the layers inside this one anew when it is loaded, of the policy of this alone."""
    return _ONE_POLICY & {cls.__name__ for cls in type(layer).__mro__} != set()


def has_penalty(layer: Any) -> bool:
    """Return whether a layer has a penalty on its variables, a sum that Keras takes in their dtype."""
    return any(name.endswith("_regularizer") and value is not None for name, value in vars(layer).items())


def _is_factored(layer: Any) -> bool:
    """Return whether a layer's variables start from a factorization, which has no 16-bit kernels."""
    starts = [value for name, value in vars(layer).items() if name.endswith("_initializer")]
    return any(type(value).__name__.startswith("Orthogonal") for value in starts)


def _activation_kind(layer: Any) -> Kind | None:
    """Return the kind of the activation that a layer ends in; None if 16 bits are safe in it."""
    activation = getattr(layer, "activation", None)
    return _KINDS_OF_ACTIVATIONS.get(getattr(activation, "__name__", ""))
