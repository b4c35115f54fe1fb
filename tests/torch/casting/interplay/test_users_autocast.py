"""Casting beside torch.autocast that the user enters inside or outside, and regions entered in an odd order."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import duotone.torch as dt

from .computation import NARROW, Model, Results, assert_right, by_hand, cast_model, compute, data, weights

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
BF16 = torch.bfloat16


def state() -> tuple[object, ...]:
    devices = [(torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in ("cpu", "cuda")]
    return *devices, torch.is_autocast_cache_enabled(), tuple(_get_current_function_mode_stack()), inside()


def inside() -> tuple[torch.dtype, ...]:
    """Return the dtypes of a product of FP32, and of an exponential and a softmax of 16 bits."""
    x = data()
    return (x @ x.T).dtype, x.bfloat16().exp().dtype, x.half().exp().dtype, x.bfloat16().softmax(-1).dtype


OUTSIDE = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)
IN_BF16 = (BF16, torch.float32, torch.float32, BF16)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = state()
    yield
    assert state() == before
    assert inside() == OUTSIDE


def in_contexts(*contexts: AbstractContextManager[object]) -> Results:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return compute(data(), *weights())


@HALVES
def test_around_it_torchs_autocast_changes_nothing(dtype):
    expected = by_hand(dtype, data(), *weights())
    for around in (
        torch.autocast("cpu", BF16),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        assert_right(in_contexts(around, dt.autocast("cpu", dtype)), expected, dtype)
    assert_right(
        in_contexts(torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False), dt.autocast("cpu", dtype)),
        expected,
        dtype,
    )


@HALVES
def test_torchs_autocast_that_is_off_inside_ends_it(dtype, same_bits):
    expected = compute(data(), *weights())
    for off in (torch.autocast("cpu", enabled=False), dt.autocast("cpu", enabled=False)):
        got = in_contexts(dt.autocast("cpu", dtype), off)
        assert all(same_bits(got[name], expected[name]) for name in expected)
    # and one for another device does not
    assert_right(
        in_contexts(dt.autocast("cpu", dtype), torch.autocast("cuda", enabled=False)),
        by_hand(dtype, data(), *weights()),
        dtype,
    )


@HALVES
def test_the_innermost_of_several_decides(dtype):
    other = NARROW[dtype == NARROW[0]]
    off = torch.autocast("cpu", enabled=False)
    expected = by_hand(dtype, data(), *weights())
    for contexts in (
        (dt.autocast("cpu", other), dt.autocast("cpu", dtype)),
        (dt.autocast("cpu", dtype), dt.autocast("cpu", dtype)),
        (dt.autocast("cpu", dtype), off, dt.autocast("cpu", dtype)),
        (
            dt.autocast("cpu", dtype),
            dt.autocast("cpu", enabled=False),
            dt.autocast("cpu", other),
            dt.autocast("cpu", dtype),
        ),
        (dt.autocast("cpu", other), dt.keep_float32(), dt.autocast("cpu", dtype)),
    ):
        assert_right(in_contexts(*contexts), expected, dtype)


@HALVES
def test_torchs_autocast_in_another_dtype_inside_is_torchs(dtype, same_bits):
    other = NARROW[dtype == NARROW[0]]
    with torch.autocast("cpu", other):
        expected = data() @ data().T, data().to(other).exp(), data().to(other).sum()
    with dt.autocast("cpu", dtype), torch.autocast("cpu", other):
        got = data() @ data().T, data().to(other).exp(), data().to(other).sum()
    assert all(map(same_bits, got, expected))


def test_what_comes_after_an_inner_region_is_in_the_outer_one():
    with dt.autocast("cpu", BF16):
        for context in (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cpu", torch.float16),
            torch.autocast("cpu", BF16),
            dt.autocast("cpu", torch.float16),
            dt.autocast("cpu", enabled=False),
            dt.keep_float32(),
            dt.op_rule(torch.exp, "as_given"),
            torch.no_grad(),
            torch.inference_mode(),
        ):
            with context:
                inside()
            assert inside() == IN_BF16, context
            with pytest.raises(RuntimeError, match="shapes cannot"), context:
                data() @ data()
            assert inside() == IN_BF16, context


# --- cast models


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "fp16-mixed"])
def test_a_cast_model_keeps_its_policy_in_torchs_autocast(policy, same_bits):
    model = cast_model(policy)
    expected, results = model(data()), dict(model.results)
    for around in (
        torch.autocast("cpu", BF16),
        torch.autocast("cpu", enabled=False),
        dt.autocast("cpu", torch.float16),
    ):
        with around:
            assert same_bits(model(data()), expected)
        assert all(same_bits(model.results[name], results[name]) for name in results)


class Parts(nn.Module):
    """Switches autocast off for a part, as losses of detectors and routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(6, 6), nn.Linear(6, 6)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.autocast("cpu", enabled=False):
            chances = F.linear(hidden.float(), self.router.weight.float()).softmax(-1)
        after = hidden @ hidden.mT
        self.seen = [hidden.dtype, chances.dtype, after.dtype, after.exp().dtype]
        return after.exp().sum() + chances.square().sum()


