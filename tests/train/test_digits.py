"""The digits task: its split, its batches, its figures and its two models."""

import math
import sys

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import TaskError
from duotone.train import Trainer, resolve_settings
from duotone.train.tasks.digits import BATCH, SHRINK, digits

TRAIN = 1257
HELD_OUT = 540


@pytest.fixture(autouse=True)
def _one_thread():
    """Train on one thread: several cost such small products more than they save, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def trained(variant, policy, **settings):
    """Train a variant under a policy with its own settings, and return the trainer."""
    torch.manual_seed(0)
    task = digits(variant)
    told = resolve_settings(task.settings, {"task": task.name, "policy": policy, "log_every": 1000}, settings)
    trainer = Trainer(task, told)
    for _ in trainer.run():
        pass
    return trainer


def weights(model):
    """Return all weights, masters where there are any, in one vector."""
    return torch.cat([master.flatten().double() for master in dt.master_weights(model).values()])


def gradients(variant, policy):
    """Return the gradients that one backward pass leaves in a fresh model."""
    torch.manual_seed(0)
    task = digits(variant)
    model = dt.cast(task.model, policy)
    scaler = dt.LossScaler(policy)
    scaler.backward(task.loss(model, next(iter(task.batches(torch.Generator())))))
    return [parameter.grad for parameter in model.parameters()]


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


def test_plain_sgd_learns_slowly():
    torch.manual_seed(0)
    task = digits("sgd")
    before = task.evaluate(task.model)["nll"]
    # an epoch
    after = trained("sgd", "fp32", steps=TRAIN // BATCH).summary().evaluation["nll"]
    # slowly enough that an update is a small part of its weight, yet in the right direction
    assert 0.9 * before < after < before


def test_fp32_does_not_tell_small_gradients_from_others():
    tasks = []
    for variant in ("sgd", "small-gradients"):
        torch.manual_seed(0)
        tasks.append(digits(variant))
    batch = next(iter(tasks[0].batches(torch.Generator())))
    whole, small = (task.loss(task.model, batch).item() for task in tasks)
    assert small == whole * SHRINK
    one, other = (trained(variant, "fp32", steps=80) for variant in ("sgd", "small-gradients"))
    for before, first, second in zip(*(m.parameters() for m in (tasks[0].model, one.model, other.model)), strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, before)
    # the figures are of the loss as it was
    assert one.summary().evaluation == other.summary().evaluation


def test_without_a_loss_scale_no_small_gradient_is_left_in_fp16():
    assert all((gradient == 0).all() for gradient in gradients("small-gradients", "fp16,loss_scale=1"))
    for variant, policy in (
        ("sgd", "fp16,loss_scale=1"),
        ("small-gradients", "fp16"),
        ("small-gradients", "fp16,loss_scale=32768"),
        ("small-gradients", "bf16"),
    ):
        exact = gradients(variant, "fp32")
        for gradient, true in zip(gradients(variant, policy), exact, strict=True):
            # a few round to 0 beside larger ones, as they may
            assert (gradient != 0).sum() > 0.9 * (true != 0).sum(), (variant, policy)


def test_without_masters_plain_rounding_stays_behind():
    torch.manual_seed(0)
    start = weights(digits("sgd").model)
    way = weights(trained("sgd", "fp32", steps=40).model) - start

    def part_of_the_way(policy):
        return ((weights(trained("sgd", policy, steps=40).model) - start) @ way / (way @ way)).item()

    assert part_of_the_way("bf16") == pytest.approx(1, abs=0.01)
    assert part_of_the_way("bf16-true,rounding=stochastic") == pytest.approx(1, abs=0.2)
    assert 0.4 < part_of_the_way("fp16-true,rounding=nearest") < 0.95
    assert part_of_the_way("bf16-true,rounding=nearest") < 0.4


@pytest.mark.slow
def test_plain_rounding_ends_far_behind_and_loss_scaling_with_masters_does_not():
    figures = {
        (variant, policy): trained(variant, policy).summary().evaluation
        for variant, policy in (
            ("sgd", "fp32"),
            ("sgd", "bf16-true,rounding=nearest"),
            ("small-gradients", "fp16"),
        )
    }
    whole = figures["sgd", "fp32"]
    assert whole["accuracy"] > 0.92
    assert 0.25 < whole["nll"] < 0.30
    assert figures["sgd", "bf16-true,rounding=nearest"]["accuracy"] < 0.5
    assert figures["sgd", "bf16-true,rounding=nearest"]["nll"] > 1.9
    assert figures["small-gradients", "fp16"]["nll"] == pytest.approx(whole["nll"], abs=0.001)


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r'run pip install "duotone\[digits\]"'):
        digits()
