"""Which kernels carry attention out: those of `cpu.attention` where they work, and none, that is torch's, elsewhere.

They are tried once on ones, whose attention is one. Where they do not work (no Numba, no compiler's memory), that is
said once.
"""

from functools import cache
from types import ModuleType

import torch

from duotone.call_site import warn


@cache
def attention_kernels() -> ModuleType | None:
    """Return the module of this CPU's kernels for attention in BF16, or None if torch's are to run."""
    try:
        from duotone.torch.kernels.cpu import attention

        if not attention.is_available():
            return None
        ones = torch.ones(1, 1, 3, 64, dtype=torch.bfloat16)
        output, shift = attention.forward(ones, ones, ones, False, 1.0)
        grads = attention.backward(ones, ones, ones, ones, output, shift, False, 1.0)
        if bool((output == 1).all()) and [grad.sum().item() for grad in grads] == [0.0, 0.0, 192.0]:
            return attention
        problem = f"the attention of ones came out as {output.flatten()[0].item()}"
    except Exception as error:  # whatever a compiler that is missing or broken may raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    warn(f"the fused attention does not work here ({problem}); torch's runs instead, with the same accuracy, slower")
    return None
