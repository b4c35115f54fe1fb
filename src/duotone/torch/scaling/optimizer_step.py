"""One optimizer in a step: its gradients, what they are like on all ranks, and the update with them.

    grad_multiplier = min(1, clip_norm / grad_norm) / loss_scale

Unscaling and clipping are this one number. Duotone's optimizers take it together with `found_inf`, and torch's fused
ones take its reciprocal. For any other optimizer the host waits for `found_inf` and multiplies the gradients in place.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.optim import MasterOptimizer
from duotone.torch.optim.foreign import fused_step, hides_masters, skips_on_device
from duotone.torch.parameters.masters import needs_tail
from duotone.torch.parameters.storage import storage_of

# each is called for every gradient in every step, so no Python function is
_grad_of = attrgetter("grad")
_is_sparse = attrgetter("is_sparse")
_is_cpu = attrgetter("is_cpu")


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
        inverse_scale: what makes the gradients true: FP32, 0-d; 1 if they are.
        sum_of_squares: of the true gradient on all ranks: FP64, 0-d.
        found_inf: whether an Inf or a NaN is in them, or was when they were unscaled, on any rank: bool, 0-d.

    Raises:
        OptimizerError: a gradient is sparse, or 16-bit weights lie in an optimizer that keeps no masters of them.
    """

    inverse_scale: Tensor
    sum_of_squares: Tensor
    found_inf: Tensor

    def __init__(self, optimizer: torch.optim.Optimizer, found_inf_ahead: Tensor | None = None) -> None:
        self.optimizer = optimizer
        self.found_inf_ahead = found_inf_ahead
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = list(map(_grad_of, params))
        self.params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        self.grads: list[Tensor] = [grad for grad in grads if grad is not None]
        if not isinstance(optimizer, MasterOptimizer):
            _check_keeps_updates(optimizer, self.params)
        if any(map(_is_sparse, self.grads)):
            raise OptimizerError("sparse gradients cannot be unscaled here; use Embedding(sparse=False)")

    def stats_of(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum of squares of some of the gradients, true, FP64, and whether an Inf or a NaN is in them, bool.

        Args:
            grads: plain tensors.

        Raises:
            OptimizerError: a gradient is on another device than `inverse_scale`.
        """
        # asking a tensor whether it is on a CPU is the quickest
        if not (self.inverse_scale.is_cpu and all(map(_is_cpu, grads))):
            _check_one_device(grads, self.inverse_scale.device)
        if isinstance(self.optimizer, MasterOptimizer):
            return kernels.grad_stats(grads, self.inverse_scale, self.optimizer.backend)
        grads = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
        # torch's optimizers may have others, FP64 for instance
        has_kernel = all(grad.dtype in (torch.float32, *kernels.SPLIT_DTYPES) for grad in grads)
        return kernels.grad_stats(grads, self.inverse_scale, "auto" if has_kernel else "reference")

    def set_stats(self, sum_of_squares: Tensor, found_inf: Tensor) -> None:
        """Set what all gradients are like, on all ranks."""
        self.sum_of_squares = sum_of_squares
        self.found_inf = found_inf if self.found_inf_ahead is None else found_inf | self.found_inf_ahead

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
        elif not self.found_inf:
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


def grad_multiplier(sum_of_squares: Tensor, inverse_scale: Tensor, clip_norm: float | None) -> Tensor:
    """Return what scaled gradients are multiplied by to be true and clipped: FP32, 0-d.

    The quotient of the norms is taken in FP64 and rounded once. A norm of 0 clips nothing; one of Inf or NaN makes the
    multiplier 0 or NaN, of a step that is skipped.

    Args:
        sum_of_squares: of the true gradient: FP64, 0-d.
        inverse_scale: 1 / loss_scale: FP32, 0-d.
        clip_norm: the largest norm of the true gradient, or None.

    >>> grad_multiplier(torch.tensor(16.0, dtype=torch.float64), torch.tensor(0.5), 1.0)
    tensor(0.1250)
    """
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


def _check_one_device(grads: Sequence[Tensor], device: torch.device) -> None:
    others = sorted({str(grad.device) for grad in grads if grad.device != device})
    if others:
        # kernels would take addresses there for addresses here
        raise OptimizerError(
            f"gradients lie on {device} and on {', '.join(others)}, but one step reads those of one device; "
            "duotone.torch.GradScaler takes several"
        )
