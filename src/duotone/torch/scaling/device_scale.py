"""A loss scale where the losses are: its state goes from device to device, and no step waits for one.

On the host the state is in Python numbers, which are many times as fast to change as tensors; on an accelerator it is
in 0-d tensors. `duotone.loss_scale` has the transition for both.
"""

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

    def leaf(self, scalar: Any) -> Any:
        """Return a 0-d tensor on the state's device, or a number on the host, in the form of the state's leaves."""
        return scalar.item() if isinstance(scalar, Tensor) and self.on_host else scalar

    def inverse(self) -> Any:
        """Return what takes the scale out, exactly, in the form of a leaf."""
        scale = self.state.scale
        return scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / scale

    def tensor(self, name: str) -> Tensor:
        """Return a leaf as it is now, 0-d, FP32 for the scale and int32 for the others, on its device."""
        value = getattr(self.state, name)
        if isinstance(value, Tensor):
            return value.clone()
        return torch.full((), value, dtype=_DTYPES.get(name, torch.int32), device="cpu")

    def numbers(self) -> dict[str, Any]:
        """Return the leaves by name as Python numbers; waits for the device."""
        return {name: torch.as_tensor(value).item() for name, value in vars(self.state).items()}

    def copy(self) -> "DeviceScale":
        """Return the same scale in memory of its own."""
        leaves = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self.state).items()
        }
        return DeviceScale(self.settings, LossScaleState(**leaves))

    def after_step(self, found_inf: Any, loss_is_finite: Any) -> "DeviceScale":
        """Return the scale that has reacted to a step; arguments as `leaf` returns them.

        On a device that is this one, changed in place: a CUDA graph reads and writes the same memory in every replay.
        """
        return self._moved_to(self._state_after(found_inf, loss_is_finite))

    def after_overflow(self, found_inf: Any, loss_is_finite: Any) -> "DeviceScale":
        """Return the scale that has reacted to an overflow, if there was one: what is finite is no clean step here."""
        where = torch.where if isinstance(self.state.scale, Tensor) else select
        after = vars(self._state_after(found_inf, loss_is_finite))
        before = vars(self.state)
        leaves = {
            name: value if after[name] is value else where(found_inf, after[name], value)
            for name, value in before.items()
        }
        return self._moved_to(LossScaleState(**leaves))

    def _state_after(self, found_inf: Any, loss_is_finite: Any) -> LossScaleState:
        where = torch.where if isinstance(self.state.scale, Tensor) else select
        return update(self.settings, self.state, found_inf, loss_is_finite=loss_is_finite, where=where)

    def _moved_to(self, state: LossScaleState) -> "DeviceScale":
        if self.on_host:
            return DeviceScale(self.settings, state)
        moved = vars(state)
        for name, held in vars(self.state).items():
            if moved[name] is not held:
                # a loss that was scaled before, and is taken backward after, has this scale: no version tells of it
                held.data.copy_(moved[name])
        return self


def initial_scale(settings: LossScale) -> DeviceScale:
    """Return the scale before the first step, on the host."""
    return DeviceScale(settings, init_state(settings))


def is_on_host(device: torch.device) -> bool:
    """Return whether what is on a device can be read without waiting.

    >>> is_on_host(torch.device("cpu"))
    True
    """
    return device.type == "cpu"
