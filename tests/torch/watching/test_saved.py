"""What autograd saves: each storage once, parameters apart, whoever else packs tensors."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from duotone.torch.watching import saved_for_backward


class Square(torch.autograd.Function):
    """Saves its input in FP32, whatever it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.float())
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def x(size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(1, 2, size, dtype=dtype).requires_grad_()


def test_a_storage_counts_once_and_whole():
    base = x(64)
    with saved_for_backward() as saved:
        # both factors, and a slice of the same storage
        result = base * base + (base[:4] * 2).exp().sum()
    assert saved.activation_bytes == {"float32": 64 * 4 + 4 * 4}
    assert result.requires_grad


def test_dtypes_are_told_apart():
    with saved_for_backward() as saved:
        x(8).exp()
        x(8, torch.bfloat16).exp()
        x(8)[torch.tensor([1, 2, 3])]
    assert saved.activation_bytes == {"float32": 32, "bfloat16": 16, "int64": 24}
    assert saved.total_activation_bytes == 72


def test_parameters_and_their_views_count_apart():
    linear = nn.Linear(4, 8, bias=False)
    with saved_for_backward(linear.parameters()) as saved:
        y = x(4) @ linear.weight.T
        y.sum() + (linear.weight[0] * x(4)).sum()
    assert saved.parameter_bytes == {"float32": 4 * 8 * 4}
    # two inputs
    assert saved.activation_bytes == {"float32": 2 * 4 * 4}


def test_freed_memory_that_is_used_again_counts_again():
    with saved_for_backward() as saved:
        for _ in range(5):
            x(1024).exp()
            gc.collect()
    assert saved.activation_bytes == {"float32": 5 * 1024 * 4}


def test_a_custom_function_is_counted():
    with saved_for_backward() as saved:
        y = Square.apply(x(8, torch.bfloat16))
    assert saved.activation_bytes == {"float32": 32}
    y.sum().backward()


def test_what_an_inner_pair_keeps_is_counted():
    def pack(tensor: Tensor) -> dict[str, object]:
        return {"narrow": (tensor.to(torch.bfloat16),), "dtype": tensor.dtype}

    def unpack(packed: dict) -> Tensor:
        return packed["narrow"][0].to(packed["dtype"])

    given = x(8)
    with saved_for_backward() as saved:
        with saved_tensors_hooks(pack, unpack):
            first = Square.apply(given)
            second = given.exp()
        third = given.sin()
    assert saved.activation_bytes == {"bfloat16": 2 * 16, "float32": 32}
    (first + second + third).sum().backward()
    assert torch.allclose(given.grad, 2 * given + given.exp() + given.cos(), rtol=1e-2)


def test_checkpointed_activations_are_not_there():
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    given = torch.ones(4, 8, requires_grad=True)
    with saved_for_backward(layers.parameters()) as plain:
        layers(given)
    with saved_for_backward(layers.parameters()) as saved:
        result = checkpoint(layers, given, use_reentrant=False)
        # what a recomputation saves is there for a moment only
        result.sum().backward()
    assert saved.activation_bytes == {"float32": 4 * 8 * 4}
    assert plain.activation_bytes == {"float32": 3 * 4 * 8 * 4}


def test_an_outer_pair_is_still_called():
    packed, unpacked = [], []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.to(torch.float64)

    def unpack(kept: Tensor) -> Tensor:
        unpacked.append(kept)
        return kept.float()

    given = x(8)
    with saved_tensors_hooks(pack, unpack), saved_for_backward() as saved:
        result = given.exp()
    result.sum().backward()
    assert (len(packed), len(unpacked)) == (1, 1)
    assert saved.activation_bytes == {"float64": 64}


def test_counts_nest():
    with saved_for_backward() as outer:
        x(8).exp()
        with saved_for_backward() as inner, save_on_cpu():
            x(4).exp()
        x(2).exp()
    assert inner.total_activation_bytes == 16
    assert outer.total_activation_bytes == 32 + 16 + 8


def test_nothing_is_left_behind():
    before = saved_tensors_hooks.__enter__

    def fail() -> None:
        x(8).exp()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), saved_for_backward() as saved:
        fail()
    x(8).exp()
    assert saved_tensors_hooks.__enter__ is before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert saved.total_activation_bytes == 32


def test_sparse_tensors_and_no_grad():
    sparse = torch.eye(4).to_sparse().requires_grad_()
    with saved_for_backward() as saved:
        torch.sparse.mm(sparse, torch.ones(4, 2, requires_grad=True))
        with torch.no_grad():
            x(1024).exp()
    # indices and values of the one, all of the other
    assert saved.activation_bytes == {"int64": 2 * 4 * 8, "float32": 4 * 4 + 4 * 2 * 4}
