"""The slots of states: read by name where an optimizer declares them, by shape of a foreign one."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.kernels.slots import Slot, StateFormat
from duotone.torch.optim import slots
from duotone.torch.parameters.storage import Storage, set_storage


class InBlocks(torch.optim.SGD):
    """Keeps a moment of one byte with a scale for each 64 elements, whatever the shape of either."""

    slots = (Slot("exp_avg", StateFormat(torch.int8, block=64)), Slot("counts", StateFormat(torch.int64), shape=(64,)))


def blocks_of(param: nn.Parameter) -> tuple[InBlocks, dict[str, torch.Tensor]]:
    optimizer = InBlocks([param], lr=0.1)
    optimizer.state[param] = slots.new_state(optimizer.slots, param)
    return optimizer, optimizer.state[param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_state_is_what_is_expected_and_as_the_parameter_lies(dtype):
    param = nn.Parameter(torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    set_storage(param, Storage(state=dtype))
    declared = dt.AdamW([param]).slots
    state = slots.new_state(declared, param)
    assert slots.stored(state) == slots.expected(declared, param)
    assert state["exp_avg"].stride() == param.stride()
    assert (state["exp_avg_sq"].dtype, state["tail"].dtype) == (dtype, torch.int16)
    assert (state["step"].item(), state["beta_products"].tolist()) == (0, [1.0, 1.0])
    assert not state["exp_avg"].any()


def test_one_byte_and_a_scale_for_a_block_are_counted_by_their_slots():
    model = nn.Linear(30, 10, bias=False)
    optimizer, state = blocks_of(model.weight)
    assert (state["exp_avg"].shape, state["exp_avg_scales"].shape) == ((10, 30), (5,))
    memory = dt.memory(model, optimizer)
    assert (memory.moments_bytes, memory.other_bytes) == (300 + 5 * 4, 64 * 8)


def test_a_counter_shaped_like_its_parameter_is_one():
    param = nn.Parameter(torch.ones(64))
    optimizer, state = blocks_of(param)
    assert not slots.is_moment(optimizer, "counts", state["counts"], param)
    assert not slots.is_cut(optimizer, "counts", param.shape, param)
    # of a scalar and of a pair, too
    for shape, name in (((), "step"), ((2,), "beta_products")):
        param = nn.Parameter(torch.ones(shape))
        optimizer = dt.AdamW([param])
        param.grad = torch.ones(shape)
        optimizer.step()
        assert not slots.is_moment(optimizer, name, optimizer.state[param][name], param)
        assert not slots.is_cut(optimizer, name, param.shape, param)
        assert slots.is_cut(optimizer, "exp_avg", param.shape, param)


def test_scales_are_not_cut_and_follow_no_policy():
    param = nn.Parameter(torch.ones(1))
    optimizer, state = blocks_of(param)
    assert state["exp_avg_scales"].shape == param.shape
    assert slots.is_moment(optimizer, "exp_avg_scales", state["exp_avg_scales"], param)
    assert not slots.is_cut(optimizer, "exp_avg_scales", param.shape, param)
    assert not slots.follows_policy(optimizer, "exp_avg")
    assert slots.follows_policy(dt.AdamW([param]), "exp_avg")
    assert not slots.follows_policy(dt.AdamW([param]), "step")


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_a_foreign_optimizer_shapes_tell(wrapped):
    param = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([param])
    optimizer = dt.MasterWeights(optimizer) if wrapped else optimizer
    param.grad = torch.ones(())
    optimizer.step()
    state = optimizer.state[param]
    assert slots.is_moment(optimizer, "exp_avg", state["exp_avg"], param)
    assert not slots.is_moment(optimizer, "step", state["step"], param)
    assert not slots.is_moment(optimizer, "exp_avg", torch.ones(3), param)
    assert not slots.follows_policy(optimizer, "exp_avg")
