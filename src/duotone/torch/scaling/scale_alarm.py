"""The range that a loss scale of `GradScaler` stays in, and what is said when overflows drive it to the lower end.

Below 1 the scale makes gradients smaller instead of larger: that is said once. At the floor nothing is left to try. On
an accelerator both come one step later, so that nothing waits for the device.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.errors import DuotoneWarning, LossScaleCollapse, LossScaleError
from duotone.torch.readback import Readback
from duotone.torch.scaling.diagnosis import non_finite_gradients, some_of

# the smallest and the largest normal number of FP32, which holds the scale
FLOOR, CEILING = 2.0**-126, torch.finfo(torch.float32).max


def check_scale(name: str, value: float) -> float:
    """Return a loss scale as a float.

    Raises:
        LossScaleError: it is not in FP32's normal range above 0.

    >>> check_scale("init_scale", 3)
    3.0
    """
    if not FLOOR <= value <= CEILING:
        raise LossScaleError(
            f"{name} is {value}, but a loss scale is a number from 2**-126 to {CEILING:.4g}, FP32's normal range above "
            "0; 2.0**16 is where to begin if in doubt"
        )
    return float(value)


class ScaleAlarm:
    """Watches where overflows drive a loss scale."""

    def __init__(self) -> None:
        self._has_warned = False
        self._readback = Readback()

    def __getstate__(self) -> dict[str, Any]:
        # what is on its way to the host stays with the original
        return {"_has_warned": self._has_warned, "_readback": Readback()}

    def follow(self, scale: Tensor, found_inf: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take note of a scale that was just updated; call it from the method that a user calls.

        Args:
            scale: FP32, 0-d.
            found_inf: 0-d, not 0 if a step was skipped.
            optimizers: whose gradients are named.

        Raises:
            LossScaleCollapse: there was an overflow, and the scale is at its floor.
        """
        if scale.device.type == "cpu":
            reduced_to = scale.item() if found_inf else torch.inf
        else:
            received = self._readback.receive()
            reduced_to = received[0] if received else torch.inf
            self._readback.send(torch.where(found_inf != 0, scale, torch.inf).reshape(1))
        if reduced_to <= FLOOR:
            raise _collapse(optimizers)
        if reduced_to < 1.0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the loss scale has fallen below 1, to {reduced_to:g}: gradients overflow even where they are made "
                "smaller. Most often the loss or a weight is Inf or NaN already, or the weights were trained in BF16, "
                'whose range FP16 lacks; use policy "bf16", or autocast to torch.bfloat16 without a scaler, lower the '
                "learning rate, or look for a division by 0 in the model and the loss",
                DuotoneWarning,
                stacklevel=3,
            )


def _collapse(optimizers: Sequence[torch.optim.Optimizer]) -> LossScaleCollapse:
    names, parameters = non_finite_gradients(optimizers)
    which = f": {len(names)} of {parameters} gradients are not finite now ({some_of(names)})" if names else ""
    return LossScaleCollapse(
        f"gradients overflow although the loss scale has fallen to its floor, 2**-126{which}. No scale can help; most "
        "often a weight or the loss is Inf or NaN itself: go on from an earlier checkpoint with a lower learning rate, "
        'use policy "bf16", or look for a division by 0 in the model and the loss'
    )
