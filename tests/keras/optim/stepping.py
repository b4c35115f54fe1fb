"""Ways to run one step of an optimizer: eagerly, in a program of the backend, and compiled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

BACKEND = keras.backend.backend()
WAYS = {"tensorflow": ["eager", "traced", "compiled"], "jax": ["eager", "compiled"], "torch": ["eager", "stateless"]}[
    BACKEND
]

Step = Callable[[Sequence[Any]], None]


def step_of(optimizer: Any, variables: Sequence[Any], way: str) -> Step:
    """Return a function of gradients, as NumPy arrays or tensors, that runs one step; built where that is needed."""
    if way == "eager":
        return lambda grads: optimizer.apply(tensors(grads), variables)
    if not optimizer.built:
        optimizer.build(variables)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        traced = tf.function(lambda grads: optimizer.apply(grads, variables), jit_compile=way == "compiled")
        return lambda grads: traced(tensors(grads))

    def stateless(optimizer_values: Any, grads: Any, values: Any) -> Any:
        return optimizer.stateless_apply(optimizer_values, grads, values)

    if BACKEND == "jax":
        import jax

        stateless = jax.jit(stateless)

    def step(grads: Sequence[Any]) -> None:
        held = [*optimizer.variables, *variables]
        values = [variable.value for variable in held]
        count = len(optimizer.variables)
        new_values, new_state = stateless(values[:count], tensors(grads), values[count:])
        for variable, value in zip(held, [*new_state, *new_values], strict=True):
            variable.assign(value)

    return step


def tensors(grads: Sequence[Any]) -> list[Any]:
    """Return gradients as tensors of the backend."""
    return [grad if grad is None else ops.convert_to_tensor(grad) for grad in grads]


def state_of(optimizer: Any) -> list[Any]:
    """Return copies of all that an optimizer keeps, in NumPy."""
    return [ops.convert_to_numpy(variable).copy() for variable in optimizer.variables]


@functools.cache
def two_replicas() -> Any:
    """Return TensorFlow's strategy for two CPUs, the same one for all tests of a process: it numbers collectives."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
