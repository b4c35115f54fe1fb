"""A loss scale where the losses are: its state goes from device to device, and no step waits for one.

On the host the state is in Python numbers, which are many times as fast to change as tensors; on an accelerator it is
in 0-d tensors. `duotone.loss_scale` has the transition for both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duotone.loss_scale import LossScale, LossScaleState, init_state, select, update

_DTYPES = {"scale": torch.float32}


@dataclass(frozen=True)
class DeviceScale:
    """A loss scale and its state.

    Attributes:
        settings: how it moves.
        state: leaves are Python numbers on the host, 0-d tensors on another device, FP32 and int32; the search of the
            scale is a Python number there too once the host knows that it is over.

    >>> scale = initial_scale(LossScale()).after_step(True, True)
    >>> scale.tensor("scale"), scale.tensor("skipped")
    (tensor(1.), tensor(1, dtype=torch.int32))
    """

    settings: LossScale
    state: LossScaleState

    @property
    def on_host(self) -> bool:
        """Whether the state can be read without waiting."""
        return not isinstance(self.state.scale, Tensor)

    def to(self, device: torch.device) -> "DeviceScale":
        """Return the scale with its state on a device."""
        scale = self.state.scale
        if is_on_host(device):
            return DeviceScale(self.settings, LossScaleState(**self.numbers())) if isinstance(scale, Tensor) else self
        if isinstance(scale, Tensor) and scale.device == device:
            return self
        # a loss of an evaluation must not leave a scale that no loss of the training can be multiplied by
        with torch.inference_mode(False):
            leaves = {
                name: torch.as_tensor(value, dtype=_DTYPES.get(name, torch.int32), device=device)
                for name, value in vars(self.state).items()
            }
        moved = DeviceScale(self.settings, LossScaleState(**leaves))
        return moved.settled() if not isinstance(self.state.search, Tensor) and self.state.search == 0 else moved

    def settled(self) -> "DeviceScale":
        """Return the same scale, for which no search is computed from now on."""
        return DeviceScale(self.settings, replace(self.state, search=0))

    def leaves(self, scalars: Iterable[Tensor]) -> list[Any]:
        """Return 0-d tensors on the state's device in the form of the state's leaves."""
        return list(scalars if isinstance(self.state.scale, Tensor) else map(Tensor.item, scalars))

    def tensor(self, name: str) -> Tensor:
        """Return a leaf as a 0-d tensor, FP32 for the scale and int32 for the others, on its device."""
        value = getattr(self.state, name)
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=_DTYPES.get(name, torch.int32), device="cpu")

    def numbers(self) -> dict[str, Any]:
        """Return the leaves by name as Python numbers; waits for the device."""
        return {name: torch.as_tensor(value).item() for name, value in vars(self.state).items()}

    def after_step(self, found_inf: Any, loss_is_finite: Any) -> "DeviceScale":
        """Return the scale that has reacted to a step; arguments as `leaves` returns them."""
        where = torch.where if isinstance(self.state.scale, Tensor) else select
        state = update(self.settings, self.state, found_inf, loss_is_finite=loss_is_finite, where=where)
        return DeviceScale(self.settings, state)

    def after_overflow(self, found_inf: Any, loss_is_finite: Any) -> "DeviceScale":
        """Return the scale that has reacted to an overflow, if there was one: what is finite is no clean step here."""
        where = torch.where if isinstance(self.state.scale, Tensor) else select
        after = vars(self.after_step(found_inf, loss_is_finite).state)
        before = vars(self.state)
        leaves = {
            name: value if after[name] is value else where(found_inf, after[name], value)
            for name, value in before.items()
        }
        return DeviceScale(self.settings, LossScaleState(**leaves))


def initial_scale(settings: LossScale) -> DeviceScale:
    """Return the scale before the first step, on the host."""
    return DeviceScale(settings, init_state(settings))


def is_on_host(device: torch.device) -> bool:
    """Return whether what is on a device can be read without waiting.

    >>> is_on_host(torch.device("cpu"))
    True
    """
    return device.type == "cpu"
