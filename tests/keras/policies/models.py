"""Small models that tests of policies make, and what their layers ended with."""

from typing import Any

import keras
import numpy as np
from keras import layers

INPUTS = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)


def sequential() -> keras.Sequential:
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="head"),
            layers.Softmax(name="probabilities"),
        ],
        name="net",
    )


def functional() -> keras.Model:
    inputs = keras.Input((4,))
    left = layers.Dense(8, activation="relu", name="left")(inputs)
    right = layers.Dense(8, name="right")(inputs)
    both = layers.Add(name="both")([left, right])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.LayerNormalization(name="norm")(both)), name="net")


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """Layers made in a constructor, before a path is known."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = layers.LayerNormalization(name="norm")
        self.dense = layers.Dense(4, name="dense")

    def call(self, inputs: Any) -> Any:
        # TensorFlow adds no two dtypes by itself
        return keras.ops.add(inputs, self.dense(self.norm(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Net(keras.Model):
    """A model whose layers are built when it is first called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(name="net", **options)
        self.blocks = [Block(name=f"block{number}") for number in range(2)]
        self.head = layers.Dense(3, name="head")

    def call(self, inputs: Any) -> Any:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


def attention() -> keras.Model:
    inputs = keras.Input((5, 4))
    attended = layers.MultiHeadAttention(2, 2, dropout=0.1, name="attention")(inputs, inputs)
    read = layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both_ways")(attended)
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid", name="head")(read), name="net")


def layers_inside(model: keras.Model) -> list[Any]:
    """Return a model's layers at any depth, without its inputs."""
    return [layer for layer in model._flatten_layers(include_self=False) if not isinstance(layer, layers.InputLayer)]


def names(model: keras.Model) -> dict[str, str]:
    """Return the name of each layer's dtype policy, by its path inside the model."""
    return {(layer.path or layer.name).removeprefix("net/"): layer.dtype_policy.name for layer in layers_inside(model)}


def is_plain(model: keras.Model) -> bool:
    """Return whether every layer is left with a policy of Keras' own."""
    kinds = (keras.DTypePolicy, keras.dtype_policies.DTypePolicyMap)
    return all(type(layer.dtype_policy) in kinds for layer in layers_inside(model))
