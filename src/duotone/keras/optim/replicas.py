"""One decision of all replicas of a `tf.distribute` strategy, by the sum of their gradients.

Keras' optimizers add the gradients of the replicas while they update, behind clipping. Its own loss scaling looks at
those of the first replica alone, before the sum, so an overflow on another one goes into the weights. Here they are
added first: all replicas see whether the sum is finite, and its norm. The inner optimizer is given the sum on the first
replica and zeros on the others, of which it makes the same sum; so it clips by the norm of the whole gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras

from duotone.keras import internals
from duotone.keras.internals import ops
from duotone.keras.optim.gradients import Gradients, is_overwritten, measured
from duotone.keras.optim.scaled_step import finish, update_or_skip
from duotone.keras.optim.slices import on_values


def in_replicas() -> bool:
    """Return whether this is one of several replicas of a TensorFlow strategy.

    >>> in_replicas()
    False
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync > 1 and tf.distribute.in_cross_replica_context() is False


def step_on_replicas(optimizer: Any, true: list[Any], variables: Sequence[Any], loss_is_finite: Any) -> None:
    """Update, or skip, on all replicas."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    whole, is_finite = _summed(context, true, variables, loss_is_finite)
    is_first = tf.equal(context.replica_id_in_sync_group, 0)
    mine = replace(
        whole,
        true=[
            gradient
            if gradient is None or is_overwritten(variable)
            else on_values(lambda values: tf.where(is_first, values, tf.zeros_like(values)), gradient)
            for gradient, variable in zip(whole.true, variables, strict=True)
        ],
    )
    if internals.updates_in_replicas():
        finish(optimizer, mine, variables, is_finite, update_or_skip(optimizer, mine, variables))
    else:
        context.merge_call(
            _step_across(optimizer, variables), args=(mine.true, mine.non_finite, mine.grad_norm, is_finite)
        )


def _summed(context: Any, true: list[Any], variables: Sequence[Any], loss_is_finite: Any) -> tuple[Gradients, Any]:
    """Return the gradients of all replicas, and whether all their losses are finite, by one collective.

    A variable that takes its gradient as it is keeps its own, and is not finite if that of any replica is not.
    """
    import tensorflow as tf

    taken = [
        gradient is not None and is_overwritten(variable) for gradient, variable in zip(true, variables, strict=True)
    ]
    flags = [
        tf.constant(1.0) if loss_is_finite is None else tf.cast(loss_is_finite, tf.float32),
        *(
            tf.cast(tf.reduce_all(tf.math.is_finite(true[i])), tf.float32)
            for i, is_taken in enumerate(taken)
            if is_taken
        ),
    ]
    summed = [i for i, gradient in enumerate(true) if gradient is not None and not taken[i]]
    *sums, counts = context.all_reduce(tf.distribute.ReduceOp.SUM, [*(true[i] for i in summed), tf.stack(flags)])
    whole = list(true)
    for i, total in zip(summed, sums, strict=True):
        whole[i] = total
    is_finite_on_all = tf.equal(counts, float(context.num_replicas_in_sync))
    gradients = measured(whole, variables)
    if any(taken):
        places = iter(range(1, len(flags)))
        own = tf.unstack(gradients.non_finite)
        own = [~is_finite_on_all[next(places)] if is_taken else flag for flag, is_taken in zip(own, taken, strict=True)]
        gradients = replace(gradients, non_finite=tf.stack(own))
    return gradients, None if loss_is_finite is None else is_finite_on_all[0]


def _step_across(optimizer: Any, variables: Sequence[Any]) -> Callable[..., None]:
    """Return the rest of a step, outside of the replicas: no conditional may be around a merge of them."""

    def step(strategy: Any, true: Any, non_finite: Any, grad_norm: Any, is_finite: Any) -> None:
        def first(value: Any) -> Any:
            return None if value is None else strategy.experimental_local_results(value)[0]

        def update() -> None:
            strategy.extended.call_for_each_replica(
                lambda gradients: optimizer.inner_optimizer.apply(gradients, variables), args=(true,)
            )

        gradients = Gradients([], first(non_finite), first(grad_norm))
        finish(
            optimizer,
            gradients,
            variables,
            first(is_finite),
            lambda overflow: ops.cond(overflow, lambda: None, update),
        )

    return step
