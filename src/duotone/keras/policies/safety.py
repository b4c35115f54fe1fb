"""Which layers of Keras 16 bits are not safe in, by the families of `duotone.operations`, and what they get instead.

    norms, penalties on variables   16 bits in and out, as Keras computes them in FP32 inside; FP32 variables
    other families                  the layer computes in FP32, from FP32 variables

A layer is known by its class and its bases, by the activation that it ends in, by penalties, which are sums, and by
orthogonal initializers, which are factorizations. That Keras' norms compute in FP32 inside, and its softmax, means of
windows and unit norms do not, is measured (`tests/keras/policies/test_safety.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from duotone.operations import FAMILIES

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
_FAMILIES_OF_LAYERS = {name: family for family, names in _LAYERS.items() for name in names.split()}
_FAMILIES_OF_ACTIVATIONS = {name: family for family, names in _ACTIVATIONS.items() for name in names.split()}
# their softmax stands between two products, and its rounding to 16 bits is lost in theirs
_ATTENTION = frozenset({"MultiHeadAttention", "GroupedQueryAttention"})
_ONE_POLICY = _ATTENTION | {"LSTM", "GRU", "SimpleRNN", "ConvLSTM"}


def family_of(layer: Any, around: Sequence[str] = ()) -> str | None:
    """Return the family of `duotone.operations` for which 16 bits are not safe in a layer; None if they are.

    Args:
        layer: of Keras.
        around: the names of the classes of the layer that it is in.

    >>> import keras
    >>> family_of(keras.layers.Dense(4, activation="sigmoid")), family_of(keras.layers.Dense(4, activation="relu"))
    ('loss_of_probabilities', None)
    """
    if not _ATTENTION.isdisjoint(around):
        return None
    # a recurrent layer makes its cell of its own dtype when it is loaded
    layer = getattr(layer, "cell", layer)
    for cls in type(layer).__mro__:
        if cls.__name__ in _FAMILIES_OF_LAYERS:
            family = _FAMILIES_OF_LAYERS[cls.__name__]
            return None if FAMILIES[family].kind == "compute" else family
    activation = getattr(getattr(layer, "activation", None), "__name__", "")
    if activation in _FAMILIES_OF_ACTIVATIONS:
        return _FAMILIES_OF_ACTIVATIONS[activation]
    if getattr(layer, "activity_regularizer", None) is not None:
        return "loss"
    if type(layer).__name__ == "Dot" and getattr(layer, "normalize", False):
        return "vector_norm"
    return _family_of_variables(layer)


def safe_roles(layer: Any, around: Sequence[str] = ()) -> dict[str, str]:
    """Return the roles that a layer needs where a policy has 16 bits and no rule says otherwise.

    >>> import keras
    >>> safe_roles(keras.layers.Softmax()), safe_roles(keras.layers.LayerNormalization())
    ({'param': 'float32', 'compute': 'float32'}, {'param': 'float32'})
    """
    family = family_of(layer, around)
    if family is None:
        return {}
    layer = getattr(layer, "cell", layer)
    is_of_variables = family == "normalization" or family == _family_of_variables(layer)
    return {"param": "float32"} if is_of_variables else {"param": "float32", "compute": "float32"}


def is_loaded_with_one_policy(layer: Any) -> bool:
    """Return whether Keras makes the layers inside this one anew when it is loaded, of the policy of this alone."""
    return not _ONE_POLICY.isdisjoint(cls.__name__ for cls in type(layer).__mro__)


def _family_of_variables(layer: Any) -> str | None:
    """Return the family for which a layer's variables alone need FP32: penalties on them, or how they start."""
    own = vars(layer)
    if any(name.endswith("_regularizer") and own[name] is not None for name in own if not name.startswith("activity")):
        return "loss"
    # QR has no 16-bit kernels
    starts = [type(value).__name__ for name, value in own.items() if name.endswith("_initializer")]
    return "factorization" if any(start.startswith("Orthogonal") for start in starts) else None
