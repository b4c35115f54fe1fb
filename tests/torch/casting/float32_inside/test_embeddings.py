"""Lookups in 16-bit tables: results are those of FP32 tables rounded once, gradients FP32 sums rounded once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import duotone.torch as dt
from duotone.torch.casting.float32_inside import FLOAT32_INSIDE, FLOAT32_INSIDE_ON_CPU

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TABLE = {**FLOAT32_INSIDE, **FLOAT32_INSIDE_ON_CPU}
ROWS = 3000


def inside(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return TABLE[func](func, args, kwargs)


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], direction: Tensor | None = None) -> list[Tensor]:
    """Return the result of `call` and its gradients along `direction`, of ones if there is none."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    result = call(*leaves)
    direction = torch.ones_like(result) if direction is None else direction.to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


BAGS = torch.arange(0, ROWS, 10)
LOOKUPS = {
    "rows": (F.embedding, (), {}),
    "rows with padding": (F.embedding, (), {"padding_idx": 1}),
    "rows with padding from the end": (F.embedding, (-3,), {}),
    "rows by frequency": (F.embedding, (), {"scale_grad_by_freq": True}),
    "sums": (F.embedding_bag, (BAGS, None, 2.0, False, "sum"), {}),
    "means": (F.embedding_bag, (BAGS,), {}),
    "means with padding": (F.embedding_bag, (), {"offsets": BAGS, "mode": "mean", "padding_idx": 1}),
    "means by frequency": (F.embedding_bag, (BAGS,), {"scale_grad_by_freq": True}),
    "largest": (F.embedding_bag, (BAGS,), {"mode": "max"}),
    "largest with padding": (F.embedding_bag, (BAGS,), {"mode": "max", "padding_idx": -3}),
}


def _exact_lookup(name: str, tokens: Tensor, weight: Tensor) -> Tensor:
    func, rest, options = LOOKUPS[name]
    if name == "means by frequency":
        # torch 2.13 divides by the frequency of another row here
        return F.embedding(tokens.view(300, 10), weight, scale_grad_by_freq=True).mean(1)
    if func is F.embedding_bag:
        rest, options = (BAGS, *rest[1:]), {key: value for key, value in options.items() if key != "offsets"}
    return func(tokens.view(-1) if func is F.embedding_bag else tokens, weight, *rest, **options)


@HALVES
@pytest.mark.parametrize("shape", [(ROWS,), (300, 10)], ids=["line", "table"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_those_of_float32_tables_rounded_once(dtype, shape, name, same_bits):
    torch.manual_seed(0)
    func, rest, options = LOOKUPS[name]
    if func is F.embedding_bag and len(shape) == 2:
        rest = (None, *rest[1:])
        options = {key: value for key, value in options.items() if key != "offsets"}
    tokens, weight = torch.randint(0, 3, shape), torch.randn(4, 2).to(dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        inside(func, tokens, weight.clone().requires_grad_(), *rest, **options)
    assert not any(x.is_floating_point() for x in kept)
    # of one sign, so that no sum cancels, and exact in 16 bits
    direction = (torch.rand(inside(func, tokens, weight, *rest, **options).shape) + 0.5).to(dtype)
    got, grad = gradients(lambda w: inside(func, tokens, w, *rest, **options), [weight], direction)
    expected, _ = gradients(lambda w: func(tokens, w.float(), *rest, **options).to(dtype), [weight], direction)
    assert same_bits(got, expected)
    _, exact = gradients(partial(_exact_lookup, name, tokens), [weight.double()], direction)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)
    # the last row is in no bag, and a padding row has no gradient
    padding = "padding" in name
    assert (grad == 0).all(dim=1).tolist() == [False, padding, False, True]
    # what it is for
    if name == "rows":
        _, plain = gradients(lambda w: func(tokens, w, *rest, **options), [weight], direction)
        assert (plain.double() - exact).abs().max() > 2


@HALVES
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["wide", "narrow"])
def test_bags_weigh_their_rows_in_another_dtype(dtype, weights, same_bits):
    torch.manual_seed(0)
    tokens, weight = torch.randint(0, 3, (300, 10)), torch.randn(4, 2).to(dtype)
    factors = torch.rand(300, 10).to(weights or dtype)

    def bag(call: Callable[..., Tensor], weight: Tensor, factors: Tensor) -> Tensor:
        return call(F.embedding_bag, tokens, weight, mode="sum", per_sample_weights=factors)

    def by_hand(func: Callable[..., Tensor], tokens: Tensor, weight: Tensor, **options: Any) -> Tensor:
        options["per_sample_weights"] = options["per_sample_weights"].float()
        return func(tokens, weight.float(), **options).to(dtype)

    got = gradients(partial(bag, inside), [weight, factors])
    expected = gradients(partial(bag, by_hand), [weight, factors])
    assert same_bits(got[0], expected[0])
    torch.testing.assert_close(got[1:], expected[1:], rtol=torch.finfo(dtype).eps, atol=0)
    # an FP32 table takes narrow factors, too
    assert bag(inside, weight.float(), factors.to(dtype)).dtype == torch.float32


@HALVES
def test_tables_that_torch_writes_into_or_that_get_sparse_gradients_stay_with_it(dtype):
    tokens = torch.tensor([1, 1])
    for func, between in ((F.embedding, (2.0, False)), (F.embedding_bag, (2.0, False, "sum"))):
        third = None if func is F.embedding else torch.tensor([0])
        weight = torch.full((4, 2), 3.0, dtype=dtype)
        inside(func, tokens, weight, third, 1.0)
        assert weight[1].norm().item() == pytest.approx(1.0, rel=0.01)
        assert weight[0].tolist() == [3.0, 3.0]
        weight.requires_grad_()
        inside(func, tokens, weight, third, None, *between, True).sum().backward()
        assert weight.grad.is_sparse


def test_lookups_of_nothing_and_of_rows_that_are_not_there():
    weight, none = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), torch.zeros(0, 4, dtype=torch.int64)
    for func in (F.embedding, F.embedding_bag):
        inside(func, none, weight).sum().backward()
        assert not weight.grad.any()
        with pytest.raises((IndexError, RuntimeError), match="index out of range"):
            inside(func, torch.tensor([[2]]), weight)
    with pytest.raises((AssertionError, RuntimeError, ValueError), match="adding_idx"):
        inside(F.embedding, none, weight, 2)
    assert (
        inside(F.embedding_bag, torch.zeros(0, dtype=torch.int64), weight, torch.zeros(3, dtype=torch.int64)).sum() == 0
    )


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_gradient_that_stays_in_float32_is_not_rounded(rows):
    weight = torch.ones(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = torch.float32
    inside(F.embedding, torch.zeros(257, dtype=torch.int64), weight).sum().backward()
    assert weight.grad[0].item() == 257


@HALVES
@pytest.mark.parametrize("padding", [None, 3])
def test_of_a_large_table_only_the_rows_that_occur_are_summed_in_float32(dtype, padding, same_bits):
    torch.manual_seed(0)
    tokens, weight = torch.randint(0, 7, (20, 30)) * 300, torch.randn(5000, 4).to(dtype)
    padding = None if padding is None else padding * 300
    direction = torch.randn(20, 30, 4).to(dtype)
    call = partial(inside, F.embedding, tokens, padding_idx=padding)
    seen: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float32)
            return result

    with Largest():
        got, grad = gradients(lambda table: call(weight=table), [weight], direction)
    assert max(seen) == 20 * 30 * 4
    expected, whole = gradients(
        lambda table: F.embedding(tokens, table.float(), padding).to(dtype), [weight], direction
    )
    assert same_bits(got, expected)
    assert same_bits(grad, whole)
    # and a second time, through the gradient
    cube = lambda table, function: function(table).float().pow(3).sum()  # noqa: E731
    twice = []
    for function in (lambda table: call(weight=table), lambda table: F.embedding(tokens, table.float(), padding)):
        leaf = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(cube(leaf, function), leaf, create_graph=True)
        twice.append(torch.autograd.grad(first.float().sum(), leaf)[0])
    assert twice[0].any()
    torch.testing.assert_close(*twice, rtol=0.02, atol=0.02)


