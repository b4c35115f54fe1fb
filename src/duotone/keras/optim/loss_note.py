"""Whether the losses of a step were finite: noted where they are scaled, taken where their gradients are applied.

An Inf or a NaN in the loss itself says nothing about the scale, so the step must know. On torch and TensorFlow the
loss is at hand. On JAX `scale_loss` runs inside of a function that is being differentiated, where the loss is a tracer;
what it is outside, a rule of `jax.custom_jvp` sees. A note counts only where the gradients are part of the same
program: a loss that has a program of its own, by `jax.checkpoint` around all of it, in a `scan` or another
`tf.function`, is taken for finite.
"""

import threading
from typing import Any

import keras

from duotone.keras import internals
from duotone.keras.internals import ops


class LossNote:
    """Remembers whether losses were finite, for each thread: TensorFlow runs its replicas in one each.

    >>> LossNote().take(keras.ops.ones(())) is None
    True
    """

    def __init__(self) -> None:
        self.noted: dict[int, Any] = {}

    def watched(self, loss: Any) -> Any:
        """Return the loss; whether it is finite is noted now or, on JAX, when it is differentiated."""
        backend = keras.backend.backend()
        if backend == "jax":
            import jax

            @jax.custom_jvp
            def same(value: Any) -> Any:
                return value

            @same.defjvp
            def rule(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
                self._note(primals[0])
                return primals[0], tangents[0]

            return same(loss)
        self._note(loss.detach() if backend == "torch" else loss)
        return loss

    def take(self, like: Any) -> Any:
        """Return whether all losses since the last call were finite: bool, 0-d; None if that is not known here.

        Args:
            like: a tensor of the program that is to use it.
        """
        noted = self.noted.pop(threading.get_ident(), None)
        return noted if noted is not None and internals.is_same_program(noted, like) else None

    def _note(self, loss: Any) -> None:
        is_finite = ops.all(ops.isfinite(loss))
        before = self.noted.get(threading.get_ident())
        if before is not None and internals.is_same_program(before, is_finite):
            is_finite = ops.logical_and(before, is_finite)
        self.noted[threading.get_ident()] = is_finite
