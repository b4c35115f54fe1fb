"""Indexing and its like: results are torch's own, gradients are FP32 sums rounded once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duotone.torch.casting.float32_inside import FLOAT32_INSIDE

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
GETITEM = Tensor.__getitem__
MANY = 3000

torch.manual_seed(0)
ROW, COLUMN, TABLE = torch.randint(-4, 4, (MANY,)), torch.randint(0, 5, (MANY,)), torch.randint(0, 3, (60, 50))
MASK = torch.tensor([True, False, True, True])
ALL = slice(None)
# indices into a tensor of (4, 5, 3) among which an integer tensor is
GATHERING = {
    "rows": ROW,
    "rows in a tuple": (ROW,),
    "int32": ROW.int(),
    "a table of rows": TABLE,
    "columns": (ALL, COLUMN),
    "the last dimension": (..., TABLE),
    "every second column": (ALL, slice(None, None, 2), TABLE),
    "points": (ROW, COLUMN),
    "the same twice": (TABLE, TABLE),
    "points apart": (ROW, ALL, COLUMN.clamp(max=2)),
    "points around a new dimension": (ROW, None, COLUMN),
    "points around a number": (ROW, 2, COLUMN.clamp(max=2)),
    "points of every dimension": (ROW, COLUMN, TABLE.view(-1)),
    "tables of points": (TABLE, TABLE[:, :1]),
    "a number first": (1, COLUMN),
    "a number from the end": (-1, ..., TABLE),
    "a number in a tensor": (torch.tensor(2), COLUMN),
    "a number of NumPy": (np.int64(2), COLUMN),
    "new dimensions": (None, ROW, None, ..., None),
    "a mask beside it": (MASK, torch.tensor([0, 0, 4])),
    "a mask of two dimensions beside it": (torch.ones(4, 5, dtype=torch.bool), torch.zeros(20, dtype=torch.int64)),
    "a list": [0, 0, 3],
    "a list in a tuple": (ALL, [0, 0, 3]),
    "an empty tensor": torch.zeros(0, dtype=torch.int64),
}
STRAIGHT = {
    "a number": 1,
    "a slice": slice(1, 3),
    "numbers": (1, 2),
    "an ellipsis": ...,
    "a new dimension": None,
    "a number in a tensor": torch.tensor(1),
    "a mask": MASK,
    "a mask of everything": torch.ones(4, 5, 3, dtype=torch.bool),
    "a truth": (True, ROW),
    "a nested list": ([[0, 1], [1, 0]],),
    "an array": np.array([0, 0]),
}
OTHERS = {
    "index_select": (torch.index_select, (1, COLUMN), {}),
    "index_select by a method": (Tensor.index_select, (), {"dim": -1, "index": COLUMN.int().clamp(max=2)}),
    "index_select by a number": (torch.index_select, (0, torch.tensor(3)), {}),
    "gather": (torch.gather, (1, TABLE.view(-1)[:36].view(4, 3, 3)), {}),
    "gather by a method": (Tensor.gather, (), {"dim": -1, "index": TABLE.view(-1)[:2000].view(4, 5, 100)}),
    "take_along_dim": (torch.take_along_dim, (TABLE.view(-1)[:2000].view(4, 5, 100), 2), {}),
    "take_along_dim, broadcast": (Tensor.take_along_dim, (TABLE.view(1, 1, -1), -1), {}),
    "take_along_dim, of all": (Tensor.take_along_dim, (TABLE,), {}),
    "take": (torch.take, (torch.cat([TABLE, TABLE - 60]),), {}),
    "take by a method": (Tensor.take, (), {"index": torch.tensor(59)}),
}


def inside(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return FLOAT32_INSIDE[func](func, args, kwargs)


def assert_exact(call: Callable[[Callable[..., Any], Tensor], Tensor], x: Tensor, same_bits: Any) -> None:
    """Assert that `call` gives torch's result and the gradient of its FP64 twin, rounded once."""
    x, twin = x.requires_grad_(), x.detach().double().requires_grad_()
    got, exact = call(inside, x), call(lambda function, *args, **kwargs: function(*args, **kwargs), twin)
    assert same_bits(got.detach().contiguous(), exact.detach().to(x.dtype).contiguous())
    # of one sign, so that no sum cancels, and exact in 16 bits
    direction = (torch.rand(got.shape) + 0.5).to(x.dtype)
    (grad,) = torch.autograd.grad(got, x, direction)
    (expected,) = torch.autograd.grad(exact, twin, direction.double())
    assert grad.dtype == x.dtype
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(x.dtype).eps * 0.51, atol=1e-7)


