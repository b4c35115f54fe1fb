"""FP16 products in FP32 arithmetic under checkpoints, hooks and transforms, and that nothing wide outlives a call."""

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from duotone.torch.casting.half_on_cpu import multiply_in_float32

from .test_half_on_cpu import CALLS, attention, gradients, half, heads_of, plainly


def test_nothing_wide_outlives_the_call():
    alive = []

    def watched(*args):
        result = attention(*args)
        alive.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (*args, result))
        return F.linear(result, args[0][0, 0])

    gc.disable()
    try:
        result = multiply_in_float32(watched, tuple(half(1, 2, 6, 4) for _ in range(3)), {})
        # attention inside of another function is not known; its query, key and value are
        assert [each.expired() for each in alive] == [True, True, True, False]
        del result
        assert alive[-1].expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", [None, lambda tensor: tensor.detach()])
def test_a_graph_that_is_dropped_frees_what_it_saved(keep):
    gc.disable()
    try:
        x = half(4, 4) * 1
        with saved_tensors_hooks(keep, lambda kept: kept) if keep else torch.enable_grad():
            y = multiply_in_float32(F.linear, (x, half(4, 4)), {})
            z = multiply_in_float32(attention, (y[None, None],) * 3, {})
        alive = [StorageWeakRef(each.untyped_storage()) for each in (x, y, z)]
        # x, saved for y, now has y in its history
        x.mul_(y)
        z.mul_(y)
        del x, y, z
        assert all(each.expired() for each in alive)
    finally:
        gc.enable()


def test_hooks_outside_may_keep_what_they_are_given():
    gc.disable()
    try:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            result = multiply_in_float32(attention, tuple(half(1, 2, 6, 4) for _ in range(3)), {})
        alive = StorageWeakRef(result.untyped_storage())
        del result
        assert alive.expired()
    finally:
        gc.enable()


def block(multiply, x: Tensor, weights: list[Tensor]) -> Tensor:
    hidden = multiply(F.linear, (x, weights[0]), {})
    mixed = multiply(attention, heads_of(hidden), {"is_causal": True})
    return multiply(F.linear, (mixed.transpose(1, 2).flatten(2).relu(), weights[1]), {})


@pytest.fixture
def in_block() -> tuple[Tensor, list[Tensor]]:
    return half(2, 6, 8), [half(24, 8), half(8, 8)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_recompute_the_same(use_reentrant, in_block, same_bits):
    x, weights = in_block
    alive = []

    def watched(multiply, x, weights):
        y = block(multiply, x * 1, weights)
        alive.append(StorageWeakRef(y.untyped_storage()))
        return y * y

    expected = gradients(watched(multiply_in_float32, x, weights), [x, *weights])
    alive.clear()
    result = checkpoint(watched, multiply_in_float32, x, weights, use_reentrant=use_reentrant)
    assert [each.expired() for each in alive] == [True]
    # reentrant checkpoints know backward alone
    result.backward(torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).half())
    assert len(alive) == 2
    assert all(same_bits(operand.grad, grad) for operand, grad in zip([x, *weights], expected, strict=True))


def test_a_checkpoint_saves_nothing_of_what_it_recomputes(in_block):
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda nothing: nothing):
        checkpoint(block, multiply_in_float32, *in_block, use_reentrant=False)
    # its input alone, which the checkpoint saves itself; torch 2.11's saves an empty tensor besides
    assert [shape for shape in saved if shape.numel()] == [in_block[0].shape]


def test_offloading_is_given_the_16_bit_tensors(in_block, same_bits):
    x, weights = in_block
    expected = gradients(block(multiply_in_float32, x, weights), [x, *weights])
    with save_on_cpu():
        offloaded = block(multiply_in_float32, x, weights)
    assert all(map(same_bits, gradients(offloaded, [x, *weights]), expected))


def test_hooks_outside_know_parameters():
    weight, seen = nn.Parameter(half(3, 5)), []
    with saved_tensors_hooks(seen.append, lambda nothing: nothing):
        multiply_in_float32(F.linear, (half(4, 5), weight), {})
    assert any(tensor is weight for tensor in seen)


def test_no_hooks_where_nothing_is_learned():
    tops = []

    def watched(x, weight):
        tops.append(torch._C._autograd._top_saved_tensors_default_hooks(False))
        return F.linear(x, weight)

    x, weight = half(4, 5), half(3, 5)
    multiply_in_float32(watched, (x, weight), {})
    assert tops.pop() is not None
    multiply_in_float32(watched, (x.detach(), weight.detach()), {})
    for no_grad in (torch.no_grad(), torch.inference_mode()):
        with no_grad:
            multiply_in_float32(watched, (x, weight), {})
    with disable_saved_tensors_hooks("not here"):
        multiply_in_float32(watched, (x, weight), {})
    assert tops == [None] * 4


