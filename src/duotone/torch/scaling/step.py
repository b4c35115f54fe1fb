"""One step of one or several optimizers: gradients are read once, ranks agree once, every optimizer updates or skips.

Each optimizer is clipped by its own norm and skips by its own gradients. With Duotone's optimizers nothing waits for
the device. The loss scale and its reaction are `LossScaler`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add, attrgetter, or_
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.optim import MasterOptimizer
from duotone.torch.parameters.masters import check_in_place
from duotone.torch.scaling.optimizer_step import OptimizerStep, as_float32
from duotone.wording.notebook import block, table

_params_of, _grads_of = attrgetter("params"), attrgetter("grads")
_sum_of_squares_of, _found_inf_of = attrgetter("sum_of_squares"), attrgetter("found_inf")


@dataclass(frozen=True, repr=False)
class StepReport:
    """What a step did. Device scalars: reading one as a Python number waits for the device, and so does showing them.

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

    def __repr__(self) -> str:
        return f"StepReport({', '.join(f'{name}={value}' for name, value in self._shown().items())})"

    def _repr_html_(self) -> str:
        names = [(name, False) for name in self._shown()]
        return block("StepReport", table(names, [list(self._shown().values())]))

    def _shown(self) -> dict[str, str]:
        """Return what is shown, by name: flags of the optimizers only if there are several."""
        shown = {
            "skipped": str(bool(self.skipped)),
            "grad_norm": f"{float(self.grad_norm):.6g}",
            "loss_scale": f"{float(self.loss_scale):g}",
        }
        if len(self.skipped_each) > 1:
            shown["skipped_each"] = str([bool(each) for each in self.skipped_each])
        return shown


