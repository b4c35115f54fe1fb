"""The loss of a last linear layer by chunks: FP64's loss and gradients, and never all of its logits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.errors import OperationError
from duotone.train.tasks.gpt import GPT, GPTConfig

ROWS, WIDTH, CLASSES = 37, 24, 300


def problem(dtype=torch.float32, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    x, matrix, bias = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (classes, WIDTH), (classes,))
    )
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    target[3] = -100
    return [each.to(dtype).requires_grad_() for each in (x, matrix / 3, bias)], target, torch.rand(classes) + 0.1


def exact(leaves, target, weight=None, reduction="mean"):
    """Return loss and gradients in FP64, of the rounded operands."""
    wide = [each.detach().double().requires_grad_() for each in leaves]
    weight = None if weight is None else weight.double()
    loss = F.cross_entropy(F.linear(*wide), target, weight, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_are_those_of_fp64(dtype, weighted, reduction):
    leaves, target, weight = problem(dtype)
    options = {"weight": weight if weighted else None, "reduction": reduction}
    expected, expected_grads = exact(leaves, target, **options)
    x, matrix, bias = leaves
    for rows in (1, 5, 37, None):
        loss = dt.linear_cross_entropy(x, matrix, target, linear_bias=bias, rows_at_once=rows, **options)
        grads = torch.autograd.grad(loss.sum(), leaves)
        # logits are rounded once, their gradients once more
        eps = torch.finfo(dtype).eps
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=2 * eps, atol=8 * eps)
        for leaf, grad, wide in zip(leaves, grads, expected_grads, strict=True):
            assert grad.dtype == leaf.dtype
            # a sum of a thousand products has an error of some units in FP32 itself
            error = (grad.double() - wide).norm() / wide.norm()
            assert error < (eps if grad.itemsize == 2 else 8 * eps)


def test_sums_over_chunks_are_float32():
    # 1,000 chunks whose gradients are alike: BF16 would stop at 256 of them
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    matrix = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1000, dtype=torch.int64)
    dt.linear_cross_entropy(x, matrix, target, reduction="sum", rows_at_once=1).backward()
    assert matrix.grad.flatten().tolist() == [-500.0, 500.0]


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max([self.most, *[each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]])
        return result


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_logits_are_never_whole_and_only_operands_are_kept(policy):
    torch.manual_seed(0)
    model = dt.cast(Head(), policy)
    x, target = torch.randn(8, 50, 16), torch.randint(0, 100, (8, 50))
    kept: list[Tensor] = []
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(x, target)
        loss.backward()
    # a chunk's logits, beside 8 * 50 * 16 elements of input
    assert seen.most == max(20 * 100, 8 * 50 * 16)
    assert max(each.numel() for each in kept) == 8 * 50 * 16
    exact_loss = F.cross_entropy(F.linear(x, model.head.weight.float()).flatten(0, 1), target.flatten())
    assert loss.dtype == torch.float32
    assert abs(loss - exact_loss) < 0.01
    assert model.head.weight.grad.dtype == model.head.weight.dtype


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 100, bias=False)

    def forward(self, x, target):
        return dt.linear_cross_entropy(x, self.head.weight, target, rows_at_once=20)


def test_under_autocast_products_are_16_bit():
    leaves, target, _ = problem()
    x, matrix, bias = leaves
    with dt.autocast("cpu", torch.bfloat16):
        loss = dt.linear_cross_entropy(x, matrix, target, linear_bias=bias, rows_at_once=9)
    loss.backward()
    rounded = [each.detach().bfloat16() for each in leaves]
    expected, grads = exact(rounded, target)
    assert abs(loss.item() - expected.item()) < 0.02
    for leaf, wide in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - wide).norm() / wide.norm() < 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_transforms_compiled_and_checkpointed_code(dtype):
    leaves, target, weight = problem(dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}

    def loss(x, matrix, bias):
        return dt.linear_cross_entropy(x, matrix, target, linear_bias=bias, weight=weight, rows_at_once=10)

    def plain(x, matrix, bias):
        return F.cross_entropy(F.linear(x, matrix, bias).float(), target, weight)

    seconds = []
    for call in (loss, plain):
        grads = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), leaves))
    torch.testing.assert_close(*seconds, **tolerance)
    expected = torch.autograd.grad(plain(*leaves), leaves)
    for got in (
        torch.func.grad(loss, argnums=(0, 1, 2))(*leaves),
        torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves),
        torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves),
    ):
        torch.testing.assert_close(got, expected, **tolerance)


def test_only_what_is_wanted_is_computed():
    (x, matrix, bias), target, _ = problem()
    for wanted in ([matrix], [x], [bias], [x, bias]):
        for each in (x, matrix, bias):
            each.requires_grad_(any(each is one for one in wanted))
        loss = dt.linear_cross_entropy(x, matrix, target, linear_bias=bias, rows_at_once=8)
        grads = torch.autograd.grad(loss, wanted)
        expected = torch.autograd.grad(F.cross_entropy(F.linear(x, matrix, bias), target), wanted)
        torch.testing.assert_close(grads, expected)


def test_nothing_to_add_up():
    matrix = torch.ones(3, 2, requires_grad=True)
    none = torch.ones(0, dtype=torch.int64)
    assert dt.linear_cross_entropy(torch.ones(0, 2), matrix, none).isnan()
    assert dt.linear_cross_entropy(torch.ones(0, 2), matrix, none, reduction="sum") == 0
    assert dt.linear_cross_entropy(torch.ones(4, 2), matrix, torch.full((4,), -100)).isnan()


def test_what_does_not_fit_is_refused():
    x, matrix, target = torch.ones(4, 2), torch.ones(3, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(OperationError, match=r"got input \(4, 2\), linear_weight \(3, 2\) and target \(3,\)"):
        dt.linear_cross_entropy(x, matrix, target[1:])
    with pytest.raises(OperationError, match="linear_cross_entropy got input"):
        dt.linear_cross_entropy(x, matrix.t(), target)
    for classes, options in ((target.float(), {}), (target, {"reduction": "median"}), (target, {"rows_at_once": 0})):
        with pytest.raises(OperationError, match="linear_cross_entropy takes integers as target"):
            dt.linear_cross_entropy(x, matrix, classes, **options)
    with pytest.raises(IndexError):
        dt.linear_cross_entropy(x, matrix, target + 3)


@pytest.mark.parametrize("policy", [None, "bf16"])
def test_a_gpt_with_it_has_the_loss_of_one_without(policy):
    losses, grads = [], []
    for chosen in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(layers=1, heads=2, width=32, context=16, linear_cross_entropy=chosen))
        model = model if policy is None else dt.cast(model, policy)
        tokens = torch.randint(256, (2, 17))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        grads.append(model.head.weight.grad.float())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-4)
