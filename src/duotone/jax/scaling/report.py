"""What the last step did, in device scalars."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from duotone.jax.optim.state import state_in
from duotone.jax.scaling.reading import array, loss_scale_of


@dataclass(frozen=True)
class StepReport:
    """What the last step did. Device scalars: reading one as a Python number waits for the device, and so does `print`.

    A pytree: inside of `jit` it can be returned, and `scan` stacks those of its steps.

    Attributes:
        skipped: bool, 0-d: a gradient was Inf or NaN, so nothing was updated.
        grad_norm: float32, 0-d: the norm of the true gradient, before clipping; not finite if the step was skipped.
        loss_scale: float32, 0-d: the scale that the loss was multiplied by; before the first step, that it will be.
        skipped_in_a_row: int32, 0-d: steps skipped since the last one that was not.
        skipped_in_all: int32, 0-d: steps skipped since the start.
        exact_starts: int32, 0-d: how many parameters were 16-bit already when the optimizer's state was made: what 16
            bits lack of their FP32 values was lost before. 0 where `init` was given FP32 parameters.
        infinite_weights: int32, 0-d: how many parameters held an Inf when the step began, for the step before had moved
            a master beyond FP16's largest number, 65504. `raise_if_collapsed` names them.
    """

    skipped: jax.Array
    grad_norm: jax.Array
    loss_scale: jax.Array
    skipped_in_a_row: jax.Array
    skipped_in_all: jax.Array
    exact_starts: jax.Array
    infinite_weights: jax.Array

    def __repr__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        # traced, stacked, or shapes alone: as any dataclass
        if all(
            isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and not leaf.ndim for leaf in shown.values()
        ):
            shown = {name: f"{leaf.item():.6g}" if leaf.dtype != bool else leaf for name, leaf in shown.items()}
        return f"StepReport({', '.join(f'{name}={leaf}' for name, leaf in shown.items())})"


jax.tree_util.register_dataclass(StepReport, [field.name for field in fields(StepReport)], [])


def report(state: Any) -> StepReport:
    """Return what the last step did, from the optimizer's state; nothing waits for the device.

    Args:
        state: of `duotone.jax.masters`, or anything that holds it, such as a chain's, a TrainState, an `nnx.Optimizer`.

    Raises:
        OptimizerError: there is no such state in it, or there are several.

    >>> import optax
    >>> import duotone.jax as dj
    >>> state = dj.masters(optax.sgd(0.1), "fp16").init({"w": jax.numpy.ones(2)})
    >>> print(dj.report(state))
    StepReport(skipped=False, grad_norm=0, loss_scale=65536, skipped_in_a_row=0, skipped_in_all=0, exact_starts=0,
    infinite_weights=0)
    >>> dj.report(state).loss_scale
    Array(65536., dtype=float32)
    """
    found = state_in(state)
    counts = loss_scale_of(found)
    return StepReport(
        skipped=array(found.found_inf),
        grad_norm=array(found.grad_norm),
        loss_scale=array(found.last_scale),
        skipped_in_a_row=counts.skipped_in_a_row,
        skipped_in_all=counts.skipped,
        exact_starts=array(found.exact_starts),
        infinite_weights=array(found.infinite).sum(axis=-1, dtype=jnp.int32),
    )