class Step:
    """The gradients of one or several optimizers, and the ranks that agree on them.

    Args:
        optimizers: as `check_arguments` takes them.
        found_inf_ahead: what was found in the gradients that `unscale_` made true, by the `id` of their optimizer.
        process_group: the ranks, if the parameters do not tell.

    Attributes:
        optimizers: as above.
        parts: one for each optimizer.
        agreement: of the ranks.
        has_gradients: whether a gradient is here, or may be on another rank.
        device: where the gradients are; the CPU if there are none.

    Raises:
        OptimizerError: a gradient is sparse; 16-bit weights lie in an optimizer that keeps no masters of them; or a
            weight is in two optimizers, one of which would unscale its gradient for both.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], found_inf_ahead: Mapping[int, Tensor], process_group: Any
    ) -> None:
        self.optimizers = optimizers
        self.parts = [OptimizerStep(optimizer, found_inf_ahead.get(id(optimizer))) for optimizer in optimizers]
        several = len(self.parts) > 1
        params = list(chain.from_iterable(map(_params_of, self.parts))) if several else self.parts[0].params
        params = params or self._all_parameters()
        self.agreement = Agreement(params, process_group)
        first = next((part.grads[0] for part in self.parts if part.grads), None)
        # a rank without gradients takes part in the others' step all the same
        self.has_gradients = first is not None or (bool(params) and self.agreement.is_needed)
        self.device = torch.device("cpu")
        if self.has_gradients:
            self.device = (params[0] if first is None else first).device
        if several:
            self._check_shared()

    def read(self, inverse_scale: float | Tensor, flag: Tensor | None = None) -> bool | Tensor | None:
        """Read every gradient once, and agree with the other ranks in one collective.

        Args:
            inverse_scale: 1 / loss_scale: a number on the host, else FP32, 0-d.
            flag: bool, 0-d, for the ranks to agree on as well, or None.

        Returns:
            Whether the flag is true on any rank; None if there was none.
        """
        for part in self.parts:
            part.inverse_scale = inverse_scale
            if part.found_inf_ahead is not None:
                part.inverse_scale = torch.ones_like(inverse_scale) if isinstance(inverse_scale, Tensor) else 1.0
        if not self.agreement.is_needed:
            for part in self.parts:
                part.set_stats(*part.stats_of(part.grads))
            return flag
        stats = [[part.stats_of(share) for share in self.agreement.shares(part.grads)] for part in self.parts]
        # the last share is of copies, whose squares another rank counts
        sums = torch.stack([_stack([total for total, _ in each[:-1]], torch.float64) for each in stats], dim=1)
        flags = [_stack([found_inf for _, found_inf in each], torch.bool).any() for each in stats]
        sums, flags = self.agreement.combined(sums, torch.stack(flags if flag is None else [*flags, flag]))
        on_host = not isinstance(inverse_scale, Tensor)
        totals, found = (sums.tolist(), flags.tolist()) if on_host else (sums, flags)
        for part, total, found_inf in zip(self.parts, totals, found, strict=False):
            part.set_stats(total, found_inf)
        return None if flag is None else found[-1]

    def report(self, loss_scale: float | Tensor) -> StepReport:
        """Return what the step did; the scale is the one that the losses were multiplied by."""
        flags = tuple(map(_found_inf_of, self.parts))
        total: Any = reduce(add, map(_sum_of_squares_of, self.parts))
        norm = total.sqrt().float() if isinstance(total, Tensor) else as_float32(math.sqrt(total))
        return StepReport(reduce(or_, flags), norm, as_float32(loss_scale), flags)

    def report_without_gradients(self, loss_scale: Tensor) -> StepReport:
        """Return the report of a step in which nothing is done, because there is no gradient.

        Raises:
            OptimizerError: the optimizer's parameters were replaced by `fully_shard`, which is why they have none.
        """
        for param in self._all_parameters():
            check_in_place(param)
        zero = torch.zeros(())
        flags = tuple([zero.bool() if part.found_inf_ahead is None else part.found_inf_ahead for part in self.parts])
        return StepReport(reduce(or_, flags), zero, loss_scale, flags)

    def _all_parameters(self) -> list[Tensor]:
        return [param for optimizer in self.optimizers for group in optimizer.param_groups for param in group["params"]]

    def _check_shared(self) -> None:
        seen: set[int] = set()
        shared: set[int] = set()
        unscaled: set[int] = set()
        for part in self.parts:
            own = set(map(id, part.grads))
            shared |= own & seen
            seen |= own
            # these change the gradient itself
            if part.found_inf_ahead is not None or not isinstance(part.optimizer, MasterOptimizer):
                unscaled |= own
        for grad in chain.from_iterable(map(_grads_of, self.parts)):
            if id(grad) in shared & unscaled:
                raise OptimizerError(
                    f"a weight of shape {tuple(grad.shape)} is in two of these optimizers, and the scale would be "
                    "taken out of its gradient twice; put it into one, or use AdamW, SGD or Lion of duotone.torch, "
                    "without unscale_"
                )


def _stack(values: Sequence[float | Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(values)  # type: ignore[arg-type]
    return torch.tensor(values, dtype=dtype, device="cpu")


def check_arguments(optimizers: Sequence[torch.optim.Optimizer], clip_norm: float | None) -> None:
    """Raise unless a step can take these optimizers and this limit.

    Raises:
        OptimizerError: no optimizer, or one twice, or something else; an optimizer that needs to call a closure
            several times; a `clip_norm` that is not positive.
    """
    if not optimizers:
        raise OptimizerError("step needs at least one optimizer")
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise OptimizerError(
                f"step takes optimizers, but one is a {type(optimizer).__name__}; give a closure as closure=..., a "
                "scheduler as scheduler=..., and several optimizers one after the other"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "LBFGS evaluates the loss several times while it moves the weights, so a step of it can be neither "
                "unscaled nor skipped as a whole; call its step(closure) without a scaler, in policy fp32 or bf16-mixed"
            )
    if len(set(map(id, optimizers))) < len(optimizers):
        raise OptimizerError("an optimizer was given twice; give each once, and all of them to one call")
    if clip_norm is not None and not clip_norm > 0.0:
        raise OptimizerError(f"clip_norm is {clip_norm}; it must be positive, or None for no clipping")