@HALVES
def test_a_part_of_a_model_that_switches_autocast_off(dtype):
    policy = "bf16" if dtype == BF16 else "fp16"
    model = dt.cast(Parts(), policy)
    loss = model(data())
    assert model.seen == [dtype, torch.float32, dtype, torch.float32]
    hidden = F.linear(data().to(dtype).float(), model.first.weight.float(), model.first.bias.float()).to(dtype)
    chances = F.linear(hidden.float(), model.router.weight.float()).softmax(-1)
    after = (hidden.float() @ hidden.float().T).to(dtype)
    torch.testing.assert_close(loss, after.float().exp().sum() + chances.square().sum(), rtol=0.01, atol=0)


def test_torchs_autocast_in_the_forward_of_a_cast_model():
    class Inside(Model):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                return super().forward(x)

    model = dt.cast(Inside(), "bf16,residual=compute")
    model(data())
    assert_right(model.results, by_hand(BF16, data(), *model.parameters()), BF16)


# --- entered and left in an odd order


def entered() -> Iterator[None]:
    with dt.autocast("cpu", BF16):
        yield
        yield


def test_a_generator_that_leaves_a_region_open():
    held = entered()
    next(held)
    assert inside() == IN_BF16
    held.close()
    assert inside() == OUTSIDE
    held = entered()
    next(held)
    with pytest.raises(ValueError, match="thrown in"):
        held.throw(ValueError("thrown in"))
    assert inside() == OUTSIDE
    held = entered()
    next(held)
    del held
    assert inside() == OUTSIDE


def test_a_generator_inside_of_a_region():
    def steps() -> Iterator[tuple[torch.dtype, ...]]:
        yield inside()
        yield inside()

    found = steps()
    with dt.autocast("cpu", BF16):
        assert next(found) == IN_BF16
    assert next(found) == OUTSIDE


def test_one_region_is_entered_again_and_again():
    region = dt.autocast("cpu", BF16)
    for _ in range(3):
        with region, region:
            with region:
                assert inside() == IN_BF16
            assert inside() == IN_BF16
        assert inside() == OUTSIDE


def test_many_regions_in_one_another():
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(dt.autocast("cpu", BF16))
        assert inside() == IN_BF16
    assert inside() == OUTSIDE


def test_an_error_in_a_rule_itself():
    x = data().bfloat16()
    with dt.autocast("cpu", BF16):
        for call in (
            lambda: F.layer_norm(x, (5,)),
            lambda: x.exp(3),
            lambda: F.softmax(x, 7),
            lambda: torch.cat([x, 3]),
            lambda: F.linear(x, x.T),
            lambda: F.binary_cross_entropy(x.sigmoid(), x.sigmoid()),
            lambda: F.cross_entropy(x, torch.tensor([9])),
        ):
            with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)):
                call()
            assert inside() == IN_BF16


def test_decorated_functions_that_call_one_another():
    @dt.autocast("cpu", BF16)
    def outer(depth: int) -> tuple[torch.dtype, ...]:
        return inner(depth)

    @dt.autocast("cpu", enabled=False)
    def inner(depth: int) -> tuple[torch.dtype, ...]:
        assert inside() == OUTSIDE
        return outer(depth - 1) if depth else inside()

    assert outer(3) == OUTSIDE


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@HALVES
def test_without_gradients(grad, dtype):
    expected = by_hand(dtype, data(), *weights())
    assert_right(in_contexts(grad(), dt.autocast("cpu", dtype)), expected, dtype)
    assert_right(in_contexts(dt.autocast("cpu", dtype), grad()), expected, dtype)
    model = cast_model("bf16")
    with grad():
        model(data())
    assert_right(model.results, by_hand(BF16, data(), *model.parameters()), BF16)
