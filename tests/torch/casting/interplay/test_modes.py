"""Casting beside modes: dispatch modes and function modes above and below it, fake tensors, FLOP counts, profiles."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import duotone.torch as dt

from .computation import (
    LABELS,
    NARROW,
    TOKENS,
    Results,
    assert_right,
    by_hand,
    cast_model,
    compute,
    data,
    exact_gradients,
    gradients,
    loss_of,
    weights,
)

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
Context = Callable[[], AbstractContextManager[object]]


class SeesKernels(TorchDispatchMode):
    """Notes the dtypes of what kernels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        floats = {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
        self.seen.setdefault(func.overloadpacket.__name__, set()).update(floats)
        return func(*args, **(kwargs or {}))


class Computes(TorchDispatchMode):
    """Computes something of its own for each result, as a mode that looks for NaN does."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            self.largest.append(result.detach().float().exp().max() + result.detach().abs().sum())
        return result


class Follows(TorchFunctionMode):
    """Counts the functions that are called, and calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Doubles(TorchFunctionMode):
    """Makes something else of one function, which calls others that have rules."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.sigmoid:
            return torch.exp(args[0]).sum() + F.linear(args[0], args[0])
        return func(*args, **(kwargs or {}))


OTHERS: dict[str, Context] = {
    "sees kernels": SeesKernels,
    "computes": Computes,
    "follows functions": Follows,
    "counts FLOPs": lambda: FlopCounterMode(display=False),
    "profiles": lambda: profile(activities=[ProfilerActivity.CPU]),
    "default device": lambda: torch.device("cpu"),
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


def run_in(dtype: torch.dtype, before: Context, inside: Context) -> Callable[..., Results]:
    def run(*operands: Tensor) -> Results:
        with before(), dt.autocast("cpu", dtype), inside():
            return compute(*operands)

    return run


@HALVES
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_modes_above_and_below_change_nothing(name, dtype, same_bits):
    plain = run_in(dtype, nullcontext, nullcontext)
    expected, expected_gradients = by_hand(dtype, data(), *weights()), gradients(plain)
    for run in (run_in(dtype, OTHERS[name], nullcontext), run_in(dtype, nullcontext, OTHERS[name])):
        assert_right(run(data(), *weights()), expected, dtype)
        assert all(map(same_bits, gradients(run), expected_gradients))
    for got, exact in zip(expected_gradients, exact_gradients(), strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_a_cast_model_in_modes_is_the_same(name, same_bits):
    model = cast_model("bf16")
    expected = model(data())
    grads = torch.autograd.grad(expected, list(model.parameters()))
    with OTHERS[name]():
        got = model(data())
        assert all(map(same_bits, torch.autograd.grad(got, list(model.parameters())), grads))
    assert same_bits(got, expected)
    assert_right(model.results, by_hand(torch.bfloat16, data(), *model.parameters()), torch.bfloat16)


@HALVES
def test_modes_in_one_another_change_nothing(dtype):
    with ExitStack() as stack:
        for other in (SeesKernels, Follows, lambda: dt.autocast("cpu", dtype), Computes, Follows, SeesKernels):
            stack.enter_context(other())
        got = compute(data(), *weights())
    assert_right(got, by_hand(dtype, data(), *weights()), dtype)


@HALVES
@pytest.mark.parametrize("is_outside", [True, False])
def test_a_dispatch_mode_sees_the_dtypes_that_kernels_compute_in(is_outside, dtype):
    watcher = SeesKernels()
    with run_stack(watcher, dtype, is_outside):
        compute(data(), *weights())
    for name in ("exp", "rsqrt", "_log_softmax"):
        assert watcher.seen[name] == {torch.float32}, name
    # a CPU without FP16 products multiplies in FP32
    if dtype == torch.bfloat16:
        assert watcher.seen["mm"] == {dtype}


def run_stack(other: AbstractContextManager[object], dtype: torch.dtype, is_outside: bool) -> ExitStack:
    stack = ExitStack()
    for context in (other, dt.autocast("cpu", dtype)) if is_outside else (dt.autocast("cpu", dtype), other):
        stack.enter_context(context)
    return stack


@HALVES
def test_what_a_function_mode_inside_calls_has_its_rules(dtype):
    x = data(5).to(dtype)
    with dt.autocast("cpu", dtype), Doubles():
        got = torch.sigmoid(x)
    expected = x.float().exp().sum() + (x.float() @ x.float().T).to(dtype)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_flops_are_those_of_float32():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv, self.conv = nn.Linear(8, 24), nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.to_qkv(x).chunk(3, -1))
            return self.conv(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    def flops(model: nn.Module, around: Context) -> int:
        with FlopCounterMode(display=False) as counter:
            with around():
                loss = model(torch.ones(2, 4, 8)).sum()
            loss.backward()
        return counter.get_total_flops()

    expected = flops(Attends(), nullcontext)
    assert expected > 0
    assert flops(Attends(), lambda: dt.autocast("cpu", torch.bfloat16)) == expected
    assert flops(dt.cast(Attends(), "bf16"), nullcontext) == expected


def test_a_profile_names_every_operation_as_often_as_it_is_called():
    def calls(around: Context) -> Counter[str]:
        with profile(activities=[ProfilerActivity.CPU]) as found, around():
            compute(data(), *weights())
        return Counter({each.key: each.count for each in found.key_averages()})

    plain, inside = calls(nullcontext), calls(lambda: dt.autocast("cpu", torch.bfloat16))
    for name in ("aten::exp", "aten::cat", "aten::rsqrt", "aten::native_layer_norm"):
        assert inside[name] == plain[name] > 0, name


@HALVES
@pytest.mark.parametrize("is_outside", [True, False])
def test_fake_tensors_have_the_dtypes_of_real_ones(is_outside, dtype):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    expected = by_hand(dtype, data(), *weights())
    with run_stack(fake := FakeTensorMode(), dtype, is_outside):
        operands = [fake.from_tensor(each) for each in (data(), *weights())]
        got = compute(*operands, fake.from_tensor(TOKENS), fake.from_tensor(LABELS))
        grads = torch.autograd.grad(loss_of(got), operands[1:])
    for name, want in expected.items():
        assert isinstance(got[name], FakeTensor)
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
    assert [each.dtype for each in grads] == [torch.float32] * 3


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_fake_cast_model_has_the_dtypes_of_a_real_one(policy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = dt.cast(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Softmax(-1), nn.Linear(6, 2)), policy)
    seen: list[list[torch.dtype]] = []
    for part in model:
        part.register_forward_hook(lambda module, args, result: seen[-1].append(result.dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen.append([])
        fake = model(torch.ones(3, 6))
    seen.append([])
    real = model(torch.ones(3, 6))
    assert (fake.dtype, fake.shape) == (real.dtype, real.shape)
    assert seen[0] == seen[1]
