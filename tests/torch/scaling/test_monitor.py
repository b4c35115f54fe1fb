"""What the host does with outcomes: with numbers at once, with tensors one step later."""

import math
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, LossScaleCollapse, NonFiniteLoss
from duotone.loss_scale import LossScale
from duotone.torch.scaling.monitor import StepMonitor
from duotone.torch.scaling.outcome import Outcome
from duotone.torch.scaling.schedulers import schedules_of

FLOOR = LossScale(init_scale=4.0, min_scale=4.0)


def outcome(step, *, on_device, scale=8.0, in_a_row=0, non_finite_loss=0, any_non_finite_loss=None, each=(False,)):
    """Return an outcome in Python numbers, or in tensors but for the step."""
    any_non_finite_loss = bool(non_finite_loss) if any_non_finite_loss is None else any_non_finite_loss
    values = (scale, in_a_row, non_finite_loss, any_non_finite_loss)
    if on_device:
        return Outcome(step, *map(torch.tensor, values), list(map(torch.tensor, each)))
    return Outcome(step, *values, list(each))


def record(monitor, outcome, schedulers, optimizers):
    monitor.record(outcome, schedules_of(schedulers, optimizers), optimizers)


def optimizer_with(grad=1.0, kind=dt.SGD):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full_like(parameter, grad)
    return kind([parameter], lr=1.0)


class Counter:
    steps = 0

    def step(self):
        self.steps += 1


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def rates(*optimizers):
    return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_scheduler_advances_once_for_each_step_that_was_not_skipped(on_device):
    optimizer, monitor, seen = optimizer_with(), StepMonitor(None), []
    scheduler = halving(optimizer)
    skips = [False, True, True, False, False]
    for step, skipped in enumerate(skips, 1):
        monitor.drain()
        seen += rates(optimizer)
        record(
            monitor, outcome(step, on_device=on_device, in_a_row=int(skipped), each=[skipped]), scheduler, [optimizer]
        )
    # on a device or not, a drain before the next update gives it the same rate
    assert seen == [1.0, 0.5, 0.5, 0.5, 0.25]
    assert rates(optimizer) == [0.25 if on_device else 0.125]
    for _ in range(2):
        monitor.drain()
        assert rates(optimizer) == [0.125]


