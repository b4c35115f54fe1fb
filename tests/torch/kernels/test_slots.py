"""What an update declares: slots by group, tensors of a slot in any format, and what a declaration may not be."""

from dataclasses import replace

import pytest
import torch

from duotone.torch.kernels.slots import FLOAT64, MAX_MOMENTS, STEP, Slot, StateFormat
from duotone.torch.kernels.updates import adamw, lion, sgd

SHAPE = torch.Size((30, 20))
FLOAT32 = StateFormat(torch.float32)


def test_slots_of_the_optimizers():
    assert [slot.name for slot in adamw.UPDATE.slots] == ["step", "exp_avg", "exp_avg_sq", "beta_products"]
    assert [slot.name for slot in lion.UPDATE.slots] == ["step", "exp_avg"]
    assert [slot.name for slot in sgd.UPDATE.slots] == ["step", "momentum_buffer"]


@pytest.mark.parametrize(
    ("slot", "state", "expected"),
    [
        (Slot("a"), FLOAT32, {"a": (torch.float32, SHAPE)}),
        (Slot("a"), StateFormat(torch.bfloat16), {"a": (torch.bfloat16, SHAPE)}),
        (Slot("a", FLOAT32), StateFormat(torch.bfloat16), {"a": (torch.float32, SHAPE)}),
        (STEP, FLOAT32, {"step": (torch.int64, ())}),
        (Slot("c", FLOAT64, shape=(2,)), StateFormat(torch.int8, block=64), {"c": (torch.float64, (2,))}),
        # 600 elements are 9 whole blocks and a part of one
        (
            Slot("a"),
            StateFormat(torch.int8, block=64),
            {"a": (torch.int8, SHAPE), "a_scales": (torch.float32, (10,))},
        ),
    ],
)
def test_tensors_of_a_slot(slot, state, expected):
    assert slot.tensors(SHAPE, state) == expected


def test_an_empty_parameter_has_no_scales():
    assert Slot("a").tensors(torch.Size((0, 3)), StateFormat(torch.int8, block=64))["a_scales"] == (torch.float32, (0,))


def test_a_moment_is_there_if_its_setting_is():
    update = sgd.UPDATE
    assert update.names_in({"momentum": 0.0}) == ("step",)
    assert update.names_in({"momentum": 0.5}) == ("step", "momentum_buffer")
    assert (update.moments_in({"momentum": 0.0}), update.moments_in({"momentum": 0.5})) == ((), ("momentum_buffer",))


def test_counters_after_some_updates():
    settings = adamw.AdamWSettings(0.1, 0.9, 0.99, 1e-8, 0.0, maximize=False, seed=0)
    products = adamw.UPDATE.counters
    assert products.after(3, settings) == (0.9**3, 0.99**3)
    assert products.after(0, settings) == (products.start,) * 2
    assert STEP.after(3, settings) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"moments": tuple(Slot(f"moment{number}") for number in range(MAX_MOMENTS + 1))},
        {"moments": (Slot("a", needs="b"), Slot("c"))},
        {"counters": Slot("a", FLOAT32, shape=(2,))},
        {"settings": lion.LionCoefficients},
    ],
)
def test_what_kernels_could_not_run_is_refused(wrong):
    with pytest.raises(AssertionError):
        replace(adamw.UPDATE, **wrong)
