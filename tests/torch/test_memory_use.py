"""Bytes by role, exactly: what the policies and optimizers cost per parameter, and what counts as what."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.wording.memory import Memory


def transformer_like() -> nn.Sequential:
    norm = nn.LayerNorm(8, elementwise_affine=False)
    return nn.Sequential(nn.Embedding(11, 8), norm, nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> Memory:
    model(torch.arange(6)).float().sum().backward()
    optimizer.step()
    return dt.memory(model, optimizer)


@pytest.mark.parametrize(
    ("policy", "kind", "settings", "expected"),
    [
        ("bf16", dt.AdamW, {}, 14.0),
        ("fp16", dt.AdamW, {}, 14.0),
        ("bf16,state=bfloat16", dt.AdamW, {}, 10.0),
        ("fp32,state=bfloat16", dt.AdamW, {}, 12.0),
        ("bf16", dt.Lion, {}, 10.0),
        ("bf16,state=bfloat16", dt.Lion, {}, 8.0),
        ("bf16,grad=float32", dt.AdamW, {}, 16.0),
        ("fp32", dt.AdamW, {}, 16.0),
        ("bf16-mixed", dt.AdamW, {}, 16.0),
        ("fp32", torch.optim.AdamW, {}, 16.0),
        ("bf16", dt.SGD, {"momentum": 0.9}, 10.0),
        ("bf16", dt.SGD, {}, 6.0),
        ("bf16-true,rounding=stochastic", dt.SGD, {"momentum": 0.9}, 8.0),
    ],
)
def test_bytes_per_parameter(policy, kind, settings, expected):
    model = dt.cast(transformer_like(), policy)
    told = train_once(model, kind(model.parameters(), lr=1e-3, **settings))
    assert told.bytes_per_parameter == expected
    assert told.parameters == 11 * 8 + (8 + 1) * 16 + (16 + 1) * 2


def test_every_role_of_bf16_with_adamw():
    model = dt.cast(transformer_like(), "bf16")
    count = sum(parameter.numel() for parameter in model.parameters())
    told = train_once(model, dt.AdamW(model.parameters()))
    # beside each parameter's moments: a step count in int64 and two products of betas in FP64
    counters = 5 * (8 + 16)
    assert told == Memory(
        parameters=count,
        weights_bytes=2 * count,
        tails_bytes=2 * count,
        gradients_bytes=2 * count,
        moments_bytes=8 * count,
        other_bytes=counters,
    )


def test_parameters_of_norms_cost_what_float32_costs():
    model = dt.cast(nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8)), "bf16")
    told = train_once(model, dt.AdamW(model.parameters()))
    assert told.bytes_per_parameter * told.parameters == 14 * 11 * 8 + 16 * 2 * 8


def test_moments_exist_from_the_first_step_on_and_gradients_are_foreseen():
    model = dt.cast(transformer_like(), "bf16,grad=float32")
    optimizer = dt.AdamW(model.parameters())
    before = dt.memory(model, optimizer)
    assert before == dt.memory(model)
    assert (before.moments_bytes, before.gradients_bytes) == (0, 4 * before.parameters)
    after = train_once(model, optimizer)
    assert (after.moments_bytes, after.gradients_bytes) == (8 * after.parameters, 4 * after.parameters)


def test_scalars_have_moments_too():
    parameter = nn.Parameter(torch.tensor(1.0))
    parameter.grad = torch.tensor(1.0)
    model = nn.ParameterList([parameter])
    optimizer = dt.AdamW(model.parameters())
    optimizer.step()
    assert dt.memory(model, optimizer).bytes_per_parameter == 16.0


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6, bias=False))
    model[1].weight = model[0].weight
    dt.cast(model, "bf16")
    told = train_once(model, dt.AdamW(model.parameters()))
    assert (told.parameters, told.bytes_per_parameter) == (18, 14.0)


def test_frozen_weights_and_buffers_are_other():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, affine=False))
    model[0].weight.requires_grad_(False)
    told = dt.memory(dt.cast(model, "bf16"))
    # running mean and variance in FP32, and the count of batches in int64
    assert told == Memory(0, 0, 0, 0, 0, other_bytes=15 * 2 + 2 * 5 * 4 + 8)
    assert told.bytes_per_parameter == 0.0


class Coded(torch.Tensor):
    """Passes for FP32 and keeps 8-bit codes of its shape, and tables."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, *tables: torch.Tensor) -> "Coded":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, *tables: torch.Tensor) -> None:
        self.codes = codes
        self.parts = ["codes", *(f"table{index}" for index in range(len(tables)))]
        for name, table in zip(self.parts[1:], tables, strict=True):
            setattr(self, name, table)

    def __tensor_flatten__(self):
        return self.parts, None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Coded(*inner.values())

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is computed to count bytes")


def test_wrapped_tensors_count_as_what_they_hold_and_shared_ones_once():
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    codes = [torch.zeros(8, 8, dtype=torch.uint8) for _ in range(2)]
    table = torch.zeros(256)
    # the second wraps a wrapped table of its own, too
    inner = Coded(torch.zeros(4, dtype=torch.uint8), table)
    optimizer.state[model.weight] = {"exp_avg": Coded(codes[0], table), "exp_avg_sq": Coded(codes[1], table, inner)}
    assert dt.memory(model, optimizer).moments_bytes == 64 + 1024 + 64 + 4


def test_a_compensation_counts_with_the_moments():
    model = nn.Linear(8, 8, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"exp_avg": model.weight.clone(), "kahan_comp": model.weight.clone()}
    assert dt.memory(model, optimizer).moments_bytes == 2 * 2 * 64


def test_8_bit_moments_of_torchao():
    subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    zeros = subclass_8bit.OptimState8bit.zeros
    optimizer.state[model.weight] = {"exp_avg": zeros((64, 64), True), "exp_avg_sq": zeros((64, 64), False)}
    # a code for each element, an FP32 scale for 256 of them, and a table of 256 FP32 values
    assert dt.memory(model, optimizer).moments_bytes == 2 * (4096 + 4 * 16 + 4 * 256)


@pytest.mark.parametrize("average_buffers", [False, True])
def test_averages_cost_4_bytes_for_each_weight(average_buffers):
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "bf16")
    average = dt.Average(model, average_buffers=average_buffers)
    without, counted = dt.memory(model), dt.memory(model, average=average)
    # two statistics; how many batches there were is not averaged
    assert counted.averages_bytes == average.size_bytes == 4 * without.parameters + 4 * 8 * average_buffers
    assert without.averages_bytes == 0
    assert "averages" in str(counted)
    assert "averages" not in str(without)
    with average.applied(model):
        assert dt.memory(model, average=average) == counted
