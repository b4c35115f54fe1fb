"""Stand-ins: masters and true gradients, edits among them; what they cost does not grow with edits that are watched."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.kernels import Edits
from duotone.torch.optim.stand_ins import stand_ins_for
from duotone.torch.parameters.edits import read_tails


@pytest.mark.parametrize("edited", [(), (1,), (0, 1, 2, 3)])
def test_stand_ins_are_masters_as_they_are_now(edited):
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 1), nn.LayerNorm(1)), "bf16")
    params = list(model.parameters())
    before = list(dt.master_weights(model).values())
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, 2.0)
        if number in edited:
            param.data.neg_()
    seen = torch.zeros((), dtype=torch.int32)
    stand_ins = stand_ins_for(params, torch.tensor(0.5), lambda device: Edits(seen, 4))
    assert list(stand_ins) == params
    assert seen.item() == (4 if edited else 0)
    for number, (param, stand_in) in enumerate(stand_ins.items()):
        expected = param.float() if number in edited else before[number]
        assert torch.equal(stand_in, expected)
        assert torch.equal(stand_in.grad, torch.ones_like(expected))
        assert (stand_in.data_ptr() == param.data_ptr()) == (param.dtype == torch.float32)


def test_tails_are_read_one_after_the_other_as_they_are_alone():
    torch.manual_seed(0)
    params = list(dt.cast(nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 700)), "fp16").parameters())
    params[4].data[300] = 0.0
    tails = list(read_tails(params))
    assert [tail is None for tail in tails] == [False, False, True, True, False, False]
    for param, tail in zip(params, tails, strict=True):
        (alone,) = read_tails((param,))
        assert (tail is None and alone is None) or torch.equal(tail, alone)
    changed = (tails[4] == 0).flatten()
    # the cell of 512 that the row of 30 elements lies in, or the two that it lies in
    assert changed[300 * 30 // 512 * 512 : (301 * 30 - 1) // 512 * 512 + 512].all()
    assert not changed[: 300 * 30 // 512 * 512].all()


def test_a_step_makes_few_calls_for_a_parameter(calls_in, give_gradients):
    def calls(layers: int) -> int:
        model = dt.cast(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))), "bf16")
        optimizer = dt.MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
        made = 0
        for step in range(2):
            give_gradients(model.parameters(), step)
            made = calls_in(optimizer.step)
        return made

    # 135 with torch 2.13, whose own SGD makes some of them; 237 when each weight was compared by itself
    assert calls(20) - calls(10) < 10 * 145
