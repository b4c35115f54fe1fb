"""One optimizer in a step: its gradients, what they are like on all ranks, and the update with them.

    grad_multiplier = min(1, clip_norm / grad_norm) / loss_scale

Unscaling and clipping are this one number. Duotone's optimizers take it together with `found_inf`, and torch's fused
ones take its reciprocal. For any other optimizer the host waits for `found_inf` and multiplies the gradients in place.
"""

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.optim import MasterOptimizer
from duotone.torch.optim.foreign import fused_step, hides_masters, skips_on_device
from duotone.torch.parameters.masters import needs_tail
from duotone.torch.parameters.storage import storage_of

_grad_of = attrgetter("grad")
_HOST = torch.device("cpu")
Scalar = float | Tensor


class OptimizerStep:
    """One optimizer in a step.

    Args:
        optimizer: any, but one that keeps no masters must have no weights that need them.
        found_inf_ahead: what `unscale_` found when it made the gradients true, bool, 0-d; None if they carry the scale.

    Attributes:
        optimizer: as above.
        found_inf_ahead: as above.
        params: its parameters that have a gradient.
        grads: their gradients.
        inverse_scale: what makes the gradients true, 1 if they are: a number on the host, else FP32, 0-d.
        sum_of_squares: of the true gradient on all ranks: a number on the host, else FP64, 0-d.
        skips: whether an Inf or a NaN is in them, or was when they were unscaled, on any rank: on the host a bool, else
            as below.
        found_inf: the same: bool, 0-d.

    Raises:
        OptimizerError: a gradient is sparse, or 16-bit weights lie in an optimizer that keeps no masters of them.
    """

    inverse_scale: Scalar
    sum_of_squares: Scalar
    skips: bool | Tensor
    found_inf: Tensor

    def __init__(self, optimizer: torch.optim.Optimizer, found_inf_ahead: Tensor | None = None) -> None:
        self.optimizer = optimizer
        self.found_inf_ahead = found_inf_ahead
        groups = optimizer.param_groups
        params = groups[0]["params"] if len(groups) == 1 else [param for group in groups for param in group["params"]]
        grads = list(map(_grad_of, params))
        present = [grad for grad in grads if grad is not None]
        if len(present) < len(grads):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        self.params: list[Tensor] = params
        self.grads = kernels.batch_of(present)
        if not isinstance(optimizer, MasterOptimizer):
            _check_keeps_updates(optimizer, self.params)
        if self.grads.kind.are_sparse:
            raise OptimizerError("sparse gradients cannot be unscaled here; use Embedding(sparse=False)")

    def stats_of(self, grads: Sequence[Tensor]) -> tuple[Scalar, bool | Tensor]:
        """Return the sum of squares of some of the gradients, true, and whether an Inf or a NaN is in them.

        They are numbers if `inverse_scale` is one, else 0-d, FP64 and bool.

        Args:
            grads: plain tensors.

        Raises:
            OptimizerError: a gradient is on another device than `inverse_scale`.
        """
        inverse_scale = self.inverse_scale
        batch = kernels.batch_of(grads)
        device = inverse_scale.device if isinstance(inverse_scale, Tensor) else _HOST
        if not batch.kind.devices <= {device}:
            raise _several_devices(batch.kind.devices, device)
        backend: kernels.Backend = "auto"
        if isinstance(self.optimizer, MasterOptimizer):
            backend = self.optimizer.backend
        else:
            # torch's optimizers may have others, FP64 for instance
            batch = kernels.batch_of([torch.view_as_real(grad) if grad.is_complex() else grad for grad in batch])
            if not all(grad.dtype in (torch.float32, *kernels.SPLIT_DTYPES) for grad in batch):
                backend = "reference"
        if isinstance(inverse_scale, Tensor):
            return kernels.grad_stats(batch, inverse_scale, backend)
        return kernels.grad_numbers(batch, inverse_scale, backend)

    def set_stats(self, sum_of_squares: Scalar, found_inf: bool | Tensor) -> None:
        """Set what all gradients are like, on all ranks."""
        self.sum_of_squares = sum_of_squares
        ahead = self.found_inf_ahead
        if isinstance(found_inf, Tensor):
            self.skips = self.found_inf = found_inf if ahead is None else found_inf | ahead
        else:
            self.skips = found_inf or (ahead is not None and bool(ahead))
            self.found_inf = torch.full((), self.skips, dtype=torch.bool, device=_HOST)

    def update(self, clip_norm: float | None) -> None:
        """Update the weights; `found_inf` leaves everything as it is.

        Raises:
            OptimizerError: an optimizer of FP16 weights takes only gradients that underflow in FP16.
        """
        multiplier = grad_multiplier(self.sum_of_squares, self.inverse_scale, clip_norm)
        if isinstance(self.optimizer, MasterOptimizer):
            try:
                self.optimizer.step(grad_multiplier=multiplier, found_inf=self.found_inf)
            except TypeError as error:
                # one that passes for Duotone's by its class, as Fabric's wrappers do
                hidden = hides_masters(self.optimizer)
                if hidden is None:
                    raise
                raise hidden from error
        elif skips_on_device(self.optimizer):
            fused_step(self.optimizer, multiplier.reciprocal(), self.found_inf)
        elif not self.skips:
            self._check_precise(multiplier)
            for grad in self.grads:
                grad.mul_(multiplier)
            self.optimizer.step()

    def _check_precise(self, multiplier: Tensor) -> None:
        if any(grad.dtype == torch.float16 for grad in self.grads) and multiplier != 1.0:
            raise OptimizerError(
                f"true gradients underflow in FP16, and this {type(self.optimizer).__name__} takes no others for FP16 "
                "weights; use duotone.torch.MasterWeights(optimizer), or AdamW, SGD or Lion from there"
            )


