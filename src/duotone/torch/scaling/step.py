"""One optimizer step in mixed precision: gradients -> one multiplier -> update -> report.

Every gradient is read once for its norm and its finiteness; ranks agree on both in one collective; unscaling and
clipping are one number, `grad_multiplier = min(1, clip_norm / grad_norm) / loss_scale`; the update takes it together
with `found_inf`. With Duotone's optimizers nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add, attrgetter, or_
from typing import Any, Protocol

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.optim import MasterOptimizer
from duotone.torch.parameters.masters import check_in_place, needs_tail
from duotone.torch.parameters.storage import storage_of
from duotone.torch.scaling.watch import places_of

_grad_of = attrgetter("grad")
_device_of_grad = attrgetter("device")
_is_sparse = attrgetter("is_sparse")
_is_cpu = attrgetter("is_cpu")


@dataclass(frozen=True)
class StepReport:
    """What a step did. Device scalars: reading one as a Python number waits for the device.

    Attributes:
        skipped: bool, 0-d: a gradient was Inf or NaN, so an optimizer did not step.
        grad_norm: FP32, 0-d: the norm of the true gradient over all optimizers and ranks, before clipping; not finite
            if the step was skipped.
        loss_scale: FP32, 0-d: the scale that the losses were multiplied by.
        skipped_each: bool, 0-d, for each optimizer: whether that one did not step.
    """

    skipped: Tensor
    grad_norm: Tensor
    loss_scale: Tensor
    skipped_each: tuple[Tensor, ...] = ()


class Scaler(Protocol):
    """What a step asks of a loss scaler."""

    @property
    def process_group(self) -> Any:
        """The ranks that are to agree, if the parameters do not tell."""
        ...

    def begin_step(
        self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device, agreement: Agreement
    ) -> Tensor:
        """Return the scale that the gradients carry, FP32, 0-d."""
        ...

    def found_inf_before(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Return what was found when gradients were unscaled ahead of the step; None if they were not."""
        ...

    def loss_is_not_finite(self, device: torch.device) -> Tensor:
        """Return whether one of the losses since the last step was Inf or NaN: bool, 0-d."""
        ...

    def no_step(self, agreement: Agreement) -> Tensor:
        """Take note that there was no gradient; return the scale that it would have carried, FP32, 0-d."""
        ...

    def end_step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        agreement: Agreement,
        found_inf: Sequence[Tensor],
        loss_is_not_finite: Tensor | None,
        scheduler: Any,
    ) -> None:
        """Take note of which optimizers found an Inf or a NaN, and of the schedulers to advance."""
        ...


