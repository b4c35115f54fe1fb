"""Regions: torch.autocast's dtypes without its stale weights, nested, in threads, restored whatever happens inside."""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.torch.casting.region import Region, compute_dtype
from duotone.torch.internals.dispatch import past_modes

NARROW = [torch.bfloat16, torch.float16]
HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def x() -> Tensor:
    return torch.linspace(-2, 2, 96).view(4, 24)


def product(operand: Tensor | None = None) -> torch.dtype:
    operand = x() if operand is None else operand
    return (operand @ operand.T).dtype


OPERATIONS = {
    "linear": lambda: F.linear(x(), x()),
    "matmul of 16 and 32 bits": lambda: x().bfloat16() @ x().T,
    "conv": lambda: F.conv1d(x().view(1, 4, 24), x().view(2, 4, 12)),
    "attention": lambda: F.scaled_dot_product_attention(*[x().view(1, 2, 6, 8)] * 3),
    "gelu": lambda: F.gelu(x().bfloat16()),
    "layer_norm of float32": lambda: F.layer_norm(x(), (24,)),
    "mse_loss": lambda: F.mse_loss(x().bfloat16(), x().bfloat16() * 2),
    "cross_entropy": lambda: F.cross_entropy(x().bfloat16(), torch.tensor([0, 1, 2, 3])),
    "fft": lambda: torch.fft.rfft(x().bfloat16()).real,
    "embedding": lambda: F.embedding(torch.tensor([0, 3, 3]), x().bfloat16()),
    "float64": lambda: x().double() @ x().double().T,
    "integers": lambda: x().long() @ x().long().T,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bfloat16_region_gives_what_autocast_gives(name, same_bits):
    operation = OPERATIONS[name]
    with torch.autocast("cpu", torch.bfloat16):
        expected = operation()
    with Region(torch.bfloat16).on("cpu"):
        got = operation()
    assert same_bits(got, expected)


@HALVES
def test_sums_and_exponentials_are_float32_whatever_autocast_does(dtype):
    with Region(dtype).on("cpu"):
        got = [x().to(dtype).sum(), x().to(dtype).exp(), x().to(dtype) ** 2, 1 / x().to(dtype)]
    assert {result.dtype for result in got} == {torch.float32}


def linear_past_modes(x: Tensor, weight: Tensor) -> Tensor:
    with past_modes():
        return F.linear(x, weight)


# the second is not seen by the region, so that torch's autocast casts its weight
LINEARS = pytest.mark.parametrize("linear", [F.linear, linear_past_modes])


@HALVES
@LINEARS
def test_a_weight_that_changes_inside_is_seen(linear, dtype):
    # under one torch.autocast the second product would use the cached cast of the first weight
    weight = nn.Parameter(torch.ones(1, 1))
    with Region(dtype).on("cpu"):
        assert linear(torch.ones(1, 1), weight).item() == 1.0
        with torch.no_grad():
            weight.fill_(2.0)
        result = linear(torch.ones(1, 1), weight)
    assert result.dtype == dtype
    assert result.item() == 2.0


@HALVES
@LINEARS
def test_a_weight_first_used_without_gradients_has_one_later(linear, dtype):
    # under torch.autocast the cast made under no_grad would be used again
    weight = nn.Parameter(torch.ones(1, 1))
    with Region(dtype).on("cpu"):
        with torch.no_grad():
            linear(torch.ones(1, 1), weight)
        linear(torch.ones(1, 1), weight).float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# --- one inside of another


@HALVES
def test_a_float32_region_ends_what_is_around_it(dtype):
    with Region(dtype).on("cpu"):
        with Region(torch.float32).on("cpu"):
            inside = x() @ x().T
            assert x().to(dtype).exp().dtype == dtype
            assert compute_dtype("cpu") is None
        assert product() == dtype
        assert x().to(dtype).exp().dtype == torch.float32
    assert inside.dtype == torch.float32
    assert torch.equal(inside, x() @ x().T)


@pytest.mark.parametrize(("outer", "inner"), [NARROW, NARROW[::-1]], ids=["fp16 in bf16", "bf16 in fp16"])
def test_the_inner_of_two_regions_holds(outer, inner):
    with Region(outer).on("cpu"):
        with Region(inner).on("cpu"):
            assert product() == product(x().to(outer)) == inner
            assert F.softmax(x().to(outer), -1).dtype == outer
            assert compute_dtype("cpu") == inner
        assert product() == outer
    assert product() == torch.float32


@HALVES
def test_a_region_inside_of_itself_changes_nothing(dtype, same_bits):
    half = x().to(dtype)
    with Region(dtype).on("cpu"):
        once = half @ half.T, half.sum(), F.layer_norm(half, (24,))
        with Region(dtype).on("cpu"):
            twice = half @ half.T, half.sum(), F.layer_norm(half, (24,))
    assert all(same_bits(one, two) for one, two in zip(once, twice, strict=True))


@HALVES
def test_keep_float32_inside_of_a_region_and_a_region_inside_of_it(dtype):
    half = x().to(dtype)
    with Region(dtype).on("cpu"):
        with dt.keep_float32():
            assert product(half) == torch.float32
            assert F.softmax(half, -1).dtype == torch.float32
            with Region(dtype).on("cpu"):
                assert product() == dtype
                assert F.softmax(half, -1).dtype == dtype
            assert product(half) == torch.float32
        assert product() == dtype
    assert product(half) == dtype


@HALVES
@pytest.mark.parametrize("other", [{"enabled": False}, {"dtype": "the other"}])
def test_a_users_own_autocast_inside_is_the_users(other, dtype, same_bits):
    theirs = NARROW[NARROW.index(dtype) - 1]
    settings = {"dtype": theirs} if "dtype" in other else other
    half = x().to(dtype)
    operations: list[Callable[[], Tensor]] = [half.exp, half.sum, lambda: half @ half.T]
    with torch.autocast("cpu", **settings):
        expected = [operation() for operation in operations]
    with Region(dtype).on("cpu"):
        with torch.autocast("cpu", **settings):
            got = [operation() for operation in operations]
        assert half.exp().dtype == torch.float32
    assert all(same_bits(one, other) for one, other in zip(got, expected, strict=True))


@HALVES
@pytest.mark.parametrize("cast_inputs", [torch.float32, None])
def test_custom_fwd_functions_run_as_under_autocast(cast_inputs, dtype):
    seen: list[torch.dtype] = []

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=cast_inputs)
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            seen.extend([a.dtype, (a @ b).dtype, a.exp().dtype])
            return a @ b

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            seen.append((a @ a.T).dtype)
            return grad @ b.T, a.T @ grad

    a, b = x().to(dtype).requires_grad_(), x().T.to(dtype).requires_grad_()
    with Region(dtype).on("cpu"):
        Product.apply(a, b).sum().backward()
    if cast_inputs is None:
        # inside of `apply` autocast alone remains, as torch documents it
        assert seen[:2] == [dtype, dtype]
    else:
        assert seen == [torch.float32] * 4
    assert a.grad.dtype == b.grad.dtype == dtype


