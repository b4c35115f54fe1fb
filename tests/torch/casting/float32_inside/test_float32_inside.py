"""Operations with FP32 inside: results are those of FP32 operands rounded once, gradients FP32 sums rounded once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from duotone.torch.casting.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TABLE = {**FLOAT32_INSIDE, **FLOAT32_INSIDE_ON_CPU}
ROWS = 3000


def inside(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return TABLE[func](func, args, kwargs)


def wide(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `func` on FP32 operands, written out by hand, and round the result to the dtype of the first."""
    halves = (torch.bfloat16, torch.float16)

    def widen(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in halves else x

    result = func(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()})
    return result.to(next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()))


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], direction: Tensor | None = None) -> list[Tensor]:
    """Return the result of `call` and its gradients along `direction`, of ones if there is none."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    result = call(*leaves)
    direction = torch.ones_like(result) if direction is None else direction.to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


def saved_bytes(call: Callable[[], Any]) -> dict[torch.dtype, int]:
    """Return how many bytes of each floating-point dtype `call` keeps for a backward pass, storages counted once."""
    storages: dict[int, tuple[torch.dtype, int]] = {}

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point():
            storages[x.untyped_storage().data_ptr()] = x.dtype, x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        call()
    kept: dict[torch.dtype, int] = {}
    for dtype, size in storages.values():
        kept[dtype] = kept.get(dtype, 0) + size
    return kept


NORMS = {
    "layer": lambda call, x, weight, bias: call(F.layer_norm, x, x.shape[-1:], weight, bias),
    "layer by names": lambda call, x, weight, bias: (
        call(F.layer_norm, x, normalized_shape=x.shape[1:], weight=None, bias=None, eps=1e-3)
        + 0 * (bias + weight).sum()
    ),
    "torch.layer": lambda call, x, weight, bias: call(torch.layer_norm, x, x.shape[-1:], weight, bias, 1e-5, True),
    "rms": lambda call, x, weight, bias: call(F.rms_norm, x, x.shape[-1:], weight) + 0 * bias.sum(),
    "rms of two": lambda call, x, weight, bias: (
        call(F.rms_norm, x, x.shape[1:], None, eps=1e-3) + 0 * (bias + weight).sum()
    ),
    "group": lambda call, x, weight, bias: call(F.group_norm, x.mT, 4, weight, bias),
}


@HALVES
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_those_of_float32_operands_rounded_once(dtype, weights, name, same_bits):
    torch.manual_seed(0)
    x, leaves = torch.randn(300, 3, 128), [torch.rand(128) + 0.5, torch.randn(128)]
    x, leaves = (3 * x).to(dtype), [leaf.to(weights or dtype) for leaf in leaves]
    direction = torch.randn(300, 128, 3) if name == "group" else torch.randn(300, 3, 128)
    direction = direction.to(dtype)
    got, *grads = gradients(partial(NORMS[name], inside), [x, *leaves], direction)
    expected, *_ = gradients(partial(NORMS[name], wide), [x, *leaves], direction)
    if name.startswith("rms"):
        assert same_bits(got, expected)
    else:
        # these kernels add up in another order on 16-bit data, all in FP32
        torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (got != expected).float().mean() < 1e-3
    assert [grad.dtype for grad in grads] == [dtype, *(leaf.dtype for leaf in leaves)]
    _, *exact = gradients(
        partial(NORMS[name], lambda f, *a, **k: f(*a, **k)), [y.double() for y in (x, *leaves)], direction
    )
    for grad, want in zip(grads, exact, strict=True):
        # half a unit in the last place, and what FP32 arithmetic loses beside the largest element
        loss = 2e-6 * want.abs().max().item()
        torch.testing.assert_close(grad.double(), want, rtol=torch.finfo(grad.dtype).eps * 0.51, atol=loss)
    with torch.no_grad():
        assert same_bits(NORMS[name](inside, x, *leaves), got)


@HALVES
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["layer", "rms", "group", "batch", "instance"])
def test_a_bias_that_many_rows_use(dtype, weights, name):
    x = torch.randn(ROWS, 4, 2).to(dtype)
    weight, bias = (torch.ones(4, dtype=weights or dtype), torch.zeros(4, dtype=weights or dtype))
    calls = {
        "layer": lambda weight, bias: inside(F.layer_norm, x.mT, (4,), weight, bias),
        # RMSNorm has no bias; of equal rows, its weight does the same
        "rms": lambda weight, bias: inside(F.rms_norm, torch.ones_like(x.mT), (4,), weight, 0.0) + bias,
        "group": lambda weight, bias: inside(F.group_norm, x, 2, weight, bias),
        # in no table: torch's own kernels add these up in FP32
        "batch": lambda weight, bias: F.batch_norm(x, None, None, weight, bias, True),
        "instance": lambda weight, bias: F.instance_norm(x, None, None, weight, bias, True),
    }
    _, of_weight, of_bias = gradients(
        calls[name], [weight, bias], torch.ones(()).expand(calls[name](weight, bias).shape)
    )
    expected = torch.full((4,), 2.0 * ROWS).to(weight.dtype)
    assert torch.equal(of_weight if name == "rms" else of_bias, expected)


def test_what_torch_does_alone():
    # the reason of it all; where this fails, torch has mended its kernels
    x, bias = torch.randn(ROWS, 4).bfloat16(), torch.zeros(4, requires_grad=True)
    F.layer_norm(x, (4,), torch.ones(4), bias).sum(dtype=torch.float32).backward()
    # 256 for each thread
    assert bias.grad[0] < ROWS / 2
    table = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    table[torch.zeros(ROWS, dtype=torch.int64)].sum(dtype=torch.float32).backward()
    assert table.grad[0] < ROWS / 2


@HALVES
def test_norms_keep_what_is_in_16_bits_and_a_few_numbers_for_each_row(dtype):
    x = torch.randn(64, 256).to(dtype).requires_grad_()
    weight, bias = torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True)
    kept = saved_bytes(lambda: inside(F.layer_norm, x, (256,), weight, bias))
    assert kept == {dtype: 64 * 256 * 2, torch.float32: 2 * 64 * 4 + 2 * 256 * 4}
    kept = saved_bytes(lambda: inside(F.rms_norm, x, (256,), weight))
    assert kept == {dtype: 64 * 256 * 2, torch.float32: 64 * 4 + 256 * 4}
    assert not saved_bytes(lambda: inside(F.layer_norm, x.detach(), (256,)))


@HALVES
@pytest.mark.parametrize("func", [F.layer_norm, F.rms_norm, F.group_norm])
def test_other_dtypes_and_devices_get_weights_that_fit(dtype, func):
    shape = 2 if func is F.group_norm else (4,)
    weight = torch.ones(4, dtype=dtype)
    assert inside(func, torch.ones(3, 4), shape, weight).dtype == torch.float32
    assert inside(func, torch.ones(3, 4, dtype=torch.float64), shape, weight).dtype == torch.float64
    x, weight = torch.ones(3, 4, dtype=dtype, device="meta"), torch.ones(4, device="meta", requires_grad=True)
    seen = []
    table = {**FLOAT32_INSIDE}
    result = table[func](lambda *args: seen.append(args[2].dtype) or func(*args), (x, shape, weight), {})
    assert result.dtype == dtype
    assert seen == [dtype]
    result.sum().backward()
    assert weight.grad.dtype == torch.float32


@HALVES
def test_statistics_of_a_group_norm_without_weights_are_not_rounded(dtype):
    torch.manual_seed(0)
    x, direction = (5 + torch.randn(50, 4, 30)).to(dtype), torch.randn(50, 4, 30).to(dtype)
    _, grad = gradients(lambda x: inside(F.group_norm, x, 2), [x], direction)
    _, exact = gradients(lambda x: F.group_norm(x, 2), [x.double()], direction)
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)


@HALVES
def test_without_eps_rms_norm_takes_that_of_torch(dtype):
    x = torch.full((1, 8), 1e-4).to(dtype).requires_grad_()
    assert torch.equal(inside(F.rms_norm, x, (8,)), F.rms_norm(x, (8,)))


@pytest.mark.parametrize("func", [F.layer_norm, F.rms_norm])
def test_norms_of_nothing_and_of_shapes_that_do_not_fit(func):
    x = torch.ones(0, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    inside(func, x, (4,), weight).sum().backward()
    assert x.grad.shape == (0, 4)
    assert weight.grad.tolist() == [0.0] * 4
    for shape, other in (((5,), None), ((4,), torch.ones(3))):
        with pytest.raises(RuntimeError, match=r"normalized_shape|same shape"):
            inside(func, x, shape, other)


def _steps(kind: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function of two FP32 tensors with everything in it, 16-bit inside, and the tensors."""
    index = torch.tensor([0, 2, 2])

    def run(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        if kind in ("lookup", "rows"):
            y = inside(F.embedding, index, x) * inside(F.embedding, index, x, 1)
            # torch has no second derivative of bags
            y = y + inside(F.embedding_bag, index[None], x.detach() if kind == "rows" else x, mode="sum")
        elif kind == "gather":
            picked = inside(Tensor.__getitem__, x, (slice(None), index)) + inside(torch.index_select, x, 1, index)
            picked = picked + inside(torch.gather, x, 1, index.expand(3, 3)) + inside(torch.take, x, index)
            y = (
                picked
                + inside(Tensor.__getitem__, x, (index, index))
                + inside(Tensor.take_along_dim, x, index[None], 1)
            )
            y = y[:, :1] + weight
        else:
            func = {"layer": F.layer_norm, "rms": F.rms_norm, "group": F.group_norm}[kind]
            y = inside(func, x, 1 if kind == "group" else (4,), weight)
        # a weight that is not used has a gradient, too
        return y.float().pow(2).sum() + 0 * weight.sum()

    torch.manual_seed(0)
    return run, [torch.randn(3, 4), torch.randn(4)]


KINDS = pytest.mark.parametrize("kind", ["layer", "rms", "group", "lookup", "gather"])


@KINDS
def test_transforms_of_torch_func(kind):
    run, (x, weight) = _steps(kind)
    _, of_x, of_weight = gradients(run, [x, weight])
    if kind != "group":
        assert torch.equal(torch.func.grad(run)(x, weight), of_x)
    many = torch.stack([x, x + 1])
    each = torch.stack([torch.func.grad(run)(one, weight) for one in many])
    close = partial(torch.testing.assert_close, rtol=0.01, atol=0.1)
    close(torch.func.vmap(torch.func.grad(run), (0, None))(many, weight), each)
    close(torch.func.grad(lambda y: torch.func.vmap(run, (0, None))(y, weight).sum())(many), each)
    close(torch.func.vmap(torch.func.grad(run, 1), (None, 0))(x, torch.stack([weight, weight]))[1], of_weight)


@pytest.mark.parametrize("kind", ["layer", "rms", "group", "rows", "gather"])
def test_second_derivatives(kind):
    run, (x, weight) = _steps(kind)
    direction = torch.randn_like(x)

    def twice(call: Callable[..., Any]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
        return torch.autograd.grad((grad * direction).sum(), leaf)[0]

    # the same function of FP32 tensors
    reference = twice(lambda y: run(y, weight, torch.float32))
    assert (twice(lambda y: run(y, weight)) - reference).norm() < 0.02 * reference.norm()


@KINDS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_whole_and_gives_the_same(kind, backend):
    torch._dynamo.reset()
    run, operands = _steps(kind)
    expected = gradients(run, operands)
    got = gradients(torch.compile(run, backend=backend, fullgraph=True), operands)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_give_the_same(kind, reentrant):
    run, operands = _steps(kind)
    leaves = [x.clone().requires_grad_() for x in operands]
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    expected = gradients(run, operands)[1:]
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, expected, strict=True))
