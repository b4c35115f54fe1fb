"""`torch.amp.GradScaler`'s interface, for code that is written for it: swap the import, and nothing else changes.

What is right in torch is inherited from there, and `isinstance` still holds; what is wrong there is right here:
FP32 losses, one decision of all ranks, a floor under the scale, a clean iteration without gradients, no lost updates of
FP16 weights, no closure in any place. `clip_grad_norm_` before `unscale_` clips scaled gradients here as it does there,
which is warned of. `LossScaler` clips by itself, and does more.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, overload
from weakref import ref

import torch
from torch import Tensor

from duotone.errors import LossScaleError, OptimizerError
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.internals.autograd import version_of
from duotone.torch.internals.dispatch import has_no_cuda
from duotone.torch.internals.training import OptState, check_grad_scaler, new_optimizer_state, update_scale
from duotone.torch.optim import MasterOptimizer
from duotone.torch.optim.foreign import fused_step, hides_masters, loses_float16_updates, skips_on_device, takes_scaler
from duotone.torch.parameters.plain_steps import say_if_updates_are_rounded, watch_plain_steps
from duotone.torch.parameters.scaled_losses import Scaled, scaled_losses
from duotone.torch.parameters.shards import is_shard, local
from duotone.torch.scaling.loop_check import LoopCheck
from duotone.torch.scaling.scale_alarm import CEILING, FLOOR, ScaleAlarm, check_scale
from duotone.torch.scaling.unscale import narrow, unscale_, unscale_and_check_


class GradScaler(torch.amp.GradScaler):
    """Scales losses, unscales gradients, and skips steps that overflow: `torch.amp.GradScaler`, made right.

    Takes torch's optimizers, fused or not, other libraries' that torch's scaler takes, and Duotone's. The latter take
    the scale out while they update and skip on the device, so their gradients stay scaled after `step`, unless
    `unscale_` was called. Clip after `unscale_`, never before: what is clipped there is the scaled gradient.

    Ranks agree on what they skip where parameters are DTensors (`fully_shard`, tensor parallelism), and where
    gradients are the same on all of them (DDP). For parameters that FSDP1 flattens keep torch's `ShardedGradScaler`.

    A scale below 1 is allowed, with one warning (`DuotoneWarning`). It never falls below 2**-126: a step that overflows
    there raises `LossScaleCollapse` in `update`, on an accelerator one `update` later, since nothing waits for it.

    Args:
        device: the type of device that losses are on, `"cuda"`, `"cpu"` or any other, or a `torch.device`.
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after `growth_interval` steps in a row without overflow.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: see there.
        enabled: whether anything is done at all; if not, `step` steps the optimizer and `scale` returns what it gets.

    Raises:
        LossScaleError: `init_scale` is no normal FP32 number above 0, or a number is in the place of the device.
        AssertionError: `growth_factor` is not above 1, or `backoff_factor` not below, as in torch.

    >>> import duotone.torch as dt
    >>> model = dt.cast(torch.nn.Linear(2, 1), "fp16")
    >>> optimizer = dt.AdamW(model.parameters())
    >>> scaler = GradScaler("cpu", init_scale=2.0**10)
    >>> scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    >>> scaler.unscale_(optimizer)
    >>> torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
    tensor(1.7321)
    >>> scaler.step(optimizer)
    >>> scaler.update()
    >>> scaler.get_scale()
    1024.0
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if isinstance(device, int | float):
            raise LossScaleError(
                f"the first argument is {device}, but it is the device, as in torch.amp; write "
                f'GradScaler("cuda", {device}) or GradScaler(init_scale={device})'
            )
        if isinstance(device, torch.device):
            device = device.type
        if enabled and device == "cuda" and has_no_cuda():
            warnings.warn("torch.cuda.amp.GradScaler is enabled, but CUDA is not available.  Disabling.", stacklevel=2)
            enabled = False
        if enabled:
            check_scale("init_scale", init_scale)
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        check_grad_scaler(self)
        self._alarm = ScaleAlarm()
        # how many losses were scaled since the last update, and what is seen of the loop around
        self._losses, self._loop = 0, LoopCheck(looks_for_clipping=self._enabled)
        self._looked_at: int | None = None
        watch_plain_steps()

    @overload
    def scale(self, outputs: Tensor) -> Tensor: ...

    @overload
    def scale(self, outputs: list[Tensor]) -> list[Tensor]: ...

    @overload
    def scale(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...

    @overload
    def scale(self, outputs: Iterable[Tensor]) -> Iterable[Tensor]: ...

    def scale(self, outputs: Tensor | Iterable[Tensor]) -> Tensor | Iterable[Tensor]:
        """Return a loss, or losses, times the scale: in FP32 if given in 16 bits, else in their own dtype.

        Args:
            outputs: a tensor of any shape, or an iterable of such, nested in any way and on any devices. Lists and
                tuples come back as what they are, other iterables as an iterator.

        Raises:
            ValueError: it is neither.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            self._losses += 1
            scaled_losses[id(self)] = Scaled(ref(outputs), None, ref(self))
            return _at_least_float32(outputs) * self._scale_on(outputs.device)
        # some of the losses may go backward when the scale has moved on
        copies: dict[torch.device, Tensor] = {}

        def scaled(output: Any) -> Any:
            if isinstance(output, Tensor):
                if output.device not in copies:
                    copies[output.device] = self._scale_on(output.device).clone()
                return _at_least_float32(output) * copies[output.device]
            if isinstance(output, Iterable) and not isinstance(output, str):
                each = map(scaled, output)
                return type(output)(each) if isinstance(output, list | tuple) else each
            raise ValueError("outputs must be a Tensor or an iterable of Tensors")

        return scaled(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimizer's gradients the true ones in place, so that they can be clipped or looked at.

        FP16 gradients of Duotone's optimizers become FP32 until `update`, since the true ones would underflow.

        Args:
            optimizer: whose gradients are complete; once between two calls of `update`.

        Raises:
            RuntimeError: it has been called already, or after `step`.
            OptimizerError: a gradient is in FP16, and the optimizer keeps no masters.
            AssertionError: nothing was ever scaled.
        """
        scaled_losses.pop(id(self), None)
        super().unscale_(optimizer)
        if self._enabled:
            self._per_optimizer_states[id(optimizer)]["optimizer"] = optimizer

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step an optimizer with true gradients, or skip the step if one of them is Inf or NaN, on any rank.

        Without a single gradient the optimizer is stepped, as it would be without a scaler.

        Args:
            optimizer: one of torch's, Duotone's, or another library's.
            args: for the optimizer's `step`.
            kwargs: likewise.

        Returns:
            What the optimizer's `step` returned; None if it was skipped on the host.

        Raises:
            RuntimeError: there is a closure, or this optimizer has been stepped since the last `update`.
            OptimizerError: a gradient is in FP16, and the optimizer keeps no masters.
            AssertionError: nothing was ever scaled.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs or any(map(callable, args)):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        scale, _ = self._check_scale_growth_tracker("step")
        scaled_losses.pop(id(self), None)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if self._loop.looks_for_clipping and state["stage"] is OptState.READY:
            self._look_for_clipping(optimizer)

        returned: Any = None
        if isinstance(optimizer, MasterOptimizer):
            multiplier = None
            if state["stage"] is OptState.READY:
                self._check_inf_per_device(optimizer)
                multiplier = scale.reciprocal()
            found_inf = _sum(state["found_inf_per_device"].values(), scale.device) != 0
            # a skip that can be read goes past what Accelerate puts on an optimizer to see whether it was stepped
            step = partial(type(optimizer).step, optimizer) if found_inf.is_cpu and found_inf else optimizer.step
            try:
                returned = step(*args, grad_multiplier=multiplier, found_inf=found_inf, **kwargs)
            except TypeError as error:
                hidden = hides_masters(optimizer)
                if hidden is None:
                    raise
                raise hidden from error
            state["stage"] = OptState.STEPPED
            return returned
        if not skips_on_device(optimizer):
            if state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            returned = self._maybe_opt_step(optimizer, state, *args, **kwargs)
        elif takes_scaler(optimizer):
            warnings.warn(
                "GradScaler is going to stop passing itself as a keyword argument to the passed "
                "optimizer. In the near future GradScaler registers `grad_scale: Tensor` and "
                "`found_inf: Tensor` to the passed optimizer and let the optimizer use them directly.",
                FutureWarning,
                stacklevel=2,
            )
            returned = optimizer.step(*args, **kwargs, grad_scaler=self)  # type: ignore[call-arg]
        else:
            returned = self._step_fused(optimizer, state, scale, args, kwargs)
        say_if_updates_are_rounded(optimizer)
        state["stage"] = OptState.STEPPED
        return returned

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Let the scale react to the steps since the last call, or set it; after the steps of all optimizers.

        After an iteration without a single gradient, scale and growth tracker stay as they are.

        Args:
            new_scale: the scale from now on: a number, or a tensor of one element on the scaler's kind of device. On
                an accelerator it is not read, but brought into FP32's normal range.

        Raises:
            LossScaleError: `new_scale` is no normal FP32 number above 0.
            LossScaleCollapse: gradients overflow although the scale is at its floor.
            AssertionError: nothing was ever scaled, no optimizer was stepped, or `new_scale` is no such tensor.
        """
        if not self._enabled:
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        self._losses = 0
        for state in self._per_optimizer_states.values():
            narrow(state.pop("widened", []))
        if new_scale is not None:
            super().update(_checked(new_scale))
            scale.nan_to_num_(FLOOR).clamp_(FLOOR, CEILING)
            return
        states = list(self._per_optimizer_states.values())
        found_infs = [found_inf for state in states for found_inf in state["found_inf_per_device"].values()]
        optimizers = [state["optimizer"] for state in states if "optimizer" in state]
        if not found_infs and not optimizers:
            raise AssertionError("No inf checks were recorded prior to update.")
        self._per_optimizer_states = defaultdict(new_optimizer_state)
        # without a single gradient there is nothing to react to
        if found_infs:
            found_inf = _sum(found_infs, scale.device)
            factors = self._growth_factor, self._backoff_factor, self._growth_interval
            update_scale(scale, growth_tracker, found_inf, *factors)
            self._alarm.follow(scale.clamp_(FLOOR, CEILING), found_inf, optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, here or in torch.

        Raises:
            RuntimeError: it is empty.
            LossScaleError: its scale is no normal FP32 number above 0. Nothing is loaded then.
        """
        if self._enabled and state_dict:
            check_scale("the scale in the state", state_dict["scale"])
        super().load_state_dict(state_dict)

    def _scale_on(self, device: torch.device) -> Tensor:
        if self._scale is None:
            # a loss of an evaluation must not leave a scale that no loss of the training can be multiplied by
            with torch.inference_mode(False):
                self._lazy_init_scale_growth_tracker(device)
        assert self._scale is not None
        return self._scale.to(device, non_blocking=True)

    @torch.no_grad()
    def _look_for_clipping(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the norm of the first optimizer's scaled gradients, if somebody has written into them."""
        grads = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        if self._looked_at is None:
            self._looked_at = id(optimizer)
        if self._looked_at != id(optimizer) or not grads or version_of(grads[0]) < max(self._losses, 1):
            return
        if all(
            grad.layout is torch.strided and not is_shard(grad) and grad.device == grads[0].device for grad in grads
        ):
            norms = [torch.linalg.vector_norm(grad, dtype=_wide(grad)).float() for grad in grads]
            self._loop.look_for_clipping(torch.stack(norms).norm(), grads, on_host=grads[0].is_cpu)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        found_infs = super()._check_inf_per_device(optimizer)
        self._per_optimizer_states[id(optimizer)]["optimizer"] = optimizer
        return found_infs

    @torch.no_grad()
    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Multiply gradients by `inv_scale`; return for each device whether one was Inf or NaN, on any rank.

        FP32, 0-d, 0 or 1. Where there are no gradients at all, on no rank, nothing is returned.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if not allow_fp16:
            self._widen(optimizer, params)
        on_devices = unscale_and_check_(params, inv_scale, found_inf)
        agreement = Agreement(params)
        if not agreement.is_needed:
            return on_devices
        device = local(params[0]).device
        has_gradients = torch.full((), float(bool(on_devices)), device=device)
        own = torch.stack([_sum(on_devices.values(), device), has_gradients])
        any_found_inf, any_has_gradients = agreement.any(own != 0)
        # a rank with gradients need not wait to know that there are some
        if not on_devices and not any_has_gradients:
            return {}
        return {found_inf.device: any_found_inf.to(found_inf.device, found_inf.dtype)}

    def _widen(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
        halves = [param for param in params if _is_float16(param)]
        if not halves:
            return
        if not isinstance(optimizer, MasterOptimizer):
            raise hides_masters(optimizer) or _float16_error(optimizer)
        # the scale is taken out of them together with the others
        self._per_optimizer_states[id(optimizer)]["widened"] = unscale_(halves, torch.ones(()))

    def _step_fused(
        self, optimizer: Any, state: dict[str, Any], scale: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # other libraries' fused optimizers may keep masters of their own
        if loses_float16_updates(optimizer) and any(
            _is_float16(param) for group in optimizer.param_groups for param in group["params"]
        ):
            raise _float16_error(optimizer)
        grad_scale = getattr(optimizer, "grad_scale", None)
        if state["stage"] is OptState.READY:
            self._check_inf_per_device(optimizer)
            grad_scale = scale if grad_scale is None else scale * grad_scale
        found_inf = _sum(state["found_inf_per_device"].values(), scale.device)
        return fused_step(optimizer, grad_scale, found_inf, *args, **kwargs)


def _checked(new_scale: float | Tensor) -> float | Tensor:
    if not isinstance(new_scale, Tensor):
        return check_scale("new_scale", new_scale)
    if new_scale.numel() != 1:
        return new_scale
    if new_scale.device.type == "cpu":
        check_scale("new_scale", new_scale.item())
    # torch refuses a shape of (1,)
    return new_scale.reshape(())


def _at_least_float32(loss: Tensor) -> Tensor:
    return loss.float() if loss.is_floating_point() and loss.itemsize < 4 else loss


def _is_float16(param: Tensor) -> bool:
    return param.grad is not None and param.grad.dtype == torch.float16


def _wide(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _sum(flags: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for flag in flags:
        total = total + flag.to(device, non_blocking=True)
    return total


def _float16_error(optimizer: torch.optim.Optimizer) -> OptimizerError:
    return OptimizerError(
        f"Attempting to unscale FP16 gradients. {type(optimizer).__name__} keeps no FP32 masters of FP16 weights and "
        "would lose small updates; use duotone.torch.MasterWeights(optimizer), or AdamW, SGD or Lion from there, or "
        "keep the weights in FP32 and let autocast run the arithmetic in FP16"
    )
