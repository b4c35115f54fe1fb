"""Casting beside operators of other libraries, with kernels of their own for autocast or without, and compiled."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import duotone.torch as dt

from .computation import NARROW

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
# what kernels were given, and what they made inside
seen: list[tuple[torch.dtype, ...]] = []


@torch.library.custom_op("interplay::scaled_exp", mutates_args=())
def scaled_exp(x: Tensor, scale: Tensor) -> Tensor:
    """Exponentials in the dtype of the data, as its fake kernel says."""
    result = x.exp() * scale.to(x.dtype)
    seen.append((x.dtype, scale.dtype, result.dtype))
    return result


@scaled_exp.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, scale, output = ctx.saved_tensors
    return (grad * output).to(x.dtype), (grad.float() * x.float().exp()).sum().to(scale.dtype)


scaled_exp.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("interplay::narrow_sum", mutates_args=())
def narrow_sum(x: Tensor) -> Tensor:
    """A sum with a kernel for autocast, which says that it takes BF16."""
    seen.append((x.dtype,))
    return x.float().sum(-1)


narrow_sum.register_fake(lambda x: x.new_empty(x.shape[:-1], dtype=torch.float32))
narrow_sum.register_autocast("cpu", torch.bfloat16)


@torch.library.custom_op("interplay::fill_with_exp", mutates_args=("out",))
def fill_with_exp(x: Tensor, out: Tensor) -> None:
    """Writes into what it is given."""
    seen.append((x.dtype, out.dtype))
    out.copy_(x.exp())


def _noting(x: Tensor) -> Tensor:
    seen.append((x.dtype, (result := x * 2).dtype))
    return result


# operators by the older way, one of which is composed of torch's
LIBRARY = torch.library.Library("interplay", "FRAGMENT")
LIBRARY.define("low(Tensor x) -> Tensor")
LIBRARY.impl("low", _noting, "CPU")
LIBRARY.define("composed(Tensor x) -> Tensor")
LIBRARY.impl("composed", _noting, "CompositeImplicitAutograd")


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


def operand(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).to(dtype)


@HALVES
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_operator_without_a_rule_runs_on_what_it_is_given(given, dtype, same_bits):
    x, scale = operand(given).requires_grad_(), torch.tensor(1.5, requires_grad=True)
    expected = x.detach().exp() * 1.5
    with dt.autocast("cpu", dtype):
        got = scaled_exp(x, scale)
    # what a kernel calls inside runs on what it is given: compiled code and fake tensors take it to be so
    assert seen == [(given, torch.float32, given)]
    assert same_bits(got, expected)
    got.double().sum().backward()
    assert (x.grad.dtype, scale.grad.dtype) == (given, torch.float32)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(scale.grad, operand(given).float().exp().sum(), rtol=1e-5, atol=0)


@HALVES
def test_a_kernel_of_an_operator_has_the_products_of_torch_autocast(dtype):
    found = []

    @torch.library.custom_op(f"interplay::product_{str(dtype).partition('.')[2]}", mutates_args=())
    def product(x: Tensor) -> Tensor:
        found.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return x @ x.mT

    got = []
    for autocast in (torch.autocast, dt.autocast):
        with autocast("cpu", dtype):
            got.append(product(operand(torch.float32)))
    assert found[0] == found[1] == (True, dtype)
    assert got[0].dtype == got[1].dtype == dtype
    torch.testing.assert_close(got[0], got[1])


@HALVES
@pytest.mark.parametrize("given", [torch.float32, *NARROW])
def test_a_kernel_for_autocast_is_called(given, dtype):
    with dt.autocast("cpu", dtype):
        got = narrow_sum(operand(given))
    assert seen == [(torch.bfloat16,)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, operand(given).bfloat16().float().sum(-1))


@HALVES
def test_an_operator_writes_into_what_it_is_given(dtype):
    x, out = operand(dtype), torch.zeros(3, 4)
    with dt.autocast("cpu", dtype):
        fill_with_exp(x, out)
    assert seen == [(dtype, torch.float32)]
    torch.testing.assert_close(out, x.exp().float())


@HALVES
@pytest.mark.parametrize("name", ["low", "composed"])
def test_operators_by_the_older_way(name, dtype, same_bits):
    with dt.autocast("cpu", dtype), torch.no_grad():
        got = getattr(torch.ops.interplay, name)(operand(dtype))
    assert seen == [(dtype, dtype)]
    assert same_bits(got, operand(dtype) * 2)


def test_under_a_kind_of_ones_own():
    wide = dt.op_rule(scaled_exp, "float32")
    with dt.autocast("cpu", torch.bfloat16):
        assert wide(operand(torch.bfloat16), torch.tensor(1.5)).dtype == torch.float32
    assert seen == [(torch.float32,) * 3]


@pytest.mark.parametrize("mode", [pytest.param("around", marks=pytest.mark.slow), "inside"])
def test_compiled_whole_it_gives_the_same_bits(mode, same_bits):
    def compute(x: Tensor, scale: Tensor) -> Tensor:
        return F.softmax(scaled_exp(x @ x.mT, scale), -1).sum() + narrow_sum(x).sum()

    def inside(x: Tensor, scale: Tensor) -> Tensor:
        with dt.autocast("cpu", torch.bfloat16):
            return compute(x, scale)

    def around(x: Tensor, scale: Tensor) -> Tensor:
        with dt.autocast("cpu", torch.bfloat16):
            return torch.compile(compute, backend="aot_eager", fullgraph=True)(x, scale)

    torch.compiler.reset()
    x, scale = operand(torch.float32), torch.tensor(1.5)
    expected = inside(x, scale)
    got = around(x, scale) if mode == "around" else torch.compile(inside, backend="aot_eager", fullgraph=True)(x, scale)
    assert same_bits(got, expected)


# --- a library that has kernels at the key of another device's autocast, in a process of its own

FOREIGN = """
import torch
import duotone.torch as dt
from torch import nn
from torch.nn import functional as F