@HALVES
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", GATHERING)
def test_indexing(dtype, layout, name, same_bits):
    x = torch.randn(4, 5, 3) if layout == "contiguous" else torch.randn(3, 5, 4).permute(2, 1, 0)
    x = x.to(dtype).requires_grad_()
    assert_exact(lambda call, source: call(GETITEM, source, GATHERING[name]), x.detach(), same_bits)
    assert "Index" not in type(inside(GETITEM, x, GATHERING[name]).grad_fn).__name__


@pytest.mark.parametrize("name", STRAIGHT)
def test_what_has_no_sum_goes_to_torch_as_it_is(name, same_bits):
    x, seen = torch.randn(4, 5, 3, dtype=torch.bfloat16, requires_grad=True), []
    got = FLOAT32_INSIDE[GETITEM](lambda *args: seen.append(args) or GETITEM(*args), (x, STRAIGHT[name]), {})
    assert seen[0][1] is STRAIGHT[name]
    assert len(seen) == 1
    assert same_bits(got.detach().contiguous(), GETITEM(x, STRAIGHT[name]).detach().contiguous())


@HALVES
@pytest.mark.parametrize("name", OTHERS)
def test_functions(dtype, name, same_bits):
    func, rest, options = OTHERS[name]
    assert_exact(lambda call, x: call(func, x, *rest, **options), torch.randn(4, 5, 3).to(dtype), same_bits)


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, True), (torch.bfloat16, False)])
def test_without_a_gradient_in_16_bits_torch_is_called(dtype, grad):
    x = torch.ones(4, 5, 3, dtype=dtype, requires_grad=grad)
    names = {"Index", "IndexSelect", "Gather", "View", "Take"}
    for func, rest, options in [*OTHERS.values(), (GETITEM, (ROW,), {})]:
        node = inside(func, x, *rest, **options).grad_fn
        assert node is None if not grad else type(node).__name__.removesuffix("Backward0") in names
    with torch.no_grad():
        assert inside(GETITEM, torch.ones(4, dtype=dtype, requires_grad=True), ROW).grad_fn is None


def test_arguments_that_torch_alone_understands():
    x, index = torch.ones(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4, dtype=torch.int64)
    for func, rest in (
        (torch.index_select, (0, index[0])),
        (torch.gather, (0, index)),
        (torch.take_along_dim, (index, 0)),
        (torch.take, (index,)),
    ):
        out = torch.empty(0, dtype=torch.bfloat16)
        assert inside(func, x, *rest, out=out) is out
        assert out.shape == (4, 4)
    x.requires_grad_()
    inside(torch.gather, x, 0, index, sparse_grad=True).sum().backward()
    assert x.grad.is_sparse


def test_indices_that_are_not_there_are_refused_as_by_torch():
    x, index = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True), torch.tensor([2])
    for func, rest in (
        (GETITEM, (index,)),
        (GETITEM, ((index, index),)),
        (GETITEM, ((0, 0, index),)),
        (GETITEM, ((..., ..., index),)),
        (torch.index_select, (0, index)),
        (torch.index_select, (2, index)),
        (torch.gather, (0, index[None])),
        (torch.gather, (2, index[None])),
        (torch.take_along_dim, (index[None], 2)),
        (torch.take_along_dim, (index, 0)),
        (torch.take, (index + 2,)),
    ):
        with pytest.raises((IndexError, RuntimeError)) as theirs:
            func(x, *rest)
        with pytest.raises(theirs.type):
            inside(func, x, *rest)


def test_sums_inside_vmap_are_of_float32_too():
    index = torch.zeros(MANY, dtype=torch.int64)
    x = torch.ones(2, 3, dtype=torch.bfloat16)

    def total(row: Tensor) -> Tensor:
        return inside(GETITEM, row, index).sum() + inside(torch.gather, row, 0, index).sum()

    expected = torch.tensor([[2.0 * MANY, 0, 0]] * 2).bfloat16()
    assert torch.equal(torch.func.vmap(torch.func.grad(total))(x), expected)
    assert torch.equal(torch.func.grad(lambda rows: torch.func.vmap(total)(rows).sum())(x), expected)
    # an index of its own for each, into one row that they share
    each = torch.func.vmap(lambda places: torch.func.grad(lambda row: inside(GETITEM, row, places).sum())(x[0]))
    assert torch.equal(each(torch.stack([index, index + 2])), torch.tensor([[MANY, 0, 0], [0, 0, MANY]]).bfloat16())


@pytest.mark.parametrize("name", ["rows", "a table of rows", "the last dimension", "points apart", "a number first"])
def test_compiled_indexing(name):
    torch._dynamo.reset()
    x = torch.ones(4, 5, 3, dtype=torch.bfloat16, requires_grad=True)

    def call(source: Tensor) -> Tensor:
        return inside(GETITEM, source, GATHERING[name]).sum()

    torch.compile(call, backend="aot_eager", fullgraph=True)(x).backward()
    (expected,) = torch.autograd.grad(call(x), x)
    assert torch.equal(x.grad, expected)
