"""The digits task: its split, its batches, its figures and its two models."""

import math
import sys

import pytest
import torch
from torch import nn

from duotone.errors import TaskError
from duotone.train.tasks.digits import ABLATION_SETTINGS, BATCH, digits

TRAIN = 1257
HELD_OUT = 540


class Recorder(nn.Module):
    """Answers every image with digit 0 and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels)
        return torch.zeros(len(pixels), 10)


def train(task, steps, learning_rate):
    """Train a task's model with AdamW at a constant rate."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=learning_rate)
    for epoch in range(math.ceil(steps * BATCH / TRAIN)):
        for batch in task.batches(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()


def test_an_epoch_is_whole_batches_of_distinct_images_in_the_generators_order():
    task = digits()
    one, same, other = (list(task.batches(torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert [task.units_in(batch) for batch in one] == [BATCH] * (TRAIN // BATCH)
    pixels, labels = (torch.cat(parts) for parts in zip(*one, strict=True))
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert set(labels.tolist()) == set(range(10))
    # the bundled images are all different
    assert len(pixels.unique(dim=0)) == len(pixels)
    assert torch.equal(pixels, torch.cat([batch[0] for batch in same]))
    assert not torch.equal(pixels, torch.cat([batch[0] for batch in other]))


def test_no_held_out_image_is_trained_on():
    # two tasks, as two runs make them: the split is the same every time
    task, other = digits(), digits("convnet")
    recorder = Recorder()
    other.evaluate(recorder)
    held_out = {tuple(row) for row in torch.cat(recorder.seen).tolist()}
    assert len(held_out) == HELD_OUT
    trained_on = set()
    for epoch in range(3):
        for pixels, _ in task.batches(torch.Generator().manual_seed(epoch)):
            trained_on.update(tuple(row) for row in pixels.tolist())
    # three epochs leave out nine images each, hardly the same ones
    assert TRAIN - 9 <= len(trained_on) <= TRAIN
    assert held_out.isdisjoint(trained_on)


def test_a_model_that_knows_nothing_scores_one_in_ten():
    task = digits()
    figures = task.evaluate(Recorder())
    assert figures["nll"] == pytest.approx(math.log(10), rel=1e-6) == task.baselines["one in ten"]
    # a tenth of 540 for each digit, to within the rounding of a stratified split
    assert figures["accuracy"] * HELD_OUT == pytest.approx(54, abs=1.5)


def test_the_default_beats_logistic_regression():
    torch.manual_seed(0)
    task = digits()
    train(task, steps=1000, learning_rate=3e-3)
    figures = task.evaluate(task.model)
    assert figures["accuracy"] > 0.96
    assert figures[task.quality] < task.baselines["logistic regression"]
    assert figures == task.evaluate(task.model)


def test_the_convnet_learns_and_keeps_its_statistics_out_of_evaluation():
    torch.manual_seed(0)
    task = digits("convnet")
    train(task, steps=117, learning_rate=3e-3)
    assert task.evaluate(task.model)["accuracy"] > 0.96
    norm = next(module for module in task.model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.training
    assert norm.num_batches_tracked == 117


def test_plain_sgd_under_the_ablation_settings_learns_slowly():
    torch.manual_seed(0)
    task = digits()
    before = task.evaluate(task.model)["nll"]
    rate = ABLATION_SETTINGS["learning_rate"]
    assert isinstance(rate, float)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=rate)
    for batch in task.batches(torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()
    # slowly enough that an update is a small part of its weight, yet in the right direction
    assert 0.9 * before < task.evaluate(task.model)["nll"] < before


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r'run pip install "duotone\[digits\]"'):
        digits()