calls = []
LIBRARY = torch.library.Library("foreign", "DEF")


def register():
    global implementation
    LIBRARY.define("twice(Tensor x) -> Tensor")
    LIBRARY.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    LIBRARY.impl("twice", foreign, "AutocastPrivateUse1")
    implementation = torch.library.Library("aten", "IMPL")
    for name in ("exp", "mm", "layer_norm", "relu"):
        implementation.impl(name, foreign, "AutocastPrivateUse1")


def foreign(*args, **kwargs):
    calls.append(args)
    raise RuntimeError("a kernel for another device was called for tensors on a CPU")


def check():
    x = torch.linspace(-1, 1, 12).view(3, 4)
    with dt.autocast("cpu", torch.bfloat16):
        product = x @ x.T
        assert product.dtype == torch.bfloat16
        assert torch.equal(product, x.bfloat16() @ x.T.bfloat16())
        assert torch.equal(product.exp(), product.float().exp())
        assert torch.equal(F.layer_norm(product, (3,)), F.layer_norm(product.float(), (3,)).bfloat16())
        assert torch.equal(F.relu(product), product.clamp(min=0))
        if "twice" in dir(torch.ops.foreign):
            assert torch.equal(torch.ops.foreign.twice(product), product * 2)
    assert x.bfloat16().exp().dtype == torch.bfloat16
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), "bf16")
    loss = model(x).exp().sum()
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert not calls


import warnings
warnings.simplefilter("ignore")
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("register(); check()", id="before the first cast"),
        pytest.param("check(); register(); check()", id="after it"),
        pytest.param('torch.utils.rename_privateuse1_backend("npu"); check()', id="named"),
    ],
)
@pytest.mark.slow
def test_a_library_with_kernels_for_its_own_device(order):
    program = textwrap.dedent(FOREIGN) + order
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr


def test_nothing_of_another_devices_autocast_is_left_behind():
    def state() -> tuple[bool, ...]:
        return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "xpu", "privateuseone"))

    before = state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), dt.autocast("cpu", torch.bfloat16):
        operand(torch.float32) @ operand(torch.float32)
    assert state() == before == (False,) * 4