def grad_multiplier(sum_of_squares: Scalar, inverse_scale: Scalar, clip_norm: float | None) -> Tensor:
    """Return what scaled gradients are multiplied by to be true and clipped: FP32, 0-d.

    The quotient of the norms is taken in FP64 and rounded once. A norm of 0 clips nothing; one of Inf or NaN makes the
    multiplier 0 or NaN, of a step that is skipped.

    Args:
        sum_of_squares: of the true gradient: a number for gradients on the host, else FP64, 0-d.
        inverse_scale: 1 / loss_scale: a number likewise, else FP32, 0-d.
        clip_norm: the largest norm of the true gradient, or None.

    >>> grad_multiplier(16.0, 0.5, 1.0)
    tensor(0.1250)
    """
    if isinstance(inverse_scale, Tensor):
        if clip_norm is None:
            return inverse_scale
        # a norm of 0 makes the quotient Inf, and the smaller is 1
        reciprocal = torch.as_tensor(sum_of_squares).sqrt().reciprocal_()
        return reciprocal.mul_(clip_norm).clamp_(max=1.0).mul_(inverse_scale).float()
    # one operation of torch takes longer than all of these
    if clip_norm is not None:
        norm = math.sqrt(sum_of_squares)
        inverse_scale *= min(1.0 / norm * clip_norm, 1.0) if norm != 0.0 else 1.0
    return as_float32(inverse_scale)


def as_float32(value: Scalar) -> Tensor:
    """Return a number on the host as FP32, 0-d, rounded to nearest, Inf beyond its range; a tensor itself.

    >>> as_float32(0.1), as_float32(1e39)
    (tensor(0.1000), tensor(inf))
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.full((), value, dtype=torch.float32, device=_HOST)
    except RuntimeError:
        # torch refuses what overflows
        return torch.full((), value, dtype=torch.float64, device=_HOST).float()


def _check_keeps_updates(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    for param in params:
        if needs_tail(param) or storage_of(param).rounding == kernels.Rounding.STOCHASTIC:
            hidden = hides_masters(optimizer)
            if hidden is not None:
                raise hidden
            raise OptimizerError(
                f"torch's {type(optimizer).__name__} would lose small updates to weights in {param.dtype}: it keeps no "
                "FP32 masters and rounds to nearest; use duotone.torch.MasterWeights(optimizer), or AdamW, SGD or Lion "
                "from there, or duotone.torch.prepare(model, optimizer, policy)"
            )


def _several_devices(devices: Iterable[torch.device], device: torch.device) -> OptimizerError:
    # kernels would take addresses there for addresses here
    others = sorted(str(other) for other in devices if other != device)
    return OptimizerError(
        f"gradients lie on {device} and on {', '.join(others)}, but one step reads those of one device; "
        "duotone.torch.GradScaler takes several"
    )
