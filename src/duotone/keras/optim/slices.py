"""Gradients as rows of a table and their numbers, as TensorFlow has those of embeddings (`tf.IndexedSlices`)."""

import sys
from collections.abc import Callable
from typing import Any


def is_slices(gradient: Any) -> bool:
    """Return whether a gradient is rows of a table and their numbers, as TensorFlow has those of embeddings."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(gradient, tensorflow.IndexedSlices)


def on_values(function: Callable[[Any], Any], gradient: Any) -> Any:
    """Return the gradient with a function applied to its numbers.

    >>> on_values(lambda values: 2 * values, 1.5)
    3.0
    """
    if not is_slices(gradient):
        return function(gradient)
    return type(gradient)(function(gradient.values), gradient.indices, gradient.dense_shape)


def distinct_values(gradient: Any) -> Any:
    """Return the numbers of a gradient, those of a row that comes several times added, and zeros for those left over.

    Shapes do not depend on the rows, so XLA compiles it.
    """
    if not is_slices(gradient):
        return gradient
    import tensorflow as tf

    order = tf.argsort(gradient.indices)
    rows = tf.gather(gradient.indices, order)
    is_new = tf.cast(rows[1:] != rows[:-1], tf.int32)
    place = tf.concat([tf.zeros_like(rows[:1], tf.int32), tf.cumsum(is_new)], 0)
    return tf.math.unsorted_segment_sum(tf.gather(gradient.values, order), place, tf.shape(rows)[0])
