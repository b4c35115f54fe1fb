"""Operations whose gradients torch's CPU kernels sum in 16 bits, run in FP32 inside instead.

In BF16 a running sum of ones stalls at 256, so on a CPU the gradient of an embedding's row that 1,000 tokens use, or of
a LayerNorm's bias, comes out several times too small (torch 2.13). Here the operands are widened and the result is
rounded once; autograd sees the conversions, so the sums of the backward pass are FP32 too. CUDA's kernels do that
themselves. Left out: indexing a weight with a tensor, whose gradient has the same fault; use an embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.torch.nested import cast_floating, map_tensors

# each function, and where it takes the arguments under which it is called as it is: those that write into the weight
# itself, or give it a sparse gradient
SUMS: Mapping[Callable[..., Any], Mapping[str, int]] = {
    F.embedding: {"max_norm": 3, "sparse": 6},
    F.embedding_bag: {"max_norm": 3, "sparse": 7},
    F.layer_norm: {},
}
_NARROW = (torch.bfloat16, torch.float16)


def sum_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `func` on FP32 operands and round the result to the narrowest dtype among them.

    Without an operand whose gradient would be a sum (a LayerNorm without weights), without one in 16 bits, or with an
    argument that needs the weight itself (`max_norm`, `sparse`), `func` is called as it is.

    Args:
        func: one of `SUMS`.
        args: its arguments, tensors in any dtype; the first is not a weight.
        kwargs: its named arguments.

    >>> weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    >>> rows = sum_in_float32(F.embedding, (torch.zeros(1000, dtype=torch.int64), weight), {})
    >>> rows.sum().backward()
    >>> rows.dtype, weight.grad.item()
    (torch.bfloat16, 1000.0)
    """
    operands, weights = _floating((args, dict(kwargs))), _floating((args[1:], dict(kwargs)))
    narrow = next((operand.dtype for operand in operands if operand.dtype in _NARROW), None)
    as_it_is = any(kwargs.get(name, args[at] if at < len(args) else None) for name, at in SUMS[func].items())
    if narrow is None or not weights or as_it_is:
        return func(*args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        result = func(*cast_floating(args, torch.float32), **cast_floating(dict(kwargs), torch.float32))
        return cast_floating(result, narrow)


def _floating(operands: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    map_tensors(note, operands)
    return found
