"""One optimizer step in mixed precision: gradients -> one multiplier -> update -> report.

Every gradient is read once for its norm and its finiteness; unscaling and clipping are one number,
`grad_multiplier = min(1, clip_norm / grad_norm) / loss_scale`; the update takes it together with `found_inf`. With
Duotone's optimizers nothing waits for the device.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add, attrgetter, or_
from typing import Any, Protocol

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.master import needs_tail, rounding_of
from duotone.torch.optim import MasterOptimizer

_is_sparse = attrgetter("is_sparse")


@dataclass(frozen=True)
class StepReport:
    """What a step did. Device scalars: reading one as a Python number waits for the device.

    Attributes:
        skipped: bool, 0-d: a gradient was Inf or NaN, so an optimizer did not step.
        grad_norm: FP32, 0-d: the norm of the true gradient over all optimizers, before clipping; not finite if
            the step was skipped.
        loss_scale: FP32, 0-d: the scale that these gradients carried.
    """

    skipped: Tensor
    grad_norm: Tensor
    loss_scale: Tensor


class Scaler(Protocol):
    """What a step asks of a loss scaler."""

    def begin_step(self, device: torch.device) -> Tensor:
        """Return the scale that the gradients carry, FP32, 0-d."""
        ...

    def end_step(self, found_inf: Tensor) -> None:
        """Take note of whether the step overflowed."""
        ...


def step(
    *optimizers: torch.optim.Optimizer,
    scaler: Scaler,
    clip_norm: float | None = None,
    scheduler: Any = None,
) -> StepReport:
    """Unscale, clip and update, or skip; then let the loss scale react.

    Args:
        optimizers: one or more; each is clipped by its own norm and skips by its own gradients. Torch's own are
            taken too: a fused one skips on the device, any other makes the host wait.
        scaler: a `LossScaler`.
        clip_norm: the largest norm of the true gradient that an optimizer sees; None for no clipping.
        scheduler: a learning-rate scheduler to advance if the step was not skipped; on an accelerator this waits
            for the device.

    Returns:
        The report. Without a single gradient nothing is done at all, and its norm is 0.

    Raises:
        OptimizerError: no optimizer, a `clip_norm` that is not positive, or 16-bit weights in an optimizer that
            keeps no masters of them.
        LossScaleError: a scale is in use, and no loss was scaled.
    """
    if not optimizers:
        raise OptimizerError("step needs at least one optimizer")
    if clip_norm is not None and not clip_norm > 0.0:
        raise OptimizerError(f"clip_norm is {clip_norm}; it must be positive, or None for no clipping")
    gradients = {optimizer: _gradients(optimizer) for optimizer in optimizers}
    device = next((grads[0].device for grads in gradients.values() if grads), None)
    if device is None:
        zero = torch.zeros(())
        return StepReport(skipped=zero.bool(), grad_norm=zero, loss_scale=torch.ones(()))

    loss_scale = scaler.begin_step(device)
    inverse_scale = loss_scale.reciprocal()
    sums, flags = [], []
    for optimizer, grads in gradients.items():
        sum_of_squares, found_inf = kernels.grad_stats(grads, inverse_scale, _backend(optimizer, grads))
        multiplier = _grad_multiplier(sum_of_squares, inverse_scale, clip_norm)
        if isinstance(optimizer, MasterOptimizer):
            optimizer.step(grad_multiplier=multiplier, found_inf=found_inf)
        else:
            _step_torch_optimizer(optimizer, grads, multiplier, found_inf)
        sums.append(sum_of_squares)
        flags.append(found_inf)
    skipped = reduce(or_, flags)
    scaler.end_step(skipped)
    if scheduler is not None and not skipped:
        scheduler.step()
    return StepReport(skipped=skipped, grad_norm=reduce(add, sums).sqrt().float(), loss_scale=loss_scale)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    if not isinstance(optimizer, MasterOptimizer):
        _check_foreign(optimizer)
    params = (param for group in optimizer.param_groups for param in group["params"])
    grads = [grad for param in params if (grad := param.grad) is not None]
    if any(map(_is_sparse, grads)):
        raise OptimizerError("sparse gradients cannot be unscaled here; use Embedding(sparse=False)")
    return grads


def _backend(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> kernels.Backend:
    if isinstance(optimizer, MasterOptimizer):
        return optimizer.backend
    # torch's optimizers may have others, FP64 for instance
    is_read = all(grad.dtype in (torch.float32, *kernels.SPLIT_DTYPES) for grad in grads)
    return "auto" if is_read else "reference"


def _check_foreign(optimizer: torch.optim.Optimizer) -> None:
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if param.grad is None:
            continue
        if needs_tail(param) or rounding_of(param) == kernels.Rounding.STOCHASTIC:
            raise OptimizerError(
                f"torch's {type(optimizer).__name__} would lose small updates to weights in {param.dtype}: it keeps no "
                "FP32 masters and rounds to nearest; use duotone.torch.MasterWeights(optimizer), or AdamW, SGD or Lion "
                "from there, or duotone.torch.prepare(model, optimizer, policy)"
            )


def _grad_multiplier(sum_of_squares: Tensor, inverse_scale: Tensor, clip_norm: float | None) -> Tensor:
    if clip_norm is None:
        return inverse_scale
    norm = sum_of_squares.sqrt()
    if norm.device.type != "cpu":
        # a norm of 0 makes the quotient Inf, and the smaller is 1
        return norm.reciprocal_().mul_(clip_norm).clamp_(max=1.0).mul_(inverse_scale).float()
    # the same in Python's floats, which are FP64 too: one operation of torch takes longer than all of these
    norm = norm.item()
    clipped = min(1.0 / norm * clip_norm, 1.0) if norm != 0.0 else 1.0
    return torch.full((), clipped * inverse_scale.item(), dtype=torch.float32, device="cpu")


def _step_torch_optimizer(
    optimizer: torch.optim.Optimizer, grads: list[Tensor], multiplier: Tensor, found_inf: Tensor
) -> None:
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's fused kernels divide by grad_scale and leave everything alone if found_inf is 1
        optimizer.grad_scale = multiplier.reciprocal()  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not found_inf:
        for grad in grads:
            grad.mul_(multiplier)
        optimizer.step()
