"""Replicas of a TensorFlow strategy take one decision, by the sum of their gradients."""

from typing import Any

import keras
import numpy as np
import pytest

import duotone.keras as dk

from .stepping import state_of, two_replicas
from .test_scaled_fit import X, fit, model_of

pytestmark = pytest.mark.backends("tensorflow")


@pytest.fixture
def strategy() -> Any:
    return two_replicas()


def test_two_replicas_train_as_one_and_clip_by_the_norm_of_the_sum(strategy: Any) -> None:
    def optimizer() -> dk.LossScaleOptimizer:
        return dk.LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=0.05))

    alone = model_of(optimizer(), "float32", jit_compile=False)
    with strategy.scope():
        shared = model_of(optimizer(), "float32", jit_compile=False)
    for model in (alone, shared):
        fit(model)
    np.testing.assert_allclose(shared.optimizer.report().grad_norm, alone.optimizer.report().grad_norm, rtol=1e-5)
    for one, other in zip(shared.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_an_overflow_of_the_second_replica_skips_the_step_on_both(strategy: Any) -> None:
    bad = X.copy()
    # the second half of the second batch
    bad[12:16] *= 1e5
    with strategy.scope():
        model = model_of(dk.LossScaleOptimizer("adam"), jit_compile=False)
    fit(model, bad)
    report = model.optimizer.report()
    assert (report.skipped, report.loss_scale, model.optimizer.iterations.numpy()) == (1, 2.0**16, 3)
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


@pytest.mark.parametrize("traced", [True, False])
def test_only_the_sum_overflows(strategy: Any, traced: bool) -> None:
    import tensorflow as tf

    with strategy.scope():
        variables = [keras.Variable([1.0, 2.0], name="a"), keras.Variable([3.0], name="amax")]
        variables[1].overwrite_with_gradient = True
        optimizer = dk.LossScaleOptimizer(keras.optimizers.SGD(1.0), dk.LossScale.static(1))
        optimizer.build(variables)

    def step(grads: Any) -> None:
        optimizer.scale_loss(tf.constant(1.0))
        optimizer.apply(list(grads), variables)

    def of_replicas(grad: list[float], size: int) -> Any:
        values = [tf.constant([each] * size) for each in grad]
        return strategy.experimental_distribute_values_from_function(
            lambda context: values[context.replica_id_in_sync_group]
        )

    def on_both(grads: Any) -> None:
        strategy.run(step, args=(grads,))

    run = tf.function(on_both) if traced else on_both
    before = [value for variable in variables for value in variable.value.values]
    before = [value.numpy() for value in before]
    for grads in ([[3e38, 3e38], [5.0, 5.0]], [[0.5, np.inf], [5.0, 5.0]], [[0.5, 0.5], [5.0, np.nan]]):
        run((of_replicas(grads[0], 2), of_replicas(grads[1], 1)))
        after = [value.numpy() for variable in variables for value in variable.value.values]
        assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert (optimizer.report().skipped, optimizer.non_finite()) == (3, [variables[1].path])
    run((of_replicas([0.25, 0.5], 2), of_replicas([7.0, 7.0], 1)))
    for replica in range(2):
        np.testing.assert_array_equal(variables[0].value.values[replica].numpy(), [0.25, 1.25])
    assert variables[1].numpy()[0] == 7.0
    assert optimizer.report().grad_norm == np.float32(1.125**0.5)
    assert len(state_of(optimizer)) == len(optimizer.variables)