def test_everything_is_left_as_it_was_found():
    def fails(x, weight):
        assert not torch.is_autocast_enabled("cpu")
        assert F.linear(x, weight).dtype == torch.float32
        raise ZeroDivisionError

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            multiply_in_float32(fails, (half(4, 5), half(3, 5)), {})
        assert torch.is_autocast_enabled("cpu")
        assert F.linear(half(4, 5), half(3, 5)).dtype == torch.bfloat16
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_transforms_of_torch_func(same_bits):
    x, weight = half(4, 5, requires_grad=False), half(3, 5, requires_grad=False)

    def loss(multiply, x, weight):
        return multiply(F.linear, (x, weight), {}).float().square().sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=1)(x, weight),
        lambda f: torch.func.vmap(f, in_dims=(0, None))(x, weight),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(x, weight),
        lambda f: torch.func.vjp(f, x, weight)[1](torch.tensor(1.0))[1],
        lambda f: torch.func.jvp(f, (x, weight), (x, weight))[1],
        lambda f: torch.func.vmap(f, in_dims=(0, None))(x, weight.clone().requires_grad_()),
    ):
        one, other = (transform(partial(loss, multiply)) for multiply in (multiply_in_float32, plainly))
        assert same_bits(one, other)


def test_forward_and_backward_at_once(same_bits):
    x, weight = half(4, 5), half(3, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        result = multiply_in_float32(F.linear, (dual, weight), {})
        assert same_bits(forward_ad.unpack_dual(result).tangent, plainly(F.linear, (torch.ones_like(x), weight), {}))
        one, other = gradients(result, [weight]), gradients(plainly(F.linear, (x, weight), {}), [weight])
    assert all(map(same_bits, one, other))


def test_it_can_be_traced(same_bits):
    def f(x, weight):
        return multiply_in_float32(F.linear, (x, weight), {})

    x, weight = half(4, 5), half(3, 5)
    traced = torch.jit.trace(f, (x, weight))
    assert same_bits(traced(2 * x, weight), f(2 * x, weight))
    # hooks would leave what they do in the graph
    assert "detach" not in str(traced.graph)


def test_it_compiles_without_a_break(in_block, same_bits):
    x, weights = in_block

    def whole(multiply):
        return multiply(torch.einsum, ("btc,dc->btd", [block(multiply, x, weights), weights[1]]), {})

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    one, other = gradients(compiled(multiply_in_float32), [x, *weights]), gradients(whole(plainly), [x, *weights])
    assert all(map(same_bits, one, other))


def test_tensors_without_values():
    _, operands, _ = CALLS["matmul broadcasts"]
    operands = tuple(tensor.detach().to("meta").requires_grad_() for tensor in operands)
    grads = gradients(multiply_in_float32(torch.matmul, operands, {}), list(operands))
    assert [(grad.shape, grad.dtype) for grad in grads] == [(each.shape, torch.float16) for each in operands]


class Marked(Tensor):
    """A tensor of a library of its own."""


def test_subclasses_take_plain_conversions(same_bits):
    x, weight, tops = half(4, 5, requires_grad=False).as_subclass(Marked), half(3, 5), []

    def watched(x, weight):
        tops.append(torch._C._autograd._top_saved_tensors_default_hooks(False))
        return F.linear(x, weight)

    assert type(multiply_in_float32(watched, (x, weight), {})) is Marked
    assert tops == [None]
    one, other = (gradients(f(F.linear, (x, weight), {}), [weight]) for f in (multiply_in_float32, plainly))
    assert all(map(same_bits, one, other))


@pytest.mark.parametrize(("func", "shape"), [(F.linear, (3, 4)), (F.conv1d, (3, 4, 2)), (torch.mm, (5, 3))])
def test_an_operand_from_inference_mode(func, shape, same_bits):
    with torch.inference_mode():
        x = half(5, 4, requires_grad=False)
        x = x.T if func is torch.mm else x
        x = x.T[None] if func is F.conv1d else x
    weight = half(*shape)
    results = [multiply(func, (x, weight), {}) for multiply in (multiply_in_float32, plainly)]
    # such a tensor has no version that would tell
    with torch.inference_mode():
        x.add_(1)
    one, other = (gradients(result, [weight]) for result in results)
    assert all(map(same_bits, one, other))
