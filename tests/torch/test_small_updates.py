"""What master weights are for: ten thousand steps that are each far too small for a 16-bit weight."""

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt

STEPS = 10_000
RELATIVE_SIZE = 1e-6


def weights_in_bfloat16() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(8, 2, bias=False)
    nn.init.uniform_(model.weight, 0.9, 1.0)
    return model


def gradients(shape: torch.Size) -> list[Tensor]:
    # FP32 rounds a constant update the same way at every step, which adds up; these are off to both sides
    generator = torch.Generator().manual_seed(1)
    return [torch.empty(shape).uniform_(0.5, 1.5, generator=generator).bfloat16() for _ in range(STEPS)]


def descend(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        parameter.grad = grad
        optimizer.step()


def test_masters_move_as_float64_says() -> None:
    model = weights_in_bfloat16()
    start = model.weight.detach().double()
    dt.cast(model, "bf16")
    grads = gradients(start.shape)
    descend(dt.SGD(model.parameters(), lr=RELATIVE_SIZE), model.weight, grads)
    movement = -RELATIVE_SIZE * torch.stack(grads).double().sum(dim=0)
    moved = dt.master_weights(model)["weight"].double() - start
    assert ((moved - movement).abs() <= 1e-3 * movement.abs()).all()
    # and the resident weights are the masters, rounded
    assert ((model.weight.double() - start - movement).abs() <= 2.0**-9 + 1e-3 * movement.abs()).all()


def test_a_constant_update_on_the_grid_of_float32_is_exact() -> None:
    model = dt.cast(weights_in_bfloat16(), "bf16")
    start = dt.master_weights(model)["weight"]
    descend(dt.SGD(model.parameters(), lr=2.0**-20), model.weight, [torch.ones_like(model.weight)] * STEPS)
    assert torch.equal(dt.master_weights(model)["weight"].double(), start.double() - STEPS * 2.0**-20)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_without_masters_do_not_move(kind: type[torch.optim.Optimizer]) -> None:
    model = weights_in_bfloat16().bfloat16()
    start = model.weight.detach().clone()
    descend(kind(model.parameters(), lr=RELATIVE_SIZE), model.weight, gradients(start.shape)[:100])
    assert torch.equal(model.weight, start)
