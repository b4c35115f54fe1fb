"""What torch's optimizers and a loss scaler agree on, for optimizers that keep no masters.

An optimizer whose `_step_supports_amp_scaling` is true takes the scale out and skips by itself, on the device. During
its `step` it reads two of its own attributes:

- `grad_scale`, FP32, 0-d: its kernel divides gradients by it; None for gradients that carry no scale.
- `found_inf`, FP32, 0-d: if it is 1, the kernel leaves weights and state alone.

Nothing of it is documented; it is read in torch's `torch/amp/grad_scaler.py` (`GradScaler.step`) and
`torch/optim/adam.py`. An optimizer without it is stepped by a host that has waited for `found_inf`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.internals.training import takes_scale
from duotone.torch.optim.base import MasterOptimizer

# their fused kernels write FP16 weights, rounded, without a master
_FUSED = (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer takes the scale out and skips by itself, in all of its groups.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> skips_on_device(torch.optim.SGD([weight])), skips_on_device(torch.optim.SGD([weight], fused=True))
    (False, True)
    """
    # torch's refuse to skip in a group that a loaded state has made one of another implementation
    return takes_scale(optimizer) and all(group.get("fused", True) for group in optimizer.param_groups)


def takes_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's `step` has a `grad_scaler=`, as torch asked for before there were attributes."""
    return "grad_scaler" in inspect.signature(optimizer.step).parameters


def fused_step(
    optimizer: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor, /, *args: Any, **kwargs: Any
) -> Any:
    """Step an optimizer that `skips_on_device`; nothing changes if `found_inf` is true.

    Args:
        optimizer: as above.
        grad_scale: FP32, 0-d; what gradients are divided by, or None.
        found_inf: bool, 0-d, or a number that is 0 for false.
        args: for the optimizer's `step`.
        kwargs: likewise.

    Returns:
        What `step` returned.
    """
    if _lacks_momentum(optimizer) and found_inf:
        # the kernel would skip, and keep momentum that was allocated and never written
        return None
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = grad_scale, found_inf.float()
    try:
        return fused.step(*args, **kwargs)
    finally:
        del fused.grad_scale, fused.found_inf


def hides_masters(optimizer: torch.optim.Optimizer) -> OptimizerError | None:
    """Return what to raise for a framework's wrapper that hides one of Duotone's optimizers; None for any other."""
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, MasterOptimizer):
        return None
    return OptimizerError(
        f"a {type(optimizer).__name__} hides the {type(inner).__name__} in it, which can take the scale out and be "
        "skipped; give that one to the step"
    )


def loses_float16_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's fused kernel takes FP16 weights and keeps no masters of them, as torch's do."""
    return isinstance(optimizer, _FUSED)


def _lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and any(
        optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"] != 0
        for param in group["params"]
        if param.grad is not None
    )
