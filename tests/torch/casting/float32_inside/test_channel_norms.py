"""GroupNorm, BatchNorm and InstanceNorm on 16-bit data: torch's own bits and bytes where its kernels are used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.torch.casting.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU

from .test_float32_inside import saved_bytes

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TABLE = {**FLOAT32_INSIDE, **FLOAT32_INSIDE_ON_CPU}
MEAN, VAR = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)


def inside(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return TABLE[func](func, args, kwargs)


def plainly(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


# each takes data and FP32 weights, calls a norm, and returns its result with the running statistics
def running(call: Callable[..., Any], name: str, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> list[Tensor]:
    mean, var = (each.to(weight.dtype, copy=True) for each in (MEAN, VAR))
    return [call(getattr(F, name), x, mean, var, weight, bias, *rest), mean, var]


NORMS: dict[str, Callable[..., list[Tensor]]] = {
    "group": lambda call, x, w, b: [call(F.group_norm, x, 3, w, b)],
    "group, no bias": lambda call, x, w, b: [call(F.group_norm, x, 2, weight=w) + 0 * b.sum().to(x.dtype)],
    "batch": lambda call, x, w, b: [call(F.batch_norm, x, None, None, w, b, True)],
    "batch, running": lambda call, x, w, b: running(call, "batch_norm", x, w, b, True, 0.3),
    "batch, given": lambda call, x, w, b: running(call, "batch_norm", x, w, b),
    "torch.batch": lambda call, x, w, b: [
        call(torch.batch_norm, x, w, b, None, None, training=True, momentum=0.1, eps=1e-5, cudnn_enabled=False)
    ],
    "instance": lambda call, x, w, b: [call(F.instance_norm, x, weight=w, bias=b)],
    "instance, running": lambda call, x, w, b: running(call, "instance_norm", x, w, b),
    "instance, given": lambda call, x, w, b: running(call, "instance_norm", x, w, b, False),
    "torch.instance": lambda call, x, w, b: [
        call(torch.instance_norm, x, w, b, None, None, True, 0.1, 1e-5, cudnn_enabled=False)
    ],
}


def everything(call: Callable[..., Any], name: str, x: Tensor, direction: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in (x, torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6))]
    y, *statistics = NORMS[name](call, *leaves)
    y.backward(direction)
    return [y.detach(), *statistics, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@HALVES
@pytest.mark.parametrize("lies", ["in order", "channels last", "every second"])
@pytest.mark.parametrize("name", NORMS)
def test_it_has_the_bits_of_torch(name, lies, dtype, same_bits):
    torch.manual_seed(0)
    x, direction = (3 * torch.randn(4, 6, 5, 7) + 1).to(dtype), torch.randn(4, 6, 5, 7).to(dtype)
    if lies == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif lies == "every second":
        x, direction = x[:, :, :, ::2], direction[:, :, :, ::2]
    got, expected = everything(inside, name, x, direction), everything(plainly, name, x, direction)
    assert len(got) >= 4
    for one, other in zip(got, expected, strict=True):
        assert same_bits(one, other)


@HALVES
@pytest.mark.parametrize("name", NORMS)
def test_what_is_kept_is_what_torch_keeps(name, dtype):
    x = torch.randn(8, 6, 16).to(dtype).requires_grad_()
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)

    def kept(call: Callable[..., Any]) -> dict[torch.dtype, int]:
        results: list[Any] = []
        return saved_bytes(lambda: results.append(NORMS[name](call, x, weight, bias)))

    assert kept(inside)[dtype] == 8 * 6 * 16 * 2
    # FP32 numbers of channels; torch keeps running statistics where they are no part of the gradient, too
    assert kept(inside)[torch.float32] <= kept(plainly)[torch.float32]
    assert not saved_bytes(lambda: NORMS[name](inside, x.detach(), weight.detach(), bias.detach()))


@HALVES
@pytest.mark.parametrize("name", [name for name in NORMS if "instance" not in name])
def test_gradients_that_are_kept_in_float32_are_not_rounded(name, dtype):
    torch.manual_seed(0)
    x, direction = torch.randn(4, 6, 5).to(dtype).requires_grad_(), torch.randn(4, 6, 5).to(dtype)
    exact = x.detach().double().requires_grad_()
    weight, bias = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    x.grad_dtype = torch.float32
    NORMS[name](inside, x, weight, bias)[0].backward(direction)
    NORMS[name](plainly, exact, weight.double(), bias.double())[0].backward(direction.double())
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert (x.grad != x.grad.to(dtype)).any()


REFUSED: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {
    "a value for each channel": lambda call, x: call(F.batch_norm, x[:1, :, 0, 0], None, None, training=True),
    "a place for each instance": lambda call, x: call(F.instance_norm, x[..., :1, :1]),
    "groups that do not divide": lambda call, x: call(F.group_norm, x, 4),
    "no groups": lambda call, x: call(F.group_norm, x, 0),
    "one number for each group": lambda call, x: call(F.group_norm, x[:1, :, 0, 0], 6),
    "a weight of another size": lambda call, x: call(F.group_norm, x, 2, torch.ones(5)),
    "a weight of another size in a batch": lambda call, x: call(F.batch_norm, x, None, None, torch.ones(5), None, True),
    "statistics of another size": lambda call, x: call(F.batch_norm, x, torch.ones(5), torch.ones(5)),
    "a mean alone": lambda call, x: call(F.batch_norm, x, torch.ones(6), None),
    "neither batch nor statistics, in a batch": lambda call, x: call(F.batch_norm, x, None, None),
    "neither batch nor statistics": lambda call, x: call(F.instance_norm, x, use_input_stats=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_it_still_refuses(name):
    x = torch.ones(2, 6, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)) as expected:
        REFUSED[name](plainly, x)
    with pytest.raises(type(expected.value)) as got:
        REFUSED[name](inside, x)
    assert str(got.value)[:20] == str(expected.value)[:20]


@HALVES
@pytest.mark.parametrize("name", ["group", "batch"])
def test_nothing_has_a_gradient_of_nothing(name, dtype):
    x = torch.ones(0, 6, 3, dtype=dtype, requires_grad=True)
    NORMS[name](inside, x, torch.ones(6), torch.ones(6))[0].sum().backward()
    assert x.grad.shape == (0, 6, 3)


@HALVES
def test_running_statistics_may_change_before_the_backward_pass(dtype):
    x = torch.randn(4, 6, 5).to(dtype).requires_grad_()
    mean, var = MEAN.clone(), VAR.clone()
    first = inside(F.batch_norm, x, mean, var, None, None, True)
    inside(F.batch_norm, x, mean, var, None, None, True)
    first.sum().backward()
    # but given ones are part of the gradient
    first = inside(F.batch_norm, x, mean, var)
    var += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
