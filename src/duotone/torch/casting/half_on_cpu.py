"""FP16 storage with FP32 arithmetic on CPUs that have no FP16 matrix product.

Such CPUs emulate FP16 products several times slower than FP32 ones. Here the operands of a product, a convolution
or an attention are rounded to FP16, widened, multiplied in FP32 and the result rounded once to FP16, which is what a
tensor core does. Autograd sees the conversions, so the backward products take the same way without any mode.
It saves the operands in 16 bits, as `widened` does. Left out: the FP32 values inside a function of several steps (a
recurrent network's gates, the projections of `multi_head_attention_forward`), which are saved in FP32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from duotone.call_site import warn
from duotone.torch.casting.widened import call_widened
from duotone.torch.internals.dispatch import has_half_products


def cpu_has_half_products() -> bool:
    """Return whether this CPU multiplies matrices in FP16 itself."""
    return has_half_products()


@functools.cache
def say_once_how_half_runs_on_cpu() -> None:
    """Warn, the first time, if FP16 products on this CPU run in FP32 arithmetic."""
    if not cpu_has_half_products():
        warn(
            "this CPU has no FP16 matrix products: they run in FP32 arithmetic on FP16 values, at FP32's speed; "
            'policy "bf16" is the faster choice where the CPU has BF16',
        )


def multiply_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on operands rounded to FP16 and widened to FP32, and round its FP32 results to FP16.

    Rounding is to nearest even: NaN stays NaN, +-0 and subnormals are kept, beyond 65504 lies Inf. A call with `out=`
    is left alone, as under autocast.

    Args:
        func: a product, a convolution, an attention, a recurrent network, ...; it changes no operand in place.
        args: its arguments, nested in tuples, lists and dicts; FP32, BF16 and FP16 tensors are operands, others stay.
        kwargs: its named arguments.

    Returns:
        What `func` returns, FP32 tensors in it as FP16.

    Raises:
        OperationError: (a `RuntimeError`) in backward, if a 16-bit operand was changed in place since.

    >>> ones = torch.ones(1, 4096, dtype=torch.float16)
    >>> multiply_in_float32(torch.matmul, (ones, ones.T), {})
    tensor([[4096.]], dtype=torch.float16)
    """
    return call_widened(func, args, kwargs, operand=torch.float16, result=torch.float16)
