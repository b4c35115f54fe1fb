"""What the host learns of steps: at once from numbers, one step late from tensors; schedulers, warnings and the end."""

import math
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, LossScaleCollapse, NonFiniteLoss, OptimizerError
from duotone.loss_scale import LossScale
from duotone.torch.scaling.watch import Outcome, Watch, places_of

FLOOR = LossScale(init_scale=4.0, min_scale=4.0)


def outcome(step, *, late, scale=8.0, in_a_row=0, bad_loss=0, anywhere=None, each=(False,)):
    """Return an outcome in Python numbers, or in tensors but for the step."""
    anywhere = bool(bad_loss) if anywhere is None else anywhere
    values = (scale, in_a_row, bad_loss, anywhere)
    if late:
        return Outcome(step, *map(torch.tensor, values), list(map(torch.tensor, each)))
    return Outcome(step, *values, list(each))


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


@pytest.mark.parametrize("late", [False, True])
def test_a_scheduler_advances_once_for_each_step_that_was_not_skipped(late):
    optimizer, watch, seen = optimizer_with(), Watch(None), []
    scheduler = halving(optimizer)
    skips = [False, True, True, False, False]
    for step, skipped in enumerate(skips, 1):
        watch.settle()
        seen += rates(optimizer)
        watch.follow(outcome(step, late=late, in_a_row=int(skipped), each=[skipped]), scheduler, [optimizer])
    # late or not, whoever settles before the next update has the same rate for it
    assert seen == [1.0, 0.5, 0.5, 0.5, 0.25]
    assert rates(optimizer) == [0.25 if late else 0.125]
    for _ in range(2):
        watch.settle()
        assert rates(optimizer) == [0.125]


@pytest.mark.parametrize("late", [False, True])
def test_each_scheduler_goes_by_its_own_optimizer(late):
    wrapped = dt.MasterWeights(optimizer_with(kind=torch.optim.SGD))
    plain, skipping = optimizer_with(), optimizer_with()
    optimizers = [plain, skipping, wrapped]
    schedulers = [halving(plain), halving(skipping), halving(wrapped.optimizer), halving(wrapped)]
    watch = Watch(None)
    watch.follow(outcome(1, late=late, in_a_row=1, each=[False, True, False]), schedulers, optimizers)
    watch.settle()
    assert rates(*optimizers) == [0.5, 1.0, 0.25]
    watch.follow(outcome(2, late=late, in_a_row=1, each=[True, False, True]), tuple(schedulers), optimizers)
    watch.settle()
    assert rates(*optimizers) == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_scheduler_of_nobody_known_waits_for_all_optimizers(skipped):
    counter, watch = Counter(), Watch(None)
    optimizers = [optimizer_with(), optimizer_with()]
    watch.follow(outcome(1, late=False, in_a_row=int(skipped), each=[False, skipped]), counter, optimizers)
    assert counter.steps == (not skipped)


def test_one_several_or_no_schedulers():
    optimizer = optimizer_with()
    first, second = halving(optimizer), halving(optimizer)
    assert places_of(None, [optimizer]) == []
    assert places_of(first, [optimizer]) == [(0, first)]
    for several in ([first, second], (first, second)):
        assert places_of(several, [optimizer_with(), optimizer]) == [(1, first), (1, second)]
    counter = Counter()
    assert places_of(counter, [optimizer]) == [(None, counter)]
    for wrong in (object(), "cosine", iter([first]), {first}):
        with pytest.raises(OptimizerError, match=r"a scheduler has a method step\(\), but "):
            places_of(wrong, [optimizer])
    with pytest.raises(OptimizerError, match=r"ReduceLROnPlateau advances by a figure of its own; call its step"):
        places_of([first, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)], [optimizer])


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_is_not_finite_is_said_once_in_a_row(late):
    watch = Watch(None)
    # b is a step with a bad loss, . one without
    said = []
    for step, kind in enumerate("bb.b.", 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bad = 2 if kind == "b" else 0
            watch.follow(outcome(step, late=late, bad_loss=bad, in_a_row=bad, each=[bool(bad)]), None, [])
            watch.settle()
        assert {each.category for each in caught} <= {DuotoneWarning}
        said.append([str(each.message) for each in caught])
    assert [len(each) for each in said] == [1, 0, 0, 1, 0]
    assert said[3][0].startswith("loss 2 of step 4 is not finite: that is the forward pass")


@pytest.mark.parametrize(
    ("details", "text"),
    [
        (
            {"bad_loss": 1, "in_a_row": 1},
            "loss 1 of step 7 is not finite: .* stays as it is, the step was skipped; said once",
        ),
        ({"bad_loss": 1, "in_a_row": 0}, "loss 1 of step 7 is not finite: .* stays as it is; said once"),
        ({"anywhere": True, "in_a_row": 1}, "a loss of step 7 on another rank is not finite"),
    ],
)
def test_it_is_said_where_the_loss_was_and_what_became_of_the_step(details, text):
    with pytest.warns(DuotoneWarning, match=text):
        Watch(None).follow(outcome(7, late=False, **details), None, [])


# patience, what the last step was like, and whether the run ends
@pytest.mark.parametrize("late", [False, True])
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
        (3, FLOOR, {"in_a_row": 2, "scale": 4.0, "bad_loss": 1}, None),
        (3, LossScale(), {"in_a_row": 3, "bad_loss": 1}, NonFiniteLoss),
        (3, LossScale(), {"in_a_row": 3, "anywhere": True}, NonFiniteLoss),
        (None, LossScale(), {"in_a_row": 3, "bad_loss": 1}, None),
    ],
)
@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_when_a_run_ends(late, patience, settings, details, error):
    watch, optimizers = Watch(patience), [optimizer_with(math.inf)]
    watch.check(settings, optimizers, None)
    if details["in_a_row"] > 1:
        watch.follow(outcome(8, late=False, in_a_row=details["in_a_row"] - 1, each=[True]), None, optimizers)
        with suppress(LossScaleCollapse):
            watch.check(settings, optimizers, None)
    watch.follow(outcome(9, late=late, each=[details["in_a_row"] > 0], **details), None, optimizers)
    if late:
        # nothing has arrived
        watch.check(settings, optimizers, None)
    watch.settle()
    if error is None:
        watch.check(settings, optimizers, None)
    else:
        with pytest.raises(error, match=f"^{details['in_a_row']} steps in a row were skipped"):
            watch.check(settings, optimizers, None)
        # whoever goes on in spite of it is stopped by the next step, not by this one again
        watch.check(settings, optimizers, None)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_skip_for_a_bad_loss_is_no_overflow_before_one_at_the_floor():
    watch, optimizers = Watch(50), [optimizer_with(math.inf)]
    watch.follow(outcome(1, late=False, in_a_row=1, each=[True], bad_loss=1), None, optimizers)
    watch.follow(outcome(2, late=False, in_a_row=2, each=[True], scale=4.0), None, optimizers)
    watch.check(FLOOR, optimizers, None)
    watch.follow(outcome(3, late=False, in_a_row=3, each=[True], scale=4.0), None, optimizers)
    with pytest.raises(LossScaleCollapse):
        watch.check(FLOOR, optimizers, None)


def test_a_run_that_has_recovered_one_step_late_goes_on():
    watch, optimizers = Watch(2), [optimizer_with(1.0)]
    watch.follow(outcome(2, late=True, in_a_row=2, each=[True]), None, optimizers)
    watch.settle()
    watch.check(LossScale(), optimizers, None)
