"""Rows added up by an index in FP32: `sums[v] = sum of rows[i] where index[i] == v`.

It is the gradient of a lookup. Where a table has many more rows than were looked up, only the rows that occur are
summed in FP32; they are rounded and laid into zeros of the table's dtype, so that no FP32 copy of the table exists. On
a CPU each sum is taken in the order of the index. Left out: that path under `torch.compile` and `torch.func`, and on
devices where finding the rows that occur would wait for the device; FP32 sums are returned there, and autograd rounds.
"""

import torch
from torch import Tensor

from duotone.torch.casting.float32_inside.autograd_function import is_eager


def grad_dtype_of(weight: Tensor) -> torch.dtype:
    """Return the dtype that autograd will give the gradient of `weight`.

    >>> grad_dtype_of(torch.ones(1, dtype=torch.float16, requires_grad=True))
    torch.float16
    """
    # a tensor that an operation made has no gradient of its own
    return (weight.grad_dtype if is_eager() and weight.is_leaf else weight.dtype) or torch.float32


def sum_rows(index: Tensor, rows: Tensor, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> Tensor:
    """Return the sums of slices of `rows` along `dim`, in FP32 or rounded to `dtype`.

    Args:
        index: where each slice belongs, `(n)` integers from 0 up to `shape[dim]`.
        rows: FP32; as `shape`, with `n` in the place of `shape[dim]`.
        shape: of the result; slices that no index names are zero.
        dim: the dimension, counted from the first.
        dtype: what autograd will round the result to.

    >>> sum_rows(torch.tensor([2, 2]), torch.ones(2, 1), (5, 1), 0, torch.bfloat16)
    tensor([[0.],
            [0.],
            [2.],
            [0.],
            [0.]], dtype=torch.bfloat16)
    """
    if dtype != torch.float32 and is_eager() and rows.is_cpu and 2 * len(index) < shape[dim]:
        present, positions = index.unique(return_inverse=True)
        sums = rows.new_zeros((*shape[:dim], len(present), *shape[dim + 1 :])).index_add_(dim, positions, rows)
        return rows.new_zeros(shape, dtype=dtype).index_copy_(dim, present.long(), sums.to(dtype))
    # on a CPU up to twenty times as fast as index_put
    return rows.new_zeros(shape).index_add_(dim, index, rows)
