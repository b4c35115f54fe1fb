"""The step's operations in Triton, for CUDA devices: `reference.py`, bit for bit, in one pass over memory.

Kernels read a table of raw addresses, so that a step is one launch for coefficients and one for each form of storage,
however many parameters there are. Nothing here waits for the device. A step may be captured in a CUDA graph once one
has run eagerly, which compiles the kernels. Triton's interpreter runs the same kernels on CPU tensors in tests; speed,
graphs and streams have not been measured on a GPU yet.
"""

from collections.abc import Sequence

from torch import Tensor

from duotone.torch.kernels.cuda import launch
from duotone.torch.kernels.operands import AdamWSettings, LionSettings, Operand, SGDSettings

__all__ = ["adamw", "grad_stats", "lion", "sgd"]


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`, as `reference.grad_stats` does."""
    return launch.sum_of_squares(grads, inverse_scale)


def adamw(
    operands: Sequence[Operand], settings: Sequence[AdamWSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of AdamW, as `reference.adamw` does, operands dense and in one layout each."""
    launch.update("adamw", operands, settings, grad_multiplier, found_inf)


def sgd(
    operands: Sequence[Operand], settings: Sequence[SGDSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of SGD, as `reference.sgd` does; arguments as in `adamw`."""
    launch.update("sgd", operands, settings, grad_multiplier, found_inf)


def lion(
    operands: Sequence[Operand], settings: Sequence[LionSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of Lion, as `reference.lion` does; arguments as in `adamw`."""
    launch.update("lion", operands, settings, grad_multiplier, found_inf)
