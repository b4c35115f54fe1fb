"""Casting and what autograd offers: second derivatives, hooks, both kinds of checkpoint."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import duotone.torch as dt

from .computation import (
    NARROW,
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
BF16 = torch.bfloat16


def near(got: Tensor, exact: Tensor, share: float = 0.02) -> bool:
    return bool((got.double() - exact.double()).norm() <= share * exact.double().norm())


# --- second derivatives


def slope_and_curve(function: Callable[..., Results], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss with the square of its own gradient in it."""
    loss = loss_of(function(*leaves))
    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(slope.square().sum() for slope in slopes)
    return list(torch.autograd.grad(loss + penalty, leaves))


@HALVES
@pytest.mark.parametrize("is_outside", [True, False], ids=["all in a region", "forward in a region"])
def test_a_penalty_on_gradients(is_outside, dtype):
    exact = slope_and_curve(compute, [each.detach().double().requires_grad_() for each in (data(), *weights())])
    leaves = [data().requires_grad_(), *weights()]
    cast = dt.autocast("cpu", dtype)
    got = cast(slope_and_curve)(compute, leaves) if is_outside else slope_and_curve(cast(compute), leaves)
    for one, want in zip(got, exact, strict=True):
        assert one.dtype == torch.float32
        assert near(one, want, 0.05)


@HALVES
def test_a_graph_is_gone_through_twice(dtype, same_bits):
    leaves = [data().requires_grad_(), *weights()]
    with dt.autocast("cpu", dtype):
        loss = loss_of(compute(*leaves))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(same_bits, first, torch.autograd.grad(loss, leaves)))


# --- hooks


@HALVES
def test_hooks_that_keep_saved_tensors_elsewhere(dtype, same_bits):
    expected = gradients(dt.autocast("cpu", dtype)(compute))
    packed: list[torch.dtype] = []

    def pack(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        # what a hook computes runs as it is given, or by the rules; the dtype of what it gives back is its own affair
        packed.append(tensor.dtype)
        return (tensor.clone() * 1, tensor.dtype)

    def unpack(kept: tuple[Tensor, torch.dtype]) -> Tensor:
        return kept[0].to(kept[1])

    def outside(*operands: Tensor) -> Results:
        with graph.saved_tensors_hooks(pack, unpack), dt.autocast("cpu", dtype):
            return compute(*operands)

    def inside(*operands: Tensor) -> Results:
        with dt.autocast("cpu", dtype), graph.saved_tensors_hooks(pack, unpack):
            return compute(*operands)

    def on_cpu(*operands: Tensor) -> Results:
        with dt.autocast("cpu", dtype), graph.save_on_cpu():
            return compute(*operands)

    for run in (outside, inside, on_cpu):
        assert all(map(same_bits, gradients(run), expected))
    assert dtype in packed


@HALVES
def test_hooks_on_gradients_see_the_dtypes_of_their_tensors(dtype):
    seen: dict[str, torch.dtype] = {}
    leaves = [data().requires_grad_(), *weights()]
    with dt.autocast("cpu", dtype):
        results = compute(*leaves)
        for name, each in results.items():
            each.register_hook(lambda grad, name=name: seen.setdefault(name, grad.dtype) and None)
        loss = loss_of(results)
    loss.backward()
    for name, each in results.items():
        assert seen.get(name, each.dtype) == each.dtype, name
    assert len(seen) >= 6


@HALVES
def test_hooks_on_gradients_compute_outside_of_the_region(dtype):
    seen: list[torch.dtype] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append((grad.float() @ grad.float().mT).dtype)
        return grad * 2

    x, weight = data().requires_grad_(), weights()[0]
    with dt.autocast("cpu", dtype):
        product = F.linear(x, weight)
        product.register_hook(hook)
        loss = product.float().square().sum()
    loss.backward()
    assert seen == [torch.float32]
    exact = data().double().requires_grad_()
    F.linear(exact, weights()[0].double()).square().sum().backward()
    assert near(x.grad, exact.grad * 2)


# --- checkpoints

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def unpacked(results: Results) -> tuple[Tensor, ...]:
    return tuple(results.values())


@HALVES
@KINDS
@pytest.mark.parametrize("is_outside", [True, False], ids=["region around", "region inside"])
def test_checkpoints_change_no_bit(is_outside, reentrant, dtype, same_bits):
    cast = dt.autocast("cpu", dtype)
    expected, names = gradients(cast(compute)), tuple(by_hand(dtype, data(), *weights()))

    def recomputed(*operands: Tensor) -> Results:
        part = (
            (lambda *each: unpacked(compute(*each))) if is_outside else (lambda *each: unpacked(cast(compute)(*each)))
        )
        results = dict(zip(names, checkpoint(part, *operands, use_reentrant=reentrant), strict=True))
        assert_right(results, by_hand(dtype, *operands), dtype)
        return results

    assert all(map(same_bits, gradients(cast(recomputed) if is_outside else recomputed), expected))


@HALVES
@KINDS
def test_a_backward_pass_of_a_checkpoint_inside_of_a_region(reentrant, dtype, same_bits):
    found = []
    for around in (torch.enable_grad(), dt.autocast("cpu", dtype)):
        leaves = [data().requires_grad_(), *weights()]
        with dt.autocast("cpu", dtype):
            loss = checkpoint(lambda *each: loss_of(compute(*each)), *leaves, use_reentrant=reentrant)
        with around:
            loss.backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(map(same_bits, *found))


@HALVES
@KINDS
def test_a_recomputation_draws_the_same_random_numbers(reentrant, dtype, same_bits):
    def part(x: Tensor, weight: Tensor) -> Tensor:
        dropped = F.dropout(F.linear(x, weight), 0.5)
        attended = F.scaled_dot_product_attention(*[dropped.view(1, 2, 2, 6)] * 3, dropout_p=0.3)
        noise = torch.rand_like(attended) * attended + torch.randn(6)
        return F.rrelu(noise, training=True).exp().sum()

    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        x, weight = data().requires_grad_(), weights()[0]
        with dt.autocast("cpu", dtype):
            loss = part(x, weight) if kind is None else checkpoint(part, x, weight, use_reentrant=kind)
        loss.backward()
        found.append([loss, x.grad, weight.grad, torch.rand(3)])
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@KINDS
def test_checkpoints_in_and_around_cast_models(reentrant, policy, same_bits):
    class Blocks(nn.Module):
        how: bool | None = None

        def __init__(self) -> None:
            super().__init__()
            parts = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.2), nn.Softmax(-1)) for _ in range(3)]
            self.blocks = nn.Sequential(*parts)

        def forward(self, x: Tensor) -> Tensor:
            if self.how is None:
                return self.blocks(x)
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.how)

    torch.manual_seed(0)
    model = dt.cast(Blocks(), policy)
    found = []
    for inside, around in ((None, None), (reentrant, None), (None, reentrant), (reentrant, reentrant)):
        model.how = inside
        model.zero_grad()
        x = data().requires_grad_()
        torch.manual_seed(1)
        result = model(x) if around is None else checkpoint(model, x, use_reentrant=around)
        result.square().sum().backward()
        found.append([result, x.grad, *(param.grad for param in model.parameters())])
    for others in found[1:]:
        assert all(map(same_bits, found[0], others))


