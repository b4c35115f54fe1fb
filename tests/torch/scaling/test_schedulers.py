"""Which optimizer of a step a scheduler belongs to, and which schedulers advance."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.scaling.schedulers import Schedule, advance, schedules_of


class Counter:
    steps = 0

    def step(self):
        self.steps += 1


def sgd():
    return dt.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_one_several_or_no_schedulers():
    optimizer = sgd()
    first, second = halving(optimizer), halving(optimizer)
    assert schedules_of(None, [optimizer]) == []
    assert schedules_of(first, [optimizer]) == [(first, 0)]
    for several in ([first, second], (first, second)):
        assert schedules_of(several, [sgd(), optimizer]) == [(first, 1), (second, 1)]
    counter = Counter()
    assert schedules_of(counter, [optimizer]) == [(counter, None)]
    for wrong in (object(), "cosine", iter([first]), {first}):
        with pytest.raises(OptimizerError, match=r"a scheduler has a method step\(\), but "):
            schedules_of(wrong, [optimizer])
    with pytest.raises(OptimizerError, match=r"ReduceLROnPlateau advances by a metric; call its step"):
        schedules_of([first, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)], [optimizer])


@pytest.mark.parametrize(
    ("optimizer", "skipped_each", "steps"),
    [
        (0, [False, True], 1),
        (1, [False, True], 0),
        (None, [False, True], 0),
        (None, [False, False], 1),
    ],
)
def test_a_scheduler_advances_if_its_optimizer_stepped(optimizer, skipped_each, steps):
    counter = Counter()
    advance([Schedule(counter, optimizer)], skipped_each)
    assert counter.steps == steps


def test_a_scheduler_of_an_optimizer_that_does_not_step_is_refused():
    with pytest.raises(OptimizerError, match=r"this ExponentialLR .* of an SGD that is not among the optimizers"):
        schedules_of(halving(sgd()), [sgd()])
