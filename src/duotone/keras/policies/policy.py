"""`dk.policy`: from text to the dtype policies of a model's layers, and back."""

import keras

from duotone.keras.policies.model_policy import ModelPolicy
from duotone.keras.policies.readback import policy_of
from duotone.policy import Policy


def policy(text: str | Policy | keras.DTypePolicy | keras.Model) -> ModelPolicy:
    """Return the dtype policy of Keras' that gives each layer what a policy of Duotone's says.

    It is a context manager, so `with dk.policy("fp16"): model = build()` makes a model; and it is a
    `keras.DTypePolicy`, so `keras.config.set_dtype_policy(dk.policy("fp16"))` makes it the global one, and
    `dtype=dk.policy("fp16")` one layer's.

    Layers that 16 bits are not safe in are FP32 unless a rule says otherwise: softmax, sigmoid and exponentials that a
    layer ends in, unit norms, means of windows, embeddings, penalties, spectrograms; norms have FP32 variables. A layer
    that is given a `dtype` keeps it. `dk.policy(text).apply(model)` changes what a built model computes in.

    Args:
        text: a policy, its text or Keras' name for it; or a built model, whose policy is then returned. Patterns of
            rules are layers' paths, with dots or slashes and with or without the model's name, or `type=` and a
            class's name.

    Raises:
        PolicyError: the policy is impossible, or Keras cannot have it.

    >>> import keras
    >>> with policy("fp16; head: float32"):
    ...     model = keras.Sequential(
    ...         [
    ...             keras.Input((4,)),
    ...             keras.layers.Dense(8),
    ...             keras.layers.BatchNormalization(),
    ...             keras.layers.Dense(2, name="head"),
    ...         ]
    ...     )
    >>> [layer.dtype_policy.name for layer in model.layers]
    ['float16', 'mixed_float16', 'float32']
    """
    if isinstance(text, keras.Model):
        return policy_of(text)
    if isinstance(text, ModelPolicy):
        return text
    return ModelPolicy(text.name if isinstance(text, keras.DTypePolicy) else text)
