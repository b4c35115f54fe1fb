"""The loss scaler that lives on the device: `duotone.loss_scale` on 0-d tensors, moved by no host synchronisation.

Micikevicius et al., "Mixed precision training" (1710.03740), section 3.2. Left out so far: naming the module whose
gradients overflow.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from duotone.errors import LossScaleError
from duotone.loss_scale import LossScale, LossScaleState, init_state, update
from duotone.policy import Policy
from duotone.torch.step import StepReport, step


class LossScaler:
    """Scales losses so that FP16 gradients do not underflow, and steps optimizers with gradients so scaled.

    For a policy that needs no scaling it is the same object with a scale of 1 for ever: gradients are still checked,
    clipped, and a step with an Inf or a NaN in them is still skipped and reported.

    Args:
        policy: a policy or its text, whose `loss_scale` is taken; or `LossScale` settings.
        overrides: settings of `LossScale` to change, such as `init_scale=2**10` or `hysteresis=2`.

    Raises:
        LossScaleError: a setting is out of range, or overrides are given where nothing is scaled.

    >>> import duotone.torch as dt
    >>> model = dt.cast(torch.nn.Linear(2, 1), "fp16")
    >>> optimizer = dt.SGD(model.parameters(), lr=0.1)
    >>> scaler = LossScaler("fp16", init_scale=2**10)
    >>> scaler.backward(model(torch.ones(1, 2)).sum())
    >>> report = scaler.step(optimizer, clip_norm=10.0)
    >>> report.skipped.item(), report.loss_scale.item(), round(report.grad_norm.item(), 4)
    (False, 1024.0, 1.7321)
    """

    def __init__(self, policy: Policy | str | LossScale, **overrides: Any) -> None:
        if isinstance(policy, LossScale):
            settings = policy
        else:
            policy = Policy.parse(policy)
            settings = LossScale.parse(policy.loss_scale)
        if overrides:
            if not settings.is_dynamic:
                raise LossScaleError(
                    f"{', '.join(sorted(overrides))} given, but this policy does not move its loss scale; "
                    'use a policy with loss_scale=dynamic, such as "fp16"'
                )
            settings = LossScale.dynamic(**(asdict(settings) | overrides))
        self.settings = settings
        self._state = init_state(settings)
        self._losses_scaled = 0

    @property
    def loss_scale(self) -> Tensor:
        """The factor of the next loss: FP32, 0-d, on the device of the last loss; reading its value waits for it."""
        return _as_tensor(self._state.scale, torch.float32)

    @property
    def skipped(self) -> Tensor:
        """Steps skipped in all: int32, 0-d, on the device."""
        return _as_tensor(self._state.skipped, torch.int32)

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Steps skipped since the last one that was not: int32, 0-d, on the device."""
        return _as_tensor(self._state.skipped_in_a_row, torch.int32)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss in FP32 times the scale: where nothing is scaled, an FP32 loss itself.

        Args:
            loss: any floating-point dtype and shape.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise LossScaleError(f"a loss must be a floating-point tensor, not {got}")
        self._move_to(loss.device)
        self._losses_scaled += 1
        # times 1 would be an operation there and one on the way back
        return loss.float() if self.settings.is_none else loss.float() * self._state.scale

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scale a loss and run its backward pass; call it once for each micro-batch.

        Args:
            loss: a tensor of one element. Divide it by the number of micro-batches if there are several.
            kwargs: of `Tensor.backward`, such as `retain_graph`.

        Raises:
            LossScaleError: the loss has more than one element, or none.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise LossScaleError(f"the loss has shape {tuple(loss.shape)}, not one element; take its mean or its sum")
        self.scale(loss).backward(**kwargs)

    def step(
        self, *optimizers: torch.optim.Optimizer, clip_norm: float | None = None, scheduler: Any = None
    ) -> StepReport:
        """Step optimizers with the gradients of the losses scaled since the last step; see `duotone.torch.step`.

        Raises:
            LossScaleError: a scale is in use, and no loss was scaled since the last step.
        """
        return step(*optimizers, scaler=self, clip_norm=clip_norm, scheduler=scheduler)

    def begin_step(self, device: torch.device) -> Tensor:
        """Return the scale that the gradients carry, FP32, 0-d, on `device`; for `duotone.torch.step` to call."""
        if not self.settings.is_none and self._losses_scaled == 0:
            raise LossScaleError(
                "no loss was scaled since the last step, so the gradients carry no loss scale; "
                "use scaler.backward(loss), or scaler.scale(loss).backward()"
            )
        self._move_to(device)
        return self.loss_scale

    def end_step(self, found_inf: Tensor) -> None:
        """Let the scale react to a step: once, after every optimizer; for `duotone.torch.step` to call."""
        # on the host the state is in Python numbers
        if found_inf.device.type == "cpu":
            self._state = update(self.settings, self._state, found_inf.item())
        else:
            self._state = update(self.settings, self._state, found_inf, where=torch.where)
        self._losses_scaled = 0

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state in Python numbers, ready for JSON; waits for the device."""
        return {"settings": asdict(self.settings), "state": self._numbers()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            LossScaleError: keys are missing or unknown, or a setting or the scale is out of range. Nothing is
                loaded then.
        """
        try:
            settings = LossScale(**state_dict["settings"])
            state = LossScaleState(**state_dict["state"])
        except (KeyError, TypeError) as error:
            raise LossScaleError(f"this is not the state of a LossScaler: {error}") from error
        # whatever holds for a scale to begin with holds for every later one
        replace(settings, init_scale=state.scale)
        if not settings.is_dynamic and state.scale != settings.init_scale:
            raise LossScaleError(f"the scale is {state.scale}, but by its settings it stays at {settings.init_scale}")
        self.settings, self._state = settings, state

    def _move_to(self, device: torch.device) -> None:
        """Have the state on a device: on the host in Python numbers, which torch takes many times as long to change."""
        scale = self._state.scale
        if device.type == "cpu":
            if isinstance(scale, Tensor):
                self._state = LossScaleState(**self._numbers())
        elif not isinstance(scale, Tensor) or scale.device != device:
            leaves = {
                name: torch.as_tensor(value, dtype=torch.float32 if name == "scale" else torch.int32, device=device)
                for name, value in vars(self._state).items()
            }
            self._state = LossScaleState(**leaves)

    def _numbers(self) -> dict[str, Any]:
        """Return the state's leaves as Python numbers; waits for the device."""
        return {name: torch.as_tensor(value).item() for name, value in vars(self._state).items()}


def _as_tensor(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device="cpu")