def test_rows_of_bags_in_a_large_table_are_rounded_after_they_are_summed():
    # a thirteenth, rounded, is 0.3 % too large: more than half the spacing of BF16 numbers at 127
    tokens, weight = torch.full((127, 13), 2), torch.ones(5000, 1, dtype=torch.bfloat16, requires_grad=True)
    inside(F.embedding_bag, tokens, weight).sum(dtype=torch.float32).backward()
    assert weight.grad[2].item() == 127


@pytest.mark.parametrize(("dtype", "of_weights"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_elsewhere_the_gradient_of_weights_of_samples_is_taken_where_there_is_a_kernel(dtype, of_weights):
    # CUDA has none for BF16; nothing is computed here
    seen: list[torch.dtype] = []

    class Gradients(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._embedding_bag_per_sample_weights_backward.default:
                seen.extend(operand.dtype for operand in args[:2])
            return func(*args, **(kwargs or {}))

    table = torch.empty(8, 4, dtype=dtype, device="meta", requires_grad=True)
    weights = torch.empty(1, 3, dtype=dtype, device="meta", requires_grad=True)
    bags = torch.empty(1, 3, dtype=torch.int64, device="meta")
    with Gradients():
        inside(F.embedding_bag, bags, table, mode="sum", per_sample_weights=weights).sum().backward()
    assert seen == [of_weights] * 2
    assert weights.grad.dtype == table.grad.dtype == dtype


@pytest.mark.gpu
def test_weights_of_samples_on_a_gpu():
    (table, weights), bags = (torch.randn(8, 4), torch.rand(1, 3)), torch.tensor([[0, 1, 1]])

    def call(table: Tensor, weights: Tensor) -> Tensor:
        bags_there = bags.to(table.device)
        return inside(F.embedding_bag, bags_there, table, mode="sum", per_sample_weights=weights).float()

    expected = gradients(call, [table.bfloat16().float(), weights.bfloat16().float()])
    got = gradients(call, [table.bfloat16().cuda(), weights.bfloat16().cuda()])
    torch.testing.assert_close([each.float().cpu() for each in got], expected, rtol=0.01, atol=0.01)


def test_places_in_int32():
    model = dt.cast(torch.nn.Embedding(1000, 4), "bf16")
    model(torch.tensor([1, 2, 2], dtype=torch.int32)).sum().backward()
    assert model.weight.grad[:4, 0].tolist() == [0.0, 1.0, 2.0, 0.0]


@HALVES
def test_a_compiled_lookup_has_its_gradient(dtype):
    # torch 2.11's compiler gave zeros
    def look_up(weight: Tensor) -> Tensor:
        return inside(F.embedding, torch.tensor([[1, 2]]), weight)

    torch.compiler.reset()
    compiled = torch.compile(look_up, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(weight := torch.ones(4, 2, dtype=dtype, requires_grad=True)).sum(), weight)
    assert grad.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
