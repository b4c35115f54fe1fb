"""The two sides of benchmarks/keras_scenarios.py: Keras as it is, and with Duotone.

They differ in what a user would write differently: how a policy is set, what is around the optimizer, and which
callbacks `fit` has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

import duotone.keras as dk

# Keras' policies in Duotone's words
POLICIES = {"mixed_float16": "fp16-mixed", "bfloat16": "bf16", "float32": "fp32"}


class Keras:
    """Keras' own mixed precision, used as its guide has it."""

    name = "Keras"

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        """Have layers that are built in the block follow a policy, by Keras' name for it."""
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(name)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(before)

    def with_rule(self, name: str, rule: str) -> tuple[str, ...]:
        """Return the policy with a rule for some layers: Keras has rules for layers that have paths already."""
        return ()

    def scaled(self, inner: Any, growth_interval: int = 2000) -> Any:
        """Return an optimizer under a dynamic loss scale."""
        return keras.optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=growth_interval)

    def compiled(self, inner: Any) -> Any:
        """Return what `compile` is given for a model in FP16: Keras puts a loss scale around it by itself."""
        return inner

    def of_16_bit_weights(self, inner: Any) -> Any:
        """Return an optimizer for a model whose weights are in 16 bits."""
        return inner

    def callbacks(self) -> list[Any]:
        """Return what `fit` is given to see loss scaling by: there is nothing."""
        return []


class Duotone(Keras):
    """The same with Duotone: another policy, optimizer and callback, and nothing else."""

    name = "Duotone"

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        with dk.policy(POLICIES.get(name, name)):
            yield

    def with_rule(self, name: str, rule: str) -> tuple[str, ...]:
        return (f"{POLICIES[name]}; {rule}",)

    def scaled(self, inner: Any, growth_interval: int = 2000) -> Any:
        return dk.LossScaleOptimizer(inner, dk.LossScale(growth_interval=growth_interval))

    def compiled(self, inner: Any) -> Any:
        return self.scaled(inner)

    def of_16_bit_weights(self, inner: Any) -> Any:
        return dk.Masters(inner)

    def callbacks(self) -> list[Any]:
        return [dk.ScaleReport()]