# --- functions with a backward pass of their own


class Scaled(torch.autograd.Function):
    """A product and an exponential, with the backward pass in Python; notes the dtypes there."""

    seen: ClassVar[list[torch.dtype]] = []

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x @ weight).exp()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        product = x.float() @ weight.float()
        Scaled.seen.append(product.dtype)
        grad = grad.float() * product.exp()
        return (grad @ weight.float().T).to(x.dtype), (x.float().T @ grad).to(weight.dtype)


@HALVES
def test_a_function_of_ones_own_has_rules_forward_and_none_backward(dtype):
    x, weight = data().requires_grad_(), weights()[0]
    with dt.autocast("cpu", dtype):
        got = Scaled.apply(x, weight)
    expected = (x.to(dtype).float() @ weight.to(dtype).float()).to(dtype).float().exp()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    Scaled.seen.clear()
    got.sum().backward()
    assert Scaled.seen == [torch.float32]
    exact = data().double().requires_grad_()
    (exact @ weights()[0].double()).exp().sum().backward()
    assert near(x.grad, exact.grad)


@HALVES
def test_a_weight_that_is_used_many_times_and_frozen_in_between(dtype):
    x, weight = data(), weights()[0]
    with dt.autocast("cpu", dtype):
        first = F.linear(x, weight)
        with torch.no_grad():
            unseen = F.linear(x, weight)
        assert not unseen.requires_grad
        second = F.linear(first, weight)
        weight.requires_grad_(False)
        third = F.linear(second, weight)
        weight.requires_grad_(True)
        loss = F.linear(third, weight).float().square().sum()
    loss.backward()
    exact = weights()[0].double().detach().requires_grad_()
    middle = F.linear(F.linear(F.linear(data().double(), exact), exact), exact.detach())
    F.linear(middle, exact).square().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert near(weight.grad, exact.grad)


def test_gradients_of_a_cast_model_are_near_those_of_float64():
    model = cast_model("bf16")
    model(data()).backward()
    for param, exact in zip(model.parameters(), exact_gradients()[1:], strict=True):
        assert near(param.grad, exact, 0.05)
