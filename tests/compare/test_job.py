"""An job opens the same task each time, under settings in their order, and travels."""

import pickle
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE, find_arms
from duotone.compare.job import Job, job_of
from duotone.compare.measuring.batches import endless_batches
from duotone.compare.plan import Pace, Plan
from duotone.errors import TaskError
from duotone.train.task import on_device

TINY = str(Path(__file__).with_name("tiny_task.py"))


def test_opening_it_again_gives_the_same_weights_batches_and_random_numbers() -> None:
    job = pickle.loads(pickle.dumps(Job(CATALOGUE["bf16"], TINY, 5, {"steps": 7})))
    drawn = []
    for _ in range(2):
        task, settings = job.open()
        batches = endless_batches(task, settings.seed)
        drawn.append((task.model[0].weight.tolist(), [next(batches).tolist() for _ in range(7)]))
        drawn[-1] += (random.random(), np.random.rand(), torch.rand(1).item())
    assert drawn[0] == drawn[1]
    assert (settings.steps, settings.warmup_steps, settings.seed, settings.policy.name) == (7, 4, 5, "bf16")
    # three batches an epoch, and none comes again
    assert len({str(batch) for batch in drawn[0][1]}) == 7


def test_a_wrong_setting_is_an_error_before_the_task_is_built() -> None:
    with pytest.raises(TaskError, match='no setting "lr"'):
        Job(CATALOGUE["bf16"], "no such task", 0, {"lr": 1}).open()


def test_a_plan_and_its_pace_decide_the_settings() -> None:
    plan = Plan(TINY, find_arms("fp32"), "fp32", steps=30, settings={"warmup_steps": 9, "betas": (0.9, 0.95)})
    before = job_of(plan, plan.arms[0], 1)
    assert before.settings == {"warmup_steps": 9, "betas": (0.9, 0.95), "steps": 30}
    after = job_of(plan, plan.arms[0], 1, Pace(20, 2, 3, together=True))
    assert after.settings == {"warmup_steps": 2, "betas": (0.9, 0.95), "steps": 20}
    assert pickle.loads(pickle.dumps(after)) == after


class Pair(NamedTuple):
    """As some loaders collate."""

    x: torch.Tensor
    name: str


def test_a_batch_keeps_its_form_on_its_way_to_the_device() -> None:
    batch = {"x": [torch.ones(2), (torch.zeros(1), "text")], "pair": Pair(torch.ones(1), "text")}
    moved = on_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["x"][1][0].device.type == "meta"
    assert moved["x"][1][1] == "text"
    assert isinstance(moved["pair"], Pair)
    assert (moved["pair"].x.device.type, moved["pair"].name) == ("meta", "text")
