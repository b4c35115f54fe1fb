"""Three mistakes in a loop that a scaler can see, each said once: they cost accuracy, and raise nothing by themselves.

- The scaler does not fit the model: FP16 gradients without a scale, or a scale that no gradient needs.
- Scaled gradients were clipped. Between backward pass and step somebody wrote into them, and their norm, or the largest
  of them, is the same round number, 1.0 for instance, in `_CLIPPED` steps: that number over the scale is all that is
  left of the true one.
- Very many gradients were summed in 16 bits.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from duotone.call_site import warn
from duotone.loss_scale import LossScale
from duotone.torch.parameters.storage import storage_of
from duotone.torch.readback import Readback

# losses in one step from which on their sum is off by half a percent and more, by the dtype of the gradients
_MANY = {torch.bfloat16: 64, torch.float16: 1024}
FEWEST = min(_MANY.values())
_CLIPPED = 3
# how often norms are read for that, at most
_LOOKS = 12
# leading digits of limits that people write
_ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 7.5, 8.0, 9.0, 10.0)


class LoopCheck:
    """What was seen of the loop around a scaler.

    Args:
        looks_for_clipping: whether gradients are scaled at all.

    Attributes:
        known: the ids of optimizers whose fit to the scaler was looked at.
        looks_for_clipping: whether it is open if gradients are clipped before they are unscaled.
    """

    def __init__(self, *, looks_for_clipping: bool) -> None:
        self.known: set[int] = set()
        self.looks_for_clipping = looks_for_clipping
        self._norms: list[float] = []
        self._largest: list[float] = []
        self._looks = 0
        self._readback = Readback()
        self._many_said = False

    def __reduce__(self) -> Any:
        return partial(LoopCheck, looks_for_clipping=self.looks_for_clipping), ()

    def look_at(self, optimizers: Sequence[torch.optim.Optimizer], settings: LossScale) -> None:
        """Warn if the scale does not fit the policies that an optimizer's parameters were cast to."""
        for optimizer in optimizers:
            if id(optimizer) not in self.known:
                self.known.add(id(optimizer))
                _say_if_misfit(optimizer, settings)

    def say_if_sums_are_rounded(self, losses: int, grads: Sequence[Tensor]) -> None:
        """Warn if so many losses were summed into 16-bit gradients that the sum is off by half a percent or more."""
        coarse = next((grad.dtype for grad in grads if losses >= _MANY.get(grad.dtype, math.inf)), None)
        if coarse is None or self._many_said:
            return
        self._many_said = True
        warn(
            f"{losses} losses were summed into gradients in {coarse} for one step, and every sum is rounded to it; add "
            '"grad=float32" to the policy, or take larger micro-batches'
        )

    def look_for_clipping(self, scaled_norm: Tensor, grads: Iterable[Tensor], *, on_host: bool) -> None:
        """Look at scaled gradients that somebody wrote into, and warn if they are always clipped to a round number.

        Args:
            scaled_norm: 0-d.
            grads: plain tensors, on one device.
            on_host: whether it can be read without waiting; otherwise it is read when the next one comes.
        """
        largest = [grad.abs().amax().float() for grad in grads if grad.numel()]
        self._take(self._readback.receive())
        self._readback.send(torch.stack([scaled_norm.float(), torch.stack(largest).amax() if largest else scaled_norm]))
        if on_host:
            self._take(self._readback.receive())
        if len(self._norms) < _CLIPPED and self._looks < _LOOKS:
            return
        self.looks_for_clipping = False
        of_norm, of_largest = _round_number(self._norms), _round_number(self._largest)
        if of_norm is not None:
            warn(
                f"the norm of the scaled gradients was {of_norm:g} in each of {_CLIPPED} steps: they were clipped "
                "while they carry the loss scale, and the true gradient is smaller by that; use scaler.step(optimizer, "
                f"clip_norm={of_norm:g}), or call scaler.unscale_(optimizer) before you clip"
            )
        elif of_largest is not None:
            warn(
                f"the largest of the scaled gradients was {of_largest:g} in each of {_CLIPPED} steps: they were "
                "clipped while they carry the loss scale, and the true gradients are smaller by that; call "
                "scaler.unscale_(optimizer) before you clip"
            )

    def _take(self, values: list[float] | None) -> None:
        if values is not None:
            self._looks += 1
            # in 16 bits the norm may overflow, and what is clipped by it is 0
            for value, seen in zip(values, (self._norms, self._largest), strict=True):
                if math.isfinite(value) and value > 0.0:
                    seen.append(value)


def _say_if_misfit(optimizer: torch.optim.Optimizer, settings: LossScale) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    scales = {storage_of(param).loss_scale for param in params}
    half = any(param.dtype == torch.float16 and storage_of(param).param is None for param in params)
    if settings.is_none and (half or scales - {None, "none", 1.0}):
        what = "are in float16" if half else "were cast to a policy that scales the loss"
        warn(
            f"this LossScaler scales nothing, but the weights {what}: small gradients become 0 in float16; give it the "
            'policy of the model, LossScaler("fp16")'
        )
    elif not settings.is_none and scales == {"none"} and not half:
        warn(
            "this LossScaler scales losses without need, for no gradient of the model passes through float16: steps "
            'may be skipped in vain; give it the policy of the model, LossScaler("bf16")'
        )


def _round_number(values: Sequence[float]) -> float | None:
    """Return the round number that values above 0 all are, to half a percent; None if they are too few, or are none.

    >>> _round_number([1.0001, 0.9999, 1.0]), _round_number([1.0, 1.1, 1.0]), _round_number([0.5, 0.5])
    (1.0, None, None)
    """
    if len(values) < _CLIPPED:
        return None
    power = 10.0 ** math.floor(math.log10(values[0]))
    limit = min((digits * power for digits in _ROUND), key=lambda number: abs(number - values[0]))
    return limit if all(abs(value - limit) <= 0.005 * limit for value in values) else None
