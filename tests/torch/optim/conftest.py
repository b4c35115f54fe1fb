"""Parameters, gradients and comparisons that the optimizers' tests share."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duotone.torch.parameters.masters import ensure_tail, read_master, write_master

SHAPES = ((5, 7), (), (0, 3), (33,))


@pytest.fixture
def make_parameters() -> Callable[..., list[nn.Parameter]]:
    """Return a function that makes parameters of a dtype, always with the same masters, 1 to 2 in size."""

    def make(dtype: torch.dtype) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        parameters = []
        for shape in SHAPES:
            drawn = torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)
            master = drawn + drawn.sign()
            parameter = nn.Parameter(master.to(dtype))
            if dtype != torch.float32:
                ensure_tail(parameter)
                write_master(parameter, master)
            parameters.append(parameter)
        return parameters

    return make


@pytest.fixture
def give_gradients() -> Callable[[Iterable[nn.Parameter], int], None]:
    """Return a function that sets the gradients of a step, BF16 numbers that depend on the step alone."""

    def give(parameters: Iterable[nn.Parameter], step: int) -> None:
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = drawn.to(parameter.grad_dtype or parameter.dtype)

    return give


@pytest.fixture
def train(give_gradients) -> Callable[..., None]:
    """Return a function that runs an optimizer through some steps."""

    def run(optimizer: torch.optim.Optimizer, steps: Iterable[int], **arguments: Tensor) -> None:
        for step in steps:
            give_gradients([p for group in optimizer.param_groups for p in group["params"] if p.requires_grad], step)
            optimizer.step(**arguments)

    return run


@pytest.fixture
def ulps() -> Callable[..., float]:
    """Return a function for the largest error in units in the last place of FP32.

    A sum whose terms cancel keeps their rounding errors: of numbers below `smallest` the unit is that of `smallest`.
    """

    def distance(value: Tensor, expected: Tensor, smallest: float = torch.finfo(torch.float32).tiny) -> float:
        largest = expected.detach().abs().clamp(min=smallest)
        unit = largest.nextafter(torch.tensor(torch.inf)).double() - largest.double()
        return max(((value.double() - expected.double()).abs() / unit).flatten().tolist(), default=0.0)

    return distance


@pytest.fixture
def everything_in() -> Callable[[torch.optim.Optimizer], dict[Any, Tensor]]:
    """Return a function that copies the weights, masters and states of an optimizer."""

    def snapshot(optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
        found = {}
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            found[index, "weight"] = parameter.detach().clone()
            found[index, "master"] = read_master(parameter)
            found |= {(index, name): value.clone() for name, value in optimizer.state[parameter].items()}
        return found

    return snapshot


@pytest.fixture
def same_everything(same_bits) -> Callable[[dict[Any, Tensor], dict[Any, Tensor]], bool]:
    """Return a function that compares two such copies bit by bit."""

    def compare(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> bool:
        return first.keys() == second.keys() and all(same_bits(first[key], second[key]) for key in first)

    return compare