# --- nothing is left behind


def state() -> tuple[object, ...]:
    modes = tuple(_get_current_function_mode_stack())
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    return *autocast, modes


def blocks(dtype: torch.dtype) -> dict[str, AbstractContextManager[None]]:
    return {
        "region": Region(dtype).on("cpu"),
        "keep_float32": dt.keep_float32(),
        "op_rule": dt.op_rule({torch.exp: "as_given"}),
    }


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("name", ["region", "keep_float32", "op_rule"])
def test_nothing_is_left_behind(name, dtype):
    before = state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), blocks(dtype)[name]:
        x() @ x()
    assert state() == before
    with blocks(dtype)[name]:
        assert (name, dtype) == ("region", torch.float32) or state() != before
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            x() @ x()
        with pytest.raises(RuntimeError, match="must match"):
            x().sum(dim=0).exp() + torch.ones(5)
    assert state() == before


@HALVES
def test_a_region_knows_whether_it_is_active(dtype):
    region = Region(dtype)
    assert not region.is_active()
    with region.on("cpu"):
        assert region.is_active()
    assert not region.is_active()
    assert Region(torch.float32).is_active()


@HALVES
def test_a_region_holds_in_a_recomputation(dtype):
    region, asked = Region(dtype), []

    def part(operand: Tensor) -> Tensor:
        asked.append(region.is_active())
        return operand.exp().sum()

    with region.on("cpu"):
        loss = checkpoint(part, x().to(dtype).requires_grad_(), use_reentrant=False)
    loss.backward()
    assert asked == [True, True]


def test_threads_have_regions_of_their_own():
    both_inside, found, failures = threading.Barrier(3), {}, []

    def work(dtype: torch.dtype) -> None:
        try:
            with Region(dtype).on("cpu"):
                for _ in range(20):
                    both_inside.wait(10)
                    found.setdefault(dtype, set()).add((product(), x().to(torch.bfloat16).exp().dtype))
        except BaseException as error:
            failures.append(error)
            both_inside.abort()

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in (*NARROW, torch.float32)]
    for thread in threads:
        thread.start()
    # a thread that enters nothing sees nothing
    assert product() == torch.float32
    for thread in threads:
        thread.join()
    assert not failures
    assert found == {
        torch.bfloat16: {(torch.bfloat16, torch.float32)},
        torch.float16: {(torch.float16, torch.float32)},
        torch.float32: {(torch.float32, torch.bfloat16)},
    }


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda region: pickle.loads(pickle.dumps(region))])
def test_a_copy_of_a_region_is_a_region(twin, dtype, same_bits):
    region = Region(dtype)
    again = twin(region)
    assert again is not region
    assert again.compute == dtype
    with region.on("cpu"):
        expected = x() @ x().T
    with again.on("cpu"):
        assert same_bits(x() @ x().T, expected)


def test_another_mode_sees_what_rules_have_cast():
    seen: list[torch.dtype] = []

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is Tensor.exp:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    half = x().bfloat16()
    with Recording(), Region(torch.bfloat16).on("cpu"):
        half.exp()
    with Region(torch.bfloat16).on("cpu"), Recording():
        half.exp()
    assert seen == [torch.float32, torch.bfloat16]
