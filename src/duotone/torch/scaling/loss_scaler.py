"""The loss scaler that lives on the device: `duotone.loss_scale` on 0-d tensors, moved by no host synchronisation.

Micikevicius et al., "Mixed precision training" (1710.03740), section 3.2. What the host has to know, whether schedulers
may advance and whether the run has collapsed, it learns by `watch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duotone.errors import LossScaleError, nearest_names
from duotone.loss_scale import LossScale, LossScaleState, init_state, select, update
from duotone.policy import Policy
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.scaling.losses import Losses
from duotone.torch.scaling.step import StepReport, find_gradients, read_gradients, step
from duotone.torch.scaling.unscale import narrow, unscale_
from duotone.torch.scaling.watch import Outcome, Watch

# calibration from 2^16 to the floor takes 16 skipped steps, and a growth into overflow one; this many is no accident
PATIENCE = 50


class LossScaler:
    """Scales losses so that FP16 gradients do not underflow, and steps optimizers with gradients so scaled.

    For a policy that needs no scaling it is the same object with a scale of 1 for ever: gradients are still checked,
    clipped, and a step with an Inf or a NaN in them is still skipped and reported.

    Args:
        policy: a policy or its text, whose `loss_scale` is taken; or `LossScale` settings.
        patience: how many steps in a row may be skipped; the last of them raises. None to skip for ever. A dynamic
            scale whose floor overflows too, right after another overflow, is given up at once.
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
        if isinstance(policy, LossScale):
            settings = policy
        else:
            policy = Policy.parse(policy)
            settings = LossScale.parse(policy.loss_scale)
        if overrides:
            known = [field.name for field in fields(LossScale)]
            for name in overrides:
                if name not in known:
                    raise LossScaleError(f'there is no setting "{name}"; {nearest_names(name, known)}')
            if not settings.is_dynamic:
                raise LossScaleError(
                    f"{', '.join(sorted(overrides))} given, but this policy does not move its loss scale; "
                    'use a policy with loss_scale=dynamic, such as "fp16"'
                )
            settings = LossScale.dynamic(**(asdict(settings) | overrides))
        if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
            raise LossScaleError(f"patience is {patience!r}; it must be a whole number from 1 on, or None")
        self.settings = settings
        self.process_group = process_group
        self._patience = patience
        self._state = init_state(settings)
        self._steps = 0
        self._losses = Losses()
        self._unscaled: dict[int, _Unscaled] = {}
        self._watch = Watch(patience)

    def __repr__(self) -> str:
        state = self._numbers()
        return f"LossScaler(loss_scale={state['scale']:g}, skipped={state['skipped']}, {self.settings})"

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

        A loss that is Inf or NaN before it is scaled is remembered: the step then leaves the scale alone. But what is
        computed from a scaled loss, a gradient penalty for instance, may overflow for the sake of the scale: after a
        loss that was scaled by this method, not by `backward`, a later one of the same step is not looked at.

        Args:
            loss: any floating-point dtype and shape.
        """
        scaled = self._scaled(loss)
        # a scale that stands at 1 makes nothing overflow
        if not self.settings.is_none:
            self._losses.give_away()
        return scaled

    def _scaled(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise LossScaleError(f"a loss must be a floating-point tensor, not {got}")
        self._move_to(loss.device)
        self._losses.add(loss, on_host=is_on_host(loss.device))
        # times 1 would be an operation there and one on the way back
        return loss.float() if self.settings.is_none else loss.float() * self._state.scale

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
        if self._unscaled:
            raise LossScaleError(
                "gradients were unscaled since the last step, and a backward pass would add scaled ones to them; call "
                "unscale_ after the last backward pass, and step after it every time, for it skips by itself"
            )
        self._scaled(loss).backward(**kwargs)

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
        if id(optimizer) in self._unscaled:
            raise LossScaleError(
                f"the gradients of this {type(optimizer).__name__} were unscaled since the last step; call unscale_ "
                "once, after the last backward pass"
            )
        ((params, grads),), agreement, device = find_gradients([optimizer], self.process_group)
        if device is None:
            return
        self._check_scaled()
        self._move_to(device)
        inverse_scale = self.loss_scale.reciprocal()
        (stats,), _ = agreement.stats([grads], lambda _, part: read_gradients(optimizer, part, inverse_scale))
        self._unscaled[id(optimizer)] = _Unscaled(stats.found_inf, unscale_(params, inverse_scale))

    def step(
        self,
        *optimizers: torch.optim.Optimizer,
        clip_norm: float | None = None,
        scheduler: Any = None,
        closure: Callable[[], Any] | None = None,
    ) -> StepReport:
        """Step optimizers with the gradients of the losses scaled since the last step; see `StepReport`.

        Raises:
            LossScaleError: a scale is in use, and no loss was scaled since the last step.
            LossScaleCollapse: one step too many was skipped; names the parameters whose gradients are not finite.
            NonFiniteLoss: the same, and the loss itself was not finite.
        """
        return step(*optimizers, scaler=self, clip_norm=clip_norm, scheduler=scheduler, closure=closure)

    def settle(self) -> None:
        """Let schedulers advance now that would learn of the last step when the next one begins; waits for the device.

        Saving a checkpoint, or this scaler's state, does it.
        """
        self._watch.settle()

    def begin_step(
        self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device, agreement: Agreement
    ) -> Tensor:
        """Return the scale that the gradients carry, FP32, 0-d, on `device`; for the step to call."""
        self._check_scaled()
        if not self._unscaled.keys() <= set(map(id, optimizers)):
            raise LossScaleError(
                "unscale_ was called for an optimizer that is not among these; give all optimizers of a step to one "
                "call"
            )
        self._watch.settle()
        if not is_on_host(device):
            self._watch.check(self.settings, optimizers, agreement)
        self._move_to(device)
        return self.loss_scale

    def found_inf_before(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Return what `unscale_` found, bool, 0-d, or None; for the step to call."""
        unscaled = self._unscaled.get(id(optimizer))
        return None if unscaled is None else unscaled.found_inf

    def loss_is_not_finite(self, device: torch.device) -> Tensor:
        """Return whether a loss since the last step was Inf or NaN, bool, 0-d; for the step to call."""
        return self._losses.is_bad(device)

    def no_step(self, agreement: Agreement) -> Tensor:
        """Forget the losses that left no gradient behind, and return the scale; for the step to call.

        Gradients in which `unscale_` found an Inf or a NaN, and that were let go since, move the scale all the same.
        """
        carried = self.loss_scale
        if self._unscaled:
            self._let_go(torch.stack([each.found_inf for each in self._unscaled.values()]).any(), agreement)
        self._forget_losses()
        return carried

    def end_step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        agreement: Agreement,
        found_inf: Sequence[Tensor],
        loss_is_not_finite: Tensor | None,
        scheduler: Any,
    ) -> None:
        """Let the scale react to a step: once, after every optimizer; for the step to call.

        Args:
            optimizers: all of them.
            agreement: of the ranks.
            found_inf: of each optimizer, bool, 0-d.
            loss_is_not_finite: on any rank, bool, 0-d; None for as on this one.
            scheduler: one or several, or None.
        """
        carried = self._state.scale
        device = found_inf[0].device
        on_host = is_on_host(device)
        bad_loss: Any = self._losses.first_bad(device, on_host=on_host)
        if on_host:
            each: list[Any] = [flag.item() for flag in found_inf]
            bad: Any = bad_loss != 0 if loss_is_not_finite is None else loss_is_not_finite.item()
            any_found, finite, where = any(each), not bad, select
        else:
            each = list(found_inf)
            bad = self.loss_is_not_finite(device) if loss_is_not_finite is None else loss_is_not_finite
            any_found, finite, where = torch.stack(each).any(), ~bad, torch.where
        # ranks that do not know of each other see the same gradients, but not whose loss it was
        if not agreement.is_known:
            finite = True
        self._state = update(self.settings, self._state, any_found, loss_is_finite=finite, where=where)
        self._steps += 1
        outcome = Outcome(self._steps, carried, self._state.skipped_in_a_row, bad_loss, bad, each)
        self._forget_losses()
        self._watch.follow(outcome, scheduler, optimizers)
        if on_host:
            self._watch.check(self.settings, optimizers, agreement)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state in Python numbers, ready for JSON; waits for the device."""
        self.settle()
        return {"settings": asdict(self.settings), "state": self._numbers(), "steps": self._steps}

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
        self.settings, self._state, self._steps = settings, state, steps
        # gradients that are there carry another scale
        self._forget_losses()
        self._watch = Watch(self._patience)

    def __getstate__(self) -> dict[str, Any]:
        if self._unscaled:
            raise LossScaleError("gradients are unscaled and the step is still to come; copy or pickle after the step")
        self.settle()
        # who the other ranks are does not go into a file
        return {**self.__dict__, "process_group": None, "_watch": Watch(self._patience)}

    def _check_scaled(self) -> None:
        if not self.settings.is_none and self._losses.count == 0:
            raise LossScaleError(
                "no loss was scaled since the last step, so the gradients carry no loss scale; use "
                "scaler.backward(loss), or scaler.scale(loss).backward(). Optimizers that share a loss step in one "
                "call, scaler.step(first, second)"
            )

    def _let_go(self, found_inf: Tensor, agreement: Agreement) -> None:
        """Let the scale react to gradients that were let go by hand: to an overflow alone, for nothing was stepped."""
        on_host = is_on_host(found_inf.device)
        flag: Any = found_inf.item() if on_host else found_inf
        bad = self.loss_is_not_finite(found_inf.device)
        finite, where = (not bad.item(), select) if on_host else (~bad, torch.where)
        finite = finite if agreement.is_known else True
        moved = update(self.settings, self._state, flag, loss_is_finite=finite, where=where)
        leaves = {name: where(flag, value, getattr(self._state, name)) for name, value in vars(moved).items()}
        self._state = LossScaleState(**leaves)

    def _forget_losses(self) -> None:
        for unscaled in self._unscaled.values():
            narrow(unscaled.widened)
        self._losses, self._unscaled = Losses(), {}

    def _move_to(self, device: torch.device) -> None:
        """Have the state on a device: on the host in Python numbers, which torch takes many times as long to change."""
        scale = self._state.scale
        if is_on_host(device):
            if isinstance(scale, Tensor):
                self._state = LossScaleState(**self._numbers())
        elif not isinstance(scale, Tensor) or scale.device != device:
            # a loss of an evaluation must not leave a scale that no loss of the training can be multiplied by
            with torch.inference_mode(False):
                leaves = {
                    name: torch.as_tensor(value, dtype=torch.float32 if name == "scale" else torch.int32, device=device)
                    for name, value in vars(self._state).items()
                }
            self._state = LossScaleState(**leaves)

    def _numbers(self) -> dict[str, Any]:
        """Return the state's leaves as Python numbers; waits for the device."""
        return {name: torch.as_tensor(value).item() for name, value in vars(self._state).items()}


class _Unscaled(NamedTuple):
    """What was found in an optimizer's gradients ahead of the step, and which of them are FP32 until after it."""

    found_inf: Tensor
    widened: list[Tensor]


def is_on_host(device: torch.device) -> bool:
    """Return whether what is on a device can be read without waiting.

    >>> is_on_host(torch.device("cpu"))
    True
    """
    return device.type == "cpu"


def _as_tensor(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device="cpu")
