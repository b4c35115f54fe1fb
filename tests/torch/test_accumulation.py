"""Gradients of 4096 micro-batches: FP32 accumulation against FP64, and what 16-bit accumulation makes of them.

A running sum of n terms in a format with unit roundoff u is off by at most n u times the sum of magnitudes, and by
6.6 sqrt(n) u times it with a probability of 1 - 1e-9 (Higham and Mary, "A new approach to probabilistic rounding error
analysis", 2019). In 16 bits a sum of equal terms stands still once the next one is half a step of it.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt

MICRO_BATCHES = 4096
# of an FP32 sum of so many terms, as a part of the sum of magnitudes: 211 ulps
BOUND = 6.6 * math.sqrt(MICRO_BATCHES) * 2.0**-24
# with a static scale of 4096 a mean over micro-batches leaves FP16 gradients of the size of the inputs
POLICIES = {"bfloat16": "bf16", "float16": "fp16,loss_scale=4096"}
# where a running sum of ones does
STANDS_STILL_AT = {"bfloat16": 256.0, "float16": 2048.0}

ONES, LIKE, MIXED_SIGNS, ANY_SIZE = (slice(i, i + 16) for i in range(0, 64, 16))


class Arms(nn.Module):
    """The same weights three times over, to be kept differently by rules."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.mixed = (nn.Linear(64, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x) + self.wide(x) + self.mixed(x)


def rows() -> Tensor:
    """Return what are the gradients of the micro-batches, numbers of BF16 and FP16 alike.

    Ones; numbers between 1/4 and 2; of both signs; and of both signs and any size.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (MICRO_BATCHES, 16)
    like = torch.empty(shape).uniform_(0.25, 2.0, generator=generator)
    signed, sized = (torch.randn(shape, generator=generator) for _ in range(2))
    sized = sized * 2.0 ** torch.randint(-8, 5, shape, generator=generator)
    return torch.cat([torch.ones(shape), like, signed, sized], dim=1).half().bfloat16().float()


def mean_gradients(model: nn.Module, policy: str, data: Tensor) -> dict[str, Tensor]:
    """Return what a model's masters moved by in one step of all micro-batches, with a learning rate of 1."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    dt.cast(model, policy)
    optimizer, scaler = dt.SGD(model.parameters(), lr=1.0), dt.LossScaler(policy)
    for row in data.split(1):
        # the gradient of a weight is its input
        scaler.backward(model(row).sum() / len(data))
    assert not scaler.step(optimizer).skipped.item()
    return {name: -master[0].double() for name, master in dt.master_weights(model).items()}


def check_float32(mean: Tensor, data: Tensor) -> None:
    expected, magnitudes = data.double().mean(0), data.double().abs().mean(0)
    # terms within a factor of 8 of each other are multiples of 2^-9 and sum up to less than 2^13: 22 bits
    assert torch.equal(mean[ONES], expected[ONES])
    assert torch.equal(mean[LIKE], expected[LIKE])
    assert ((mean - expected).abs() <= BOUND * magnitudes).all()


def check_16_bits(mean: Tensor, data: Tensor, stands_still_at: float) -> None:
    sums, expected, magnitudes = mean * len(data), data.double().sum(0), data.double().abs().sum(0)
    assert (sums[ONES] == stands_still_at).all()
    # terms up to 2 carry it at most twice as far
    assert (sums[LIKE] >= 0.5 * stands_still_at).all()
    assert (sums[LIKE] <= 2.0 * stands_still_at).all()
    # hardly any is within what FP32 keeps to
    beyond = (sums - expected).abs() / magnitudes > BOUND
    assert beyond[ONES].all()
    assert beyond[LIKE].all()
    assert beyond.double().mean() > 0.9


@pytest.mark.parametrize("name", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_float32_keeps_what_16_bits_lose(name: str) -> None:
    policy = f"{POLICIES[name]}; wide: grad=float32; mixed: param=float32,grad=float32"
    model, data = Arms(), rows()
    means = mean_gradients(model, policy, data)
    half = getattr(torch, name)
    kept = {path: (weight.dtype, weight.grad_dtype) for path, weight in model.named_parameters()}
    assert kept == {
        "narrow.weight": (half, half),
        "wide.weight": (half, torch.float32),
        "mixed.weight": (torch.float32, torch.float32),
    }
    check_float32(means["wide.weight"], data)
    check_float32(means["mixed.weight"], data)
    check_16_bits(means["narrow.weight"], data, STANDS_STILL_AT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("form", ["{},grad=float32", "{}-mixed", "{}"])
def test_whole_policies_do_as_their_rules(name: str, form: str) -> None:
    preset, _, scale = POLICIES[name].partition(",")
    policy, data = form.format(preset) + (f",{scale}" if scale else ""), rows()
    mean = mean_gradients(nn.Linear(64, 1, bias=False), policy, data)["weight"]
    if form == "{}":
        check_16_bits(mean, data, STANDS_STILL_AT[name])
    else:
        check_float32(mean, data)


@pytest.mark.parametrize("micro_batches", [256, 257, 300])
def test_bfloat16_is_exact_until_it_stands_still(micro_batches: int) -> None:
    data = torch.ones(micro_batches, 4)
    models = [nn.Linear(4, 1, bias=False) for _ in range(3)]
    for model, policy in zip(models, ("bf16", "bf16,grad=float32", "bf16-mixed"), strict=True):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        dt.cast(model, policy)
        for row in data.split(1):
            model(row).sum().backward()
    sums = [model.weight.grad[0].double() for model in models]
    assert (sums[0] == 256.0).all()
    assert (sums[1] == micro_batches).all()
    assert (sums[2] == micro_batches).all()
