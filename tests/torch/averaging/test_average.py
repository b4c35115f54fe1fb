"""Averages of masters: beside averages by hand in every bit, over skipped steps, and for every kind of parameter."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torchs

import duotone.torch as dt
from duotone.errors import AverageError, DuotoneWarning

from .models import ByHand, backward, bits, small

POLICIES = ["bf16", "fp16,loss_scale=1", "fp32", "bf16-mixed", "bf16-true,rounding=stochastic", None]


def assert_same(average: dt.Average, by_hand: ByHand) -> None:
    averages = average.state_dict()["averages"]
    assert {"embed.weight", "norm.weight", "empty"} <= averages.keys()
    assert not any("frozen" in name for name in averages)
    for name, value in averages.items():
        assert value.dtype == torch.float32
        assert np.array_equal(value.numpy().view(np.int32), by_hand.averages[name].view(np.int32)), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_the_average_of_the_masters_in_every_bit(policy, backend):
    model = small(policy)
    optimizer = dt.AdamW(model.parameters(), lr=1e-2, backend=backend)
    average, by_hand = dt.Average(model, decay=0.9, backend=backend), ByHand(model, 0.9)
    for step in range(6):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        by_hand.update()
        assert_same(average, by_hand)
    assert average.updates.item() == 6
    assert not torch.equal(average.state_dict()["averages"]["embed.weight"], dt.master_weights(model)["embed.weight"])


def test_small_steps_are_not_lost():
    # a step of 1e-3 of a distance of 2^-9 is less than half a spacing of BF16, for every weight
    model = dt.cast(nn.Linear(4, 4, bias=False), "bf16")
    dt.load_master_weights(model, {"weight": torch.ones(4, 4)})
    average = dt.Average(model, decay=0.999)
    average.update()
    dt.load_master_weights(model, {"weight": torch.full((4, 4), 1 + 2.0**-9)})
    for _ in range(1000):
        average.update()
    moved = average.state_dict()["averages"]["weight"] - 1.0
    assert torch.allclose(moved / 2.0**-9, torch.tensor(1 - 0.999**1000), rtol=1e-2)


@pytest.mark.parametrize("kind", ["LossScaler", "GradScaler", "wrapped", "wrapped fused"])
def test_a_skipped_step_is_not_averaged(kind):
    model = small("fp16")
    params = [param for param in model.parameters() if param.requires_grad and param.numel()]
    optimizer = dt.AdamW(params, lr=1e-2)
    if "wrapped" in kind:
        optimizer = dt.MasterWeights(torch.optim.AdamW(params, lr=1e-2, fused="fused" in kind))
    scaler = dt.GradScaler("cpu", init_scale=8.0) if kind == "GradScaler" else dt.LossScaler("fp16", init_scale=8.0)
    average, by_hand = dt.Average(model, decay=0.9), ByHand(model, 0.9)
    for step, factor in enumerate((float("inf"), 1.0, 1.0, float("inf"), 1.0, float("inf"))):
        if isinstance(scaler, dt.GradScaler):
            tokens = torch.arange(11)
            scaler.scale(nn.functional.cross_entropy(model(tokens), tokens) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            with warnings.catch_warnings():
                # that the loss is not finite
                warnings.simplefilter("ignore")
                backward(model, step, scaler, factor)
                scaler.step(optimizer)
        optimizer.zero_grad()
        before = bits(average.state_dict())
        average.update()
        if factor == 1.0:
            by_hand.update()
        else:
            assert bits(average.state_dict()) == before
    assert average.updates.item() == 3
    assert_same(average, by_hand)


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_optimizer_and_scaler_on_a_model_that_was_never_cast(fused):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average = dt.Average(model, decay=0.5)
    expected = None
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(torch.ones(1, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update()
        if factor == 1.0:
            weight = model.weight.detach().clone()
            expected = weight if expected is None else expected + (weight - expected) * 0.5
    assert average.updates.item() == 2
    assert torch.equal(average.state_dict()["averages"]["weight"], expected)


def test_steps_since_the_last_update_count_as_one():
    model = nn.Linear(2, 1)
    optimizer, average = dt.SGD(model.parameters(), lr=0.1), dt.Average(model)
    other = dt.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    flags = torch.tensor(True), torch.tensor(False)

    def updates_after(*found_infs) -> int:
        before = average.updates.item()
        for found_inf in found_infs:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step(found_inf=found_inf)
        other.step()
        average.update()
        return average.updates.item() - before

    # while no step was seen, weights are changed by other hands
    assert updates_after() == 1
    assert updates_after(None) == 1
    assert updates_after() == 0
    assert updates_after(flags[0], flags[1]) == 1
    assert updates_after(flags[1], flags[0]) == 1
    assert updates_after(flags[0], None) == 1
    assert updates_after(None, flags[0]) == 1
    assert updates_after(flags[0], flags[0]) == 0


def test_two_optimizers_of_one_model():
    model = small("fp16")
    optimizers = dt.AdamW([model.embed.weight]), dt.SGD(model.norm.parameters(), lr=0.1)
    average = dt.Average(model)
    for flags, expected in (((True, True), 0), ((True, False), 1), ((False, True), 1)):
        backward(model, 0)
        for optimizer, flag in zip(optimizers, flags, strict=True):
            optimizer.step(found_inf=torch.tensor(flag))
        before = average.updates.item()
        average.update()
        assert average.updates.item() - before == expected


def test_no_hook_stays_behind():
    gc.collect()
    before, pre_hooks = len(torchs._global_optimizer_post_hooks), len(torchs._global_optimizer_pre_hooks)
    average = dt.Average(nn.Linear(1, 1))
    assert len(torchs._global_optimizer_post_hooks) == before + 1
    with average.applied():
        pass
    del average
    gc.collect()
    assert len(torchs._global_optimizer_post_hooks) == before
    assert len(torchs._global_optimizer_pre_hooks) == pre_hooks


def test_a_deep_copy_goes_its_own_way():
    model = small("bf16")
    average = dt.Average(model, decay=0.5)
    optimizer = dt.AdamW(model.parameters(), lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, average: dt.Average) -> None:
        backward(model, 0)
        optimizer.step()
        average.update()

    train(model, optimizer, average)
    copied_model, copied = copy.deepcopy((model, average))
    before = bits(average.state_dict())
    assert bits(copied.state_dict()) == before
    train(copied_model, dt.AdamW(copied_model.parameters(), lr=1e-2), copied)
    assert bits(average.state_dict()) == before
    assert copied.updates.item() == 2
    # nobody has stepped this one
    average.update()
    assert bits(average.state_dict()) == before


def test_weights_that_were_never_cast_and_have_no_masters_are_warned_of():
    model = nn.Linear(2, 1).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    average = dt.Average(model)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    with pytest.warns(DuotoneWarning, match=r"AdamW rounds updates of weights in torch\.bfloat16"):
        optimizer.step()
    average.update()
    assert torch.equal(average.state_dict()["averages"]["weight"], model.weight.float())


def test_what_is_unfrozen_is_taken_up():
    model = small("bf16")
    average = dt.Average(model, decay=0.5)
    average.update()
    model.frozen.requires_grad_(True)
    optimizer = dt.AdamW(model.parameters(), lr=1e-2)
    expected = None
    for step in range(2):
        backward(model, step)
        optimizer.step()
        average.update()
        master = dt.master_weights(model)["frozen.weight"]
        expected = master if expected is None else expected + (master - expected) * 0.5
        assert torch.equal(average.state_dict()["averages"]["frozen.weight"], expected)


def test_a_parameter_that_was_replaced_is_refused():
    model = small("bf16")
    average = dt.Average(model)
    model.empty = nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(AverageError, match='the parameter "empty" was replaced or has another shape'):
        average.update()


def test_a_model_that_is_cast_or_moves_its_weights_later_is_followed():
    model = small(None)
    average, by_hand = dt.Average(model, decay=0.9), ByHand(model, 0.9)
    for policy in ("bf16", "fp16,loss_scale=1", "fp32"):
        dt.cast(model, policy)
        for param in model.parameters():
            param.data = param.data.clone()
        optimizer = dt.AdamW(model.parameters(), lr=1e-2)
        backward(model, 0)
        optimizer.step()
        average.update()
        by_hand.update()
    assert_same(average, by_hand)


def test_wide_and_complex_parameters_are_averaged_in_their_own_format():
    model = nn.Module()
    model.wide = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    model.complex = nn.Parameter(torch.tensor([1.0 + 1.0j]))
    average = dt.Average(model, decay=0.5)
    average.update()
    with torch.no_grad():
        model.wide += 2.0**-40
        model.complex.zero_()
    average.update()
    state = average.model_state_dict()
    assert state["wide"].item() == 1.0 + 2.0**-41
    assert state["complex"].item() == 0.5 + 0.5j


def test_layouts_that_are_not_contiguous():
    model = dt.cast(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "bf16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-2)
    average, by_hand = dt.Average(model, decay=0.9), ByHand(model, 0.9)
    for _ in range(3):
        model(torch.ones(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        average.update()
        by_hand.update()
    for name, value in average.state_dict()["averages"].items():
        assert np.array_equal(value.numpy(), by_hand.averages[name])


@pytest.mark.parametrize("average_buffers", [False, True])
def test_buffers(average_buffers):
    model = small("bf16")
    average = dt.Average(model, decay=0.5, average_buffers=average_buffers)
    expected = None
    for step in range(3):
        backward(model, step)
        average.update()
        mean = model.norm.running_mean.clone()
        expected = mean if expected is None or not average_buffers else expected + (mean - expected) * 0.5
    state = average.model_state_dict()
    assert torch.equal(state["norm.running_mean"], expected)
    assert state["norm.num_batches_tracked"].item() == 3
    own = model.norm.running_mean.clone()
    with average.applied(model):
        assert torch.equal(model.norm.running_mean, expected)
        # as update_bn of torch does for averages
        backward(model, 9)
    assert torch.equal(model.norm.running_mean, own)
    assert model.norm.num_batches_tracked.item() == 3


def test_a_state_dict_for_a_plain_model():
    model = small("bf16")
    optimizer, average = dt.AdamW(model.parameters(), lr=1e-2), dt.Average(model, decay=0.5)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        average.update()
    plain = small(None, seed=1)
    plain.load_state_dict(average.model_state_dict())
    averages = average.state_dict()["averages"]
    for name, param in plain.named_parameters():
        expected = averages[name] if name in averages else dt.master_weights(model)[name]
        assert torch.equal(param, expected), name
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain.norm.running_var, model.norm.running_var)


def test_forgetting_the_updates_is_noticed():
    model = small("bf16")
    average = dt.Average(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # before the first step
        with average.applied(model):
            pass
    backward(model, 0)
    dt.AdamW(model.parameters(), lr=1e-2).step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with average.applied(model):
            pass
        average.model_state_dict()
        average = dt.Average(model)
        backward(model, 1)
        dt.AdamW(model.parameters(), lr=1e-2).step()
        average.model_state_dict()
    assert [(each.category, each.filename) for each in seen] == [(DuotoneWarning, __file__)] * 2
    assert "never updated, but the model was trained" in str(seen[0].message)
    assert str(seen[0].message).endswith("call average.update() after every step")


def test_nothing_is_read_from_a_device_by_an_update(monkeypatch):
    # operations of torch alone, of which none gives a number to the host
    model = small("bf16").to("meta")
    average = dt.Average(model, backend="reference")
    for _ in range(2):
        average.update()
    assert average.updates.is_meta