@pytest.mark.parametrize("on_device", [False, True])
def test_each_scheduler_goes_by_its_own_optimizer(on_device):
    wrapped = dt.MasterWeights(optimizer_with(kind=torch.optim.SGD))
    plain, skipping = optimizer_with(), optimizer_with()
    optimizers = [plain, skipping, wrapped]
    schedulers = [halving(plain), halving(skipping), halving(wrapped.optimizer), halving(wrapped)]
    monitor = StepMonitor(None)
    record(monitor, outcome(1, on_device=on_device, in_a_row=1, each=[False, True, False]), schedulers, optimizers)
    monitor.drain()
    assert rates(*optimizers) == [0.5, 1.0, 0.25]
    record(
        monitor, outcome(2, on_device=on_device, in_a_row=1, each=[True, False, True]), tuple(schedulers), optimizers
    )
    monitor.drain()
    assert rates(*optimizers) == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_scheduler_of_nobody_known_waits_for_all_optimizers(skipped):
    counter, monitor = Counter(), StepMonitor(None)
    optimizers = [optimizer_with(), optimizer_with()]
    record(monitor, outcome(1, on_device=False, in_a_row=int(skipped), each=[False, skipped]), counter, optimizers)
    assert counter.steps == (not skipped)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_loss_that_is_not_finite_is_warned_of_once_in_a_row(on_device):
    monitor = StepMonitor(None)
    # b is a step with a bad loss, . one without
    messages = []
    for step, kind in enumerate("bb.b.", 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bad = 2 if kind == "b" else 0
            record(
                monitor,
                outcome(step, on_device=on_device, non_finite_loss=bad, in_a_row=bad, each=[bool(bad)]),
                None,
                [],
            )
            monitor.drain()
        assert {each.category for each in caught} <= {DuotoneWarning}
        messages.append([str(each.message) for each in caught])
    assert [len(each) for each in messages] == [1, 0, 0, 1, 0]
    assert messages[3][0].startswith("loss 2 of step 4 is not finite: that is the forward pass")


@pytest.mark.parametrize(
    ("details", "text"),
    [
        (
            {"non_finite_loss": 1, "in_a_row": 1},
            "loss 1 of step 7 is not finite: .* stays as it is, the step was skipped; said once",
        ),
        ({"non_finite_loss": 1, "in_a_row": 0}, "loss 1 of step 7 is not finite: .* stays as it is; said once"),
        ({"any_non_finite_loss": True, "in_a_row": 1}, "a loss of step 7 on another rank is not finite"),
    ],
)
def test_the_warning_names_the_loss_and_what_became_of_the_step(details, text):
    with pytest.warns(DuotoneWarning, match=text):
        record(StepMonitor(None), outcome(7, on_device=False, **details), None, [])


# patience, what the last step was like, and whether the run ends
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("patience", "settings", "details", "error"),
    [
        (3, LossScale(), {"in_a_row": 2}, None),
        (3, LossScale(), {"in_a_row": 3}, LossScaleCollapse),
        (3, LossScale(), {"in_a_row": 4}, LossScaleCollapse),
        (3, LossScale(), {"in_a_row": 0}, None),
        (1, LossScale(), {"in_a_row": 1}, LossScaleCollapse),
        (3, LossScale.static(8.0), {"in_a_row": 3}, LossScaleCollapse),
        (None, LossScale(), {"in_a_row": 1000}, None),
        # at the floor one overflow may be chance
        (50, FLOOR, {"in_a_row": 1, "scale": 4.0}, None),
        (50, FLOOR, {"in_a_row": 2, "scale": 4.0}, LossScaleCollapse),
        (50, FLOOR, {"in_a_row": 2, "scale": 8.0}, None),
        (None, FLOOR, {"in_a_row": 2, "scale": 4.0}, None),
        # a scale that stands still is at no floor
        (50, LossScale.none(), {"in_a_row": 2, "scale": 1.0}, None),
        # a bad loss says nothing of the scale, at the floor neither
        (3, FLOOR, {"in_a_row": 2, "scale": 4.0, "non_finite_loss": 1}, None),
        (3, LossScale(), {"in_a_row": 3, "non_finite_loss": 1}, NonFiniteLoss),
        (3, LossScale(), {"in_a_row": 3, "any_non_finite_loss": True}, NonFiniteLoss),
        (None, LossScale(), {"in_a_row": 3, "non_finite_loss": 1}, None),
    ],
)
@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_when_a_run_ends(on_device, patience, settings, details, error):
    monitor, optimizers = StepMonitor(patience), [optimizer_with(math.inf)]
    monitor.check(settings, optimizers, None)
    if details["in_a_row"] > 1:
        before = {"in_a_row": details["in_a_row"] - 1, "scale": details.get("scale", 8.0)}
        record(monitor, outcome(8, on_device=False, each=[True], **before), None, optimizers)
        with suppress(LossScaleCollapse):
            monitor.check(settings, optimizers, None)
    record(monitor, outcome(9, on_device=on_device, each=[details["in_a_row"] > 0], **details), None, optimizers)
    if on_device:
        # nothing has arrived
        monitor.check(settings, optimizers, None)
    monitor.drain()
    if error is None:
        monitor.check(settings, optimizers, None)
    else:
        with pytest.raises(error, match=f"^{details['in_a_row']} steps in a row were skipped"):
            monitor.check(settings, optimizers, None)
        # a run that goes on in spite of it is stopped by the next step, not by this one again
        monitor.check(settings, optimizers, None)


def test_the_step_that_led_to_the_floor_is_no_overflow_at_it():
    # a search for the scale goes there at once
    monitor, optimizers = StepMonitor(50), [optimizer_with(math.inf)]
    for step, scale in enumerate((8.0, 4.0, 4.0), 1):
        record(monitor, outcome(step, on_device=False, in_a_row=step, each=[True], scale=scale), None, optimizers)
        if step < 3:
            monitor.check(FLOOR, optimizers, None)
    with pytest.raises(LossScaleCollapse, match=r"^3 steps in a row were skipped"):
        monitor.check(FLOOR, optimizers, None)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_skip_for_a_non_finite_loss_is_no_overflow_before_one_at_the_floor():
    monitor, optimizers = StepMonitor(50), [optimizer_with(math.inf)]
    record(monitor, outcome(1, on_device=False, in_a_row=1, each=[True], non_finite_loss=1), None, optimizers)
    record(monitor, outcome(2, on_device=False, in_a_row=2, each=[True], scale=4.0), None, optimizers)
    monitor.check(FLOOR, optimizers, None)
    record(monitor, outcome(3, on_device=False, in_a_row=3, each=[True], scale=4.0), None, optimizers)
    with pytest.raises(LossScaleCollapse):
        monitor.check(FLOOR, optimizers, None)


def test_a_run_that_has_recovered_one_step_late_goes_on():
    monitor, optimizers = StepMonitor(2), [optimizer_with(1.0)]
    record(monitor, outcome(2, on_device=True, in_a_row=2, each=[True]), None, optimizers)
    monitor.drain()
    monitor.check(LossScale(), optimizers, None)
