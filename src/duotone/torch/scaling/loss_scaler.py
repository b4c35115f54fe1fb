"""The loss scaler: losses are multiplied by a scale, and steps take it out again, without waiting for the device.

Micikevicius et al., "Mixed precision training" (1710.03740), section 3.2. The scale itself is in `device_scale`, what
happens to gradients in `step`, and what the host does with the outcome in `monitor`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from duotone.errors import LossScaleError, nearest_names
from duotone.loss_scale import LossScale, LossScaleState
from duotone.policy import Policy
from duotone.torch.internals.autograd import VERSION
from duotone.torch.near_misses import OF_SCALER, missing
from duotone.torch.parameters.plain_steps import watch_plain_steps
from duotone.torch.parameters.scaled_losses import Scaled, gradient_of, scaled_losses
from duotone.torch.scaling.device_scale import DeviceScale, initial_scale
from duotone.torch.scaling.loop_check import FEWEST, LoopCheck
from duotone.torch.scaling.losses import Losses
from duotone.torch.scaling.monitor import StepMonitor
from duotone.torch.scaling.outcome import Outcome
from duotone.torch.scaling.schedulers import Schedule, schedules_of
from duotone.torch.scaling.step import Step, StepReport, check_arguments
from duotone.torch.scaling.unscale import narrow, unscale_

# from 2^32 to the floor it takes 32 skipped steps, and a growth into overflow one; this many is no accident
PATIENCE = 50


class LossScaler:
    """Scales losses so that FP16 gradients do not underflow, and steps optimizers with gradients so scaled.

    For a policy that needs no scaling it is the same object with a scale of 1 for ever: gradients are still checked,
    clipped, and a step with an Inf or a NaN in them is still skipped and reported.

    Args:
        policy: a policy or its text, whose `loss_scale` is taken; or `LossScale` settings.
        patience: how many steps in a row may be skipped; the last of them raises. None to skip for ever. A dynamic
            scale at whose floor two steps in a row overflow is given up at once.
        process_group: the ranks that agree on every step, where parameters do not tell: those of `fully_shard` and
            `data_parallel` do.
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

    def __init__(
        self,
        policy: Policy | str | LossScale,
        *,
        patience: int | None = PATIENCE,
        process_group: Any = None,
        **overrides: Any,
    ) -> None:
        if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
            raise LossScaleError(f"patience is {patience!r}; it must be a whole number from 1 on, or None")
        self.process_group = process_group
        self._patience = patience
        self._scale = initial_scale(_settings_of(policy, overrides))
        # asked for in every backward pass
        self._scales = not self._scale.settings.is_none
        self._steps = 0
        self._losses = Losses()
        # what unscale_ found, by the id of the optimizer, and the parameters whose gradients are FP32 until the step
        self._found_inf_ahead: dict[int, Tensor] = {}
        self._widened: list[Tensor] = []
        self._monitor = StepMonitor(patience)
        self._loop = LoopCheck(looks_for_clipping=self._scales)
        watch_plain_steps()

    def __repr__(self) -> str:
        state = self._scale.numbers()
        return f"LossScaler(loss_scale={state['scale']:g}, skipped={state['skipped']}, {self.settings})"

    @property
    def settings(self) -> LossScale:
        """How the scale moves."""
        return self._scale.settings

    @property
    def loss_scale(self) -> Tensor:
        """The factor of the next loss, FP32, 0-d, on the device of the last loss; reading its value waits for it."""
        return self._scale.tensor("scale")

    @property
    def skipped(self) -> Tensor:
        """Number of steps skipped in all, int32, 0-d, on the device."""
        return self._scale.tensor("skipped")

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Number of steps skipped since the last one that was not, int32, 0-d, on the device."""
        return self._scale.tensor("skipped_in_a_row")

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss in FP32 times the scale: where nothing is scaled, an FP32 loss itself.

        After a loss that is Inf or NaN before it is scaled, the step leaves the scale alone. But what is computed from
        a scaled loss, a gradient penalty for instance, may overflow because of the scale: after a loss that was scaled
        by this method, not by `backward`, later ones of the same step are not checked.

        Args:
            loss: any floating-point dtype and shape.
        """
        scaled = self._scaled(loss)
        # a scale that stands at 1 makes nothing overflow
        if self._scales:
            self._losses.ignore_later()
        return scaled

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Scale a loss and run its backward pass; call it once for each micro-batch.

        Args:
            loss: a tensor of one element. Divide it by the number of micro-batches if there are several.
            kwargs: of `Tensor.backward`, such as `retain_graph`.

        Raises:
            LossScaleError: the loss has more than one element, or none; or gradients were unscaled since the last
                step, so that scaled ones would be added to true ones.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise LossScaleError(f"the loss has shape {tuple(loss.shape)}, not one element; take its mean or its sum")
        if self._found_inf_ahead:
            raise LossScaleError(
                "gradients were unscaled since the last step, and a backward pass would add scaled ones to them; call "
                "unscale_ after the last backward pass, and step after it every time, for it skips by itself"
            )
        self._scaled(loss).backward(**kwargs)
        if self._scales and not torch.compiler.is_compiling():
            # an optimizer's own step is known by it for one with scaled gradients
            scaled_losses[id(self)] = Scaled(ref(loss), gradient_of(loss), ref(self))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimizer's gradients true, in place, to look at them or change them before the step.

        Call it once per step, after the last backward pass. FP16 gradients are FP32 from here until after the step.
        The step needs none of this: `clip_norm=` clips the true gradient without it.

        Raises:
            LossScaleError: they are true already, or no loss was scaled since the last step.
            OptimizerError: as in `step`.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaler = LossScaler("fp16")
        >>> scaler.backward((weight * torch.tensor([3.0, 4.0])).sum())
        >>> scaler.unscale_(optimizer)
        >>> torch.nn.utils.clip_grad_norm_([weight], 1.0)
        tensor(5.)
        >>> scaler.step(optimizer).skipped, weight
        (tensor(False), Parameter containing:
        tensor([-0.6000, -0.8000], requires_grad=True))
        """
        if id(optimizer) in self._found_inf_ahead:
            raise LossScaleError(
                f"the gradients of this {type(optimizer).__name__} were unscaled since the last step; call unscale_ "
                "once, after the last backward pass"
            )
        step = Step([optimizer], {}, self.process_group)
        if not step.has_gradients:
            return
        self._check_scaled()
        self._scale = self._scale.to(step.device)
        scaled_losses.pop(id(self), None)
        inverse_scale = self.loss_scale.reciprocal()
        step.read(inverse_scale)
        (part,) = step.parts
        self._widened += unscale_(part.params, inverse_scale)
        self._found_inf_ahead[id(optimizer)] = part.found_inf

    def step(
        self,
        *optimizers: torch.optim.Optimizer,
        clip_norm: float | None = None,
        scheduler: Any = None,
        closure: Callable[[], Any] | None = None,
    ) -> StepReport:
        """Unscale, clip and update, or skip; then let the loss scale react.

        Args:
            optimizers: one or more; each is clipped by its own norm and skips by its own gradients. Torch's own are
                taken too: a fused one skips on the device, any other makes the host wait.
            clip_norm: the largest norm of the true gradient that an optimizer sees; None for no clipping.
            scheduler: a learning-rate scheduler, or several, to advance if their optimizer did not skip. On an
                accelerator they do when the next step begins, before it updates: every update has the right learning
                rate, and the device is not waited for. `drain` has them advance now.
            closure: computes the loss and gives it to `backward`; called once, before anything else, with gradients
                enabled.

        Returns:
            A `StepReport` of what the step did, in device scalars. Without a single gradient nothing is done at
            all, and the norm is 0; only an overflow that `unscale_` found before the gradients were let go counts as
            skipped, and moves the scale.

        Raises:
            OptimizerError: no optimizer, or one twice; a `clip_norm` that is not positive; a scheduler of another
                optimizer, or one that advances by a metric; an optimizer that needs to call a closure several times;
                16-bit weights in an optimizer that keeps no masters of them; a weight in two optimizers, one of which
                would unscale its gradient for both; or gradients on several devices.
            LossScaleError: a scale is in use, and no loss was scaled since the last step.
            LossScaleCollapse: one step too many was skipped; names the parameters whose gradients are not finite.
            NonFiniteLoss: the same, and the loss itself was not finite.
        """
        check_arguments(optimizers, clip_norm)
        schedules = schedules_of(scheduler, optimizers)
        if closure is not None:
            with torch.enable_grad():
                closure()
        step = Step(optimizers, self._found_inf_ahead, self.process_group)
        if not step.has_gradients:
            report = step.report_without_gradients(self.loss_scale)
            self._end_without_gradients(step)
            return report
        self._begin(step)
        if not self._loop.known.issuperset(map(id, optimizers)):
            self._loop.look_at(optimizers, self.settings)
        # as it is now, for it moves in place
        loss_scale = self._scale.state.scale if self._scale.on_host else self.loss_scale
        # alone, a rank knows its losses
        own = self._losses.any_non_finite(step.device) if step.agreement.is_needed else None
        non_finite_loss = step.read(self._scale.inverse(), own)
        losses, first = self._losses.count, step.parts[0]
        if losses >= FEWEST:
            self._loop.say_if_sums_are_rounded(losses, first.grads)
        written = getattr(first.grads[0], VERSION, 0) if first.grads else 0
        if written >= losses and self._loop.looks_for_clipping and first.found_inf_ahead is None:
            # more was written into it than the sums of the losses' gradients
            scaled_norm = torch.as_tensor(first.sum_of_squares, device=step.device).sqrt() * loss_scale
            self._loop.look_for_clipping(scaled_norm, first.grads, on_host=self._scale.on_host)
        for part in step.parts:
            part.update(clip_norm)
        self._end(step, loss_scale, non_finite_loss, schedules)
        return step.report(loss_scale)

    def drain(self) -> None:
        """Wait for the last step, and advance the schedulers that otherwise would when the next one begins.

        Saving a checkpoint, or this scaler's state, does it.
        """
        self._monitor.drain()

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state in Python numbers, ready for JSON; waits for the device."""
        self.drain()
        return {"settings": asdict(self.settings), "state": self._scale.numbers(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            LossScaleError: keys are missing or unknown, or a setting or the scale is out of range. Nothing is
                loaded then.
        """
        try:
            settings = LossScale(**state_dict["settings"])
            state = LossScaleState(**state_dict["state"])
            steps = int(state_dict.get("steps", 0))
        except (KeyError, TypeError, ValueError) as error:
            why = f"it has no {error}; a GradScaler's goes into a GradScaler" if type(error) is KeyError else error
            raise LossScaleError(f"this is not the state of a LossScaler: {why}") from error
        # whatever holds for a scale to begin with holds for every later one
        replace(settings, init_scale=state.scale)
        if not settings.is_dynamic and state.scale != settings.init_scale:
            raise LossScaleError(f"the scale is {state.scale}, but by its settings it stays at {settings.init_scale}")
        self._scale, self._steps = DeviceScale(settings, state), steps
        # gradients that are there carry another scale
        self._forget_losses()
        self._monitor = StepMonitor(self._patience)
        self._scales = not settings.is_none
        self._loop = LoopCheck(looks_for_clipping=self._scales)

    def __getstate__(self) -> dict[str, Any]:
        if self._found_inf_ahead:
            raise LossScaleError("gradients are unscaled and the step is still to come; copy or pickle after the step")
        self.drain()
        # who the other ranks are does not go into a file
        return {
            **self.__dict__,
            "process_group": None,
            "_scale": self._scale.copy(),
            "_monitor": StepMonitor(self._patience),
            "_loop": LoopCheck(looks_for_clipping=self._scales),
        }

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(missing("a LossScaler", name, OF_SCALER, dir(type(self))))

    def _scaled(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise LossScaleError(f"a loss must be a floating-point tensor, not {got}")
        self._scale = self._scale.to(loss.device)
        self._losses.add(loss, on_host=self._scale.on_host)
        # times 1 would be an operation there and one on the way back
        if not self._scales:
            return loss.float()
        scaled_losses[id(self)] = Scaled(ref(loss), None, ref(self))
        return loss.float() * self._scale.state.scale

    def _check_scaled(self) -> None:
        if self._scales and self._losses.count == 0:
            raise LossScaleError(
                "no loss was scaled since the last step, so the gradients carry no loss scale; use "
                "scaler.backward(loss), or scaler.scale(loss).backward(). Optimizers that share a loss step in one "
                "call, scaler.step(first, second)"
            )

    def _begin(self, step: Step) -> None:
        self._check_scaled()
        scaled_losses.pop(id(self), None)
        if not self._found_inf_ahead.keys() <= set(map(id, step.optimizers)):
            raise LossScaleError(
                "unscale_ was called for an optimizer that is not among these; give all optimizers of a step to one "
                "call"
            )
        self._monitor.drain()
        self._scale = self._scale.to(step.device)
        if not self._scale.on_host:
            if self._monitor.is_settled:
                self._scale = self._scale.settled()
            self._monitor.check(self._scale.settings, step.optimizers, step.agreement)

    def _end(self, step: Step, loss_scale: Any, non_finite_loss: Any, schedules: Sequence[Schedule]) -> None:
        """Let the scale react to a step: once, after every optimizer.

        Args:
            step: in which all optimizers have updated or skipped.
            loss_scale: what its losses were multiplied by.
            non_finite_loss: whether a loss is Inf or NaN on any rank, a bool or 0-d; None if there are no others.
            schedules: to advance.
        """
        on_host = self._scale.on_host
        skipped_each = [part.skips for part in step.parts]
        first: Any = self._losses.first_non_finite(step.device, on_host=on_host)
        any_non_finite: Any = first != 0 if non_finite_loss is None else non_finite_loss
        # ranks that do not know of each other see the same gradients, but not whose loss it was
        loss_is_finite = any_non_finite == 0 if step.agreement.is_known else True
        self._scale = self._scale.after_step(reduce(or_, skipped_each), loss_is_finite)
        self._steps += 1
        state = self._scale.state
        in_a_row, search = state.skipped_in_a_row, state.search
        outcome = Outcome(self._steps, loss_scale, in_a_row, first, any_non_finite, skipped_each, search)
        self._forget_losses()
        self._monitor.record(outcome, schedules, step.optimizers)
        if on_host:
            self._monitor.check(self._scale.settings, step.optimizers, step.agreement)

    def _end_without_gradients(self, step: Step) -> None:
        """Let the scale react to an overflow that `unscale_` found in gradients that were let go since."""
        if self._found_inf_ahead:
            any_found_inf = torch.stack(list(self._found_inf_ahead.values())).any()
            device = any_found_inf.device
            self._scale = self._scale.to(device)
            found_inf = self._scale.leaf(any_found_inf)
            non_finite = self._scale.leaf(self._losses.any_non_finite(device))
            self._scale = self._scale.after_overflow(found_inf, non_finite == 0 if step.agreement.is_known else True)
        self._forget_losses()

    def _forget_losses(self) -> None:
        scaled_losses.pop(id(self), None)
        if self._widened:
            narrow(self._widened)
        self._losses, self._found_inf_ahead, self._widened = Losses(), {}, []


def _settings_of(policy: Policy | str | LossScale, overrides: dict[str, Any]) -> LossScale:
    settings = policy if isinstance(policy, LossScale) else LossScale.parse(Policy.parse(policy).loss_scale)
    known = [field.name for field in fields(LossScale)]
    for name in overrides:
        if name not in known:
            raise LossScaleError(f'there is no setting "{name}"; {nearest_names(name, known)}')
    if overrides and not settings.is_dynamic:
        raise LossScaleError(
            f"{', '.join(sorted(overrides))} given, but this policy does not move its loss scale; "
            'use a policy with loss_scale=dynamic, such as "fp16"'
        )
    return replace(settings, **overrides)
