"""Tasks with batches of another size: the same samples in the same order, and errors where that cannot be."""

import re
import weakref
from collections import OrderedDict
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from duotone.compare.fit.micro_batches import resized
from duotone.errors import CompareError
from duotone.train import Task


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def task_of(batches, **changes):
    """Build a task around a function from a generator to batches."""
    task = Task("toy", nn.Linear(1, 1), lambda model, batch: torch.zeros(()), batches, lambda model: {"loss": 0.0})
    return replace(task, **changes)


def numbered(lengths):
    """Batches of these lengths: numbers of samples in a random order, in nested forms, and text beside them."""

    def batches(generator):
        order = torch.randperm(sum(lengths), generator=generator)
        for index, chosen in enumerate(order.split(lengths)):
            pair = Pair(chosen.float()[:, None], chosen % 2 == 0)
            rows = OrderedDict(twice=torch.stack([chosen] * 2, 1))
            yield {"number": chosen, "more": [(pair, "text"), index], "rows": rows}

    return batches


def drawn(task, seed=0):
    return list(task.batches(torch.Generator().manual_seed(seed)))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), samples=st.integers(1, 60))
def test_every_sample_keeps_its_place(lengths, samples):
    task = task_of(numbered(lengths))
    generator = torch.Generator().manual_seed(3)
    # what epochs one after the other give
    source = [batch["number"] for _ in range(60) for batch in task.batches(generator)]
    batches = drawn(resized(task, samples), seed=3)
    # as many whole batches as an epoch holds, or one from as many epochs as it takes
    assert len(batches) == max(1, sum(lengths) // samples)
    assert torch.equal(torch.cat([batch["number"] for batch in batches]), torch.cat(source)[: len(batches) * samples])
    for batch in batches:
        number, [(pair, text), _], rows = batch["number"], batch["more"], batch["rows"]
        assert len(number) == samples
        assert isinstance(pair, Pair)
        assert torch.equal(pair.left, number.float()[:, None])
        assert torch.equal(pair.right, number % 2 == 0)
        assert torch.equal(rows["twice"], torch.stack([number] * 2, 1))
        assert text == "text"
    assert batches[0]["more"][1] == 0


def test_the_same_generator_gives_the_same_batches_and_the_tasks_own_stay():
    task = task_of(numbered([4, 4]))
    bigger = resized(task, 11)
    one, same, other = (drawn(bigger, seed)[0]["number"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert [len(batch["number"]) for batch in drawn(task)] == [4, 4]
    # its own size gives its own batches
    for batch, expected in zip(drawn(resized(task, 4)), drawn(task), strict=True):
        assert torch.equal(batch["number"], expected["number"])


def test_nothing_else_of_the_task_changes():
    task = task_of(numbered([4]), settings={"steps": 3}, unit="bytes", units_in=lambda batch: 7, facts={"a": "b"})
    changed = resized(task, 2)
    assert [field.name for field in fields(Task) if getattr(task, field.name) is not getattr(changed, field.name)] == [
        "batches"
    ]


def test_no_batch_is_in_memory_twice():
    alive = []

    def batches(generator):
        for _ in range(4):
            batch = torch.rand(8, generator=generator)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    stream = iter(resized(task_of(batches), 24).batches(torch.Generator()))
    batch = next(stream)
    # the last one drawn is still in a loop's hand
    assert [reference() is None for reference in alive] == [True, True, False]
    # and no room is kept for what was cut off
    assert batch.untyped_storage().nbytes() == 24 * 4
    assert next(iter(resized(task_of(batches), 20).batches(torch.Generator()))).untyped_storage().nbytes() == 20 * 4


def test_an_empty_epoch_stays_empty():
    assert drawn(resized(task_of(lambda generator: iter(())), 4)) == []
    assert drawn(resized(task_of(lambda generator: iter([torch.zeros(0, 3)])), 4)) == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            [{"x": torch.zeros(4, 2), "mean": torch.zeros(())}],
            "batch['mean'] of task 'toy' has shape (), where a batch has 4 samples; let the first dimension of every "
            "tensor be the samples, or compare without a search for the largest micro-batch",
        ),
        ([(torch.zeros(4, 2), [torch.zeros(2, 4)])], "batch[1][0] of task 'toy' has shape (2, 4)"),
        (["text"], "a batch of task 'toy' holds no tensor with a dimension of samples"),
        (
            [(torch.zeros(4, 17), 0), (torch.zeros(4, 20), 0)],
            "batch[0] of task 'toy' is float32 of shape (samples, 17) in one batch and float32 of shape (samples, 20) "
            "in another, so they cannot be joined; let all batches have one form, padded to one length for instance",
        ),
        ([torch.zeros(4), torch.zeros(4).half()], "batch of task 'toy' is float32 of shape (samples) in one batch and"),
        ([{"x": torch.zeros(4)}, {"y": torch.zeros(4)}], "batch['x'] of task 'toy' is float32 of shape (samples)"),
        ([[torch.zeros(4)], [torch.zeros(4)] * 2], "batch[1] of task 'toy' is missing in one batch and float32"),
        ([[torch.zeros(4), "a"], [torch.zeros(4)]], "batch[1] of task 'toy' is no tensor in one batch and missing in"),
        ([[torch.zeros(4), []], [torch.zeros(4)]], "batch[1] of task 'toy' is no tensor in one batch and missing in"),
    ],
)
def test_batches_that_cannot_be_cut_or_joined_say_what_to_do(batches, message):
    task = resized(task_of(lambda generator: iter(batches)), 6)
    with pytest.raises(CompareError, match=re.escape(message)):
        drawn(task)


def test_a_batch_needs_a_sample():
    with pytest.raises(CompareError, match="a batch of 0 samples cannot be made; give at least 1"):
        resized(task_of(numbered([4])), 0)