def step(
    *optimizers: torch.optim.Optimizer,
    scaler: Scaler,
    clip_norm: float | None = None,
    scheduler: Any = None,
    closure: Callable[[], Any] | None = None,
) -> StepReport:
    """Unscale, clip and update, or skip; then let the loss scale react.

    Args:
        optimizers: one or more; each is clipped by its own norm and skips by its own gradients. Torch's own are
            taken too: a fused one skips on the device, any other makes the host wait.
        scaler: a `LossScaler`.
        clip_norm: the largest norm of the true gradient that an optimizer sees; None for no clipping.
        scheduler: a learning-rate scheduler, or several, to advance if their optimizer did not skip. On an accelerator
            they learn of it when the next step begins, before it updates: every update has the right learning rate, and
            the device is not waited for. `scaler.settle()` has them learn it now.
        closure: computes the loss and gives it to `scaler.backward`; called once, before anything else, with gradients
            enabled.

    Returns:
        The report. Without a single gradient nothing is done at all, and its norm is 0; only an overflow that
        `unscale_` found before the gradients were let go counts as skipped, and moves the scale.

    Raises:
        OptimizerError: no optimizer, or one twice; a `clip_norm` that is not positive; a scheduler of another
            optimizer, or one that advances by a figure; an optimizer that needs to call a closure several times;
            16-bit weights in an optimizer that keeps no masters of them; a weight in two optimizers, one of which would
            unscale its gradient for both; or gradients on several devices.
        LossScaleError: a scale is in use, and no loss was scaled.
        LossScaleCollapse: step after step is skipped.
        NonFiniteLoss: step after step is skipped, and the loss itself is not finite.
    """
    _check(optimizers, clip_norm)
    places_of(scheduler, optimizers)
    if closure is not None:
        with torch.enable_grad():
            closure()
    found, agreement, device = find_gradients(optimizers, scaler.process_group)
    gradients = [grads for _, grads in found]
    before = [scaler.found_inf_before(optimizer) for optimizer in optimizers]
    if device is None:
        for param in _all_parameters(optimizers):
            check_in_place(param)
        zero = torch.zeros(())
        each = tuple(zero.bool() if found is None else found for found in before)
        return StepReport(reduce(or_, each), zero, scaler.no_step(agreement), each)

    _check_shared(optimizers, gradients, before)
    loss_scale = scaler.begin_step(optimizers, device, agreement)
    inverse_scale = loss_scale.reciprocal()
    # gradients that were unscaled ahead of the step carry no scale any more
    inverse_scales = [inverse_scale if found is None else torch.ones_like(inverse_scale) for found in before]

    def read(number: int, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        return read_gradients(optimizers[number], grads, inverse_scales[number])

    # alone, a rank need not tell itself
    told = [scaler.loss_is_not_finite(device)] if agreement.is_needed else []
    stats, heard = agreement.stats(gradients, read, *told)
    flags = []
    for number, optimizer in enumerate(optimizers):
        found_inf, earlier = stats[number].found_inf, before[number]
        found_inf = found_inf if earlier is None else found_inf | earlier
        multiplier = _grad_multiplier(stats[number].sum_of_squares, inverse_scales[number], clip_norm)
        if isinstance(optimizer, MasterOptimizer):
            optimizer.step(grad_multiplier=multiplier, found_inf=found_inf)
        else:
            _step_torch_optimizer(optimizer, gradients[number], multiplier, found_inf)
        flags.append(found_inf)
    norm = reduce(add, [each.sum_of_squares for each in stats]).sqrt().float()
    scaler.end_step(optimizers, agreement, flags, heard[0] if heard else None, scheduler)
    return StepReport(reduce(or_, flags), norm, loss_scale, tuple(flags))


def find_gradients(
    optimizers: Sequence[torch.optim.Optimizer], process_group: Any
) -> tuple[list[tuple[list[Tensor], list[Tensor]]], Agreement, torch.device | None]:
    """Return what `parameters_with_gradient` does for each optimizer, the ranks that agree on it, and where they do.

    There is no device if no rank is known to have a gradient.

    Raises:
        OptimizerError: as there.
    """
    found = [parameters_with_gradient(optimizer) for optimizer in optimizers]
    params = list(chain.from_iterable(params for params, _ in found)) or _all_parameters(optimizers)
    agreement = Agreement(params, process_group)
    return found, agreement, _device_of([grads for _, grads in found], params, agreement)


def read_gradients(
    optimizer: torch.optim.Optimizer, grads: list[Tensor], inverse_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of an optimizer's true gradient, FP64, and whether an Inf or a NaN is in it, bool.

    Raises:
        OptimizerError: a gradient is on another device than `inverse_scale`.
    """
    # asking a tensor whether it is on a CPU is the quickest
    if not (inverse_scale.is_cpu and all(map(_is_cpu, grads))):
        _check_one_device(grads, inverse_scale.device)
    if not isinstance(optimizer, MasterOptimizer):
        grads = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    return kernels.grad_stats(grads, inverse_scale, _backend(optimizer, grads))


def _check_one_device(grads: list[Tensor], device: torch.device) -> None:
    elsewhere = {str(other) for other in map(_device_of_grad, grads) if other != device}
    if elsewhere:
        # kernels would take addresses there for addresses here
        raise OptimizerError(
            f"gradients lie on {device} and on {', '.join(sorted(elsewhere))}, but one step reads those of one device; "
            "duotone.torch.GradScaler takes several"
        )


def parameters_with_gradient(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of an optimizer that have a gradient, and the gradients.

    Raises:
        OptimizerError: a gradient is sparse, or 16-bit weights lie in an optimizer that keeps no masters of them.
    """
    every = [param for group in optimizer.param_groups for param in group["params"]]
    of_every = list(map(_grad_of, every))
    params = [param for param, grad in zip(every, of_every, strict=True) if grad is not None]
    grads = [grad for grad in of_every if grad is not None]
    if not isinstance(optimizer, MasterOptimizer):
        _check_foreign(optimizer, params)
    if any(map(_is_sparse, grads)):
        raise OptimizerError("sparse gradients cannot be unscaled here; use Embedding(sparse=False)")
    return params, grads


def _check(optimizers: Sequence[torch.optim.Optimizer], clip_norm: float | None) -> None:
    if not optimizers:
        raise OptimizerError("step needs at least one optimizer")
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise OptimizerError(
                f"step takes optimizers, but one is a {type(optimizer).__name__}; give a closure as closure=..., a "
                "scheduler as scheduler=..., and several optimizers one after the other"
            )
    if len(set(map(id, optimizers))) < len(optimizers):
        raise OptimizerError("an optimizer was given twice; give each once, and all of them to one call")
    if clip_norm is not None and not clip_norm > 0.0:
        raise OptimizerError(f"clip_norm is {clip_norm}; it must be positive, or None for no clipping")
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "LBFGS evaluates the loss several times while it moves the weights, so a step of it can be neither "
                "unscaled nor skipped as a whole; call its step(closure) without a scaler, in policy fp32 or bf16-mixed"
            )


def _check_shared(
    optimizers: Sequence[torch.optim.Optimizer], gradients: Sequence[Sequence[Tensor]], before: Sequence[Tensor | None]
) -> None:
    if len(optimizers) == 1:
        return
    seen: set[int] = set()
    twice: set[int] = set()
    changed: set[int] = set()
    for optimizer, grads, found_inf in zip(optimizers, gradients, before, strict=True):
        own = set(map(id, grads))
        twice |= own & seen
        seen |= own
        if found_inf is not None or not isinstance(optimizer, MasterOptimizer):
            changed |= own
    for grad in chain.from_iterable(gradients):
        if id(grad) in twice & changed:
            raise OptimizerError(
                f"a weight of shape {tuple(grad.shape)} is in two of these optimizers, and the scale would be taken "
                "out of its gradient twice; put it into one, or use AdamW, SGD or Lion of duotone.torch, without "
                "unscale_"
            )


def _all_parameters(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    return [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]


def _device_of(
    gradients: Sequence[Sequence[Tensor]], params: Sequence[Tensor], agreement: Agreement
) -> torch.device | None:
    for grads in gradients:
        if grads:
            return grads[0].device
    # a rank without gradients has to hear of the others' all the same
    return params[0].device if params and agreement.is_needed else None


def _backend(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> kernels.Backend:
    if isinstance(optimizer, MasterOptimizer):
        return optimizer.backend
    # torch's optimizers may have others, FP64 for instance
    is_read = all(grad.dtype in (torch.float32, *kernels.SPLIT_DTYPES) for grad in grads)
    return "auto" if is_read else "reference"


def _check_foreign(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    for param in params:
        if needs_tail(param) or storage_of(param).rounding == kernels.Rounding.STOCHASTIC:
            inner = getattr(optimizer, "optimizer", None)
            if isinstance(inner, MasterOptimizer):
                raise OptimizerError(
                    f"a {type(optimizer).__name__} hides the {type(inner).__name__} in it, which can take the scale "
                    "out and be skipped; give that one to the step"
                )
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
    optimizer: torch.optim.Optimizer, grads: Sequence[Tensor], multiplier: Tensor, found_inf: Tensor
) -> None:
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        if lacks_momentum(optimizer) and found_inf:
            # its kernel would skip, and leave momentum that nobody has written
            return
        # torch's fused kernels divide by grad_scale and leave everything alone if found_inf is 1
        optimizer.grad_scale = multiplier.reciprocal()  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not found_inf:
        _check_precise(optimizer, grads, multiplier)
        for grad in grads:
            grad.mul_(multiplier)
        optimizer.step()


def _check_precise(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor], multiplier: Tensor) -> None:
    if any(grad.dtype == torch.float16 for grad in grads) and multiplier != 1.0:
        raise OptimizerError(
            f"true gradients underflow in FP16, and this {type(optimizer).__name__} takes no others for FP16 weights; "
            "use duotone.torch.MasterWeights(optimizer), or AdamW, SGD or Lion from there"
        )


def lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether torch's SGD has still to make a momentum, which its fused kernel leaves unwritten if it skips."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"] != 0
        for param in group["params"]
        if param.grad is not None
    )
