"""Quotients of FP16 by FP32, and sums with a small number: gradients stay finite where FP16 has 0."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from duotone.torch.casting.region import Region

from .op_by_hand import bits

EPS = 1e-8
# of data that are constant in some rows, as people scale them
SCALED: dict[str, Callable[[Tensor], Tensor]] = {
    "deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + EPS),
    "deviation of all": lambda x: (x - x.mean()) / (x.std(correction=0) + EPS),
    "method": lambda x: (x - x.mean(-1, keepdim=True)).div(x.var(-1, keepdim=True) + EPS),
    "range": lambda x: (x - x.amin(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + EPS),
    "largest": lambda x: torch.true_divide(x, x.abs().amax(-1, keepdim=True) + EPS),
}
CONSTANT = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def region() -> "Region":
    return Region(torch.float16).on("cpu")  # type: ignore[return-value]


@pytest.mark.parametrize("name", SCALED)
def test_data_that_are_constant_have_no_nan(name):
    source = CONSTANT.half().requires_grad_()
    with region():
        # whatever makes a constant multiplies the gradient by 0
        y = SCALED[name](source * 0)
    (y.float().sum() * 1024).backward()
    assert y.tolist() == CONSTANT.tolist()
    assert source.grad.tolist() == CONSTANT.tolist()


@pytest.mark.parametrize("name", SCALED)
def test_data_that_are_not_have_gradients_of_fp32(name):
    x = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]])
    direction = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, 1.0]])
    half, wide = x.half().requires_grad_(), x.clone().requires_grad_()
    with region():
        y = SCALED[name](half)
    y.backward(direction.to(y.dtype))
    SCALED[name](wide).backward(direction)
    torch.testing.assert_close(y.float(), SCALED[name](x), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(half.grad.float(), wide.grad, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 1)), ((2, 3), ()), ((), (2,)), ((), ())])
def test_a_quotient_has_the_bits_and_gradients_of_torch(shapes):
    torch.manual_seed(0)
    x, divisor = torch.randn(shapes[0]).half(), torch.rand(shapes[1]) + 0.5

    def gradients(call: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in given]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.full_like(y, 0.75))]

    with region():
        got = gradients(torch.div, x, divisor)
        named = gradients(lambda x, divisor: torch.div(x, other=divisor), x, divisor)
        whole = torch.div(x, divisor, rounding_mode="floor")
    assert bits(got) == bits(named)
    assert bits(whole) == bits(torch.div(x, divisor, rounding_mode="floor"))
    expected = gradients(torch.div, x, divisor)
    if shapes[0] and not shapes[1]:
        # torch rounds a divisor without dimensions
        exact = gradients(torch.div, x.float(), divisor)
        assert bits(got[:2]) == bits([each.half() for each in exact[:2]])
        torch.testing.assert_close(got[2], exact[2], rtol=1e-3, atol=1e-3)
    else:
        assert bits(got) == bits(expected)


def test_what_is_not_0_overflows_as_always():
    x = torch.tensor([0.0, 0.001, 0.0], dtype=torch.float16, requires_grad=True)
    with region():
        y = x / torch.full((3,), EPS)
    y.backward(torch.tensor([1.0, 1.0, torch.inf]))
    assert x.grad.tolist() == [65504, torch.inf, torch.inf]


def test_a_quotient_keeps_what_torch_keeps():
    x, divisor = torch.randn(64).half().requires_grad_(), torch.ones(64, requires_grad=True)
    kept: list[Tensor] = []
    with region(), torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        x / divisor
    assert sorted(str(each.dtype) for each in kept) == ["torch.float16", "torch.float32"]


def test_bf16_has_such_gradients_and_is_left_to_torch():
    x = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    with Region(torch.bfloat16).on("cpu"):
        y = x / torch.full((2,), EPS)
    assert type(y.grad_fn).__name__ == "DivBackward0"


def test_transforms_of_torch_func_go_through():
    def loss(x: Tensor) -> Tensor:
        with region():
            return (x / (x.square().mean() + 0.5) + x / (x.abs().amax(-1, keepdim=True) + EPS)).float().square().sum()

    x = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]])
    close = partial(torch.testing.assert_close, rtol=0.02, atol=0.02, check_dtype=False)
    close(grad(loss)(x.half()), grad(loss)(x))
    close(vmap(grad(loss))(x.half()), vmap(grad(loss))(x))
    close(hessian(loss)(x[0].half()), hessian(loss)(x[0]))
    close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x.half()), loss(x.half()))
