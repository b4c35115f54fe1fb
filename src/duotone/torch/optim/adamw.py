"""AdamW on FP32 masters: Loshchilov and Hutter, "Decoupled weight decay regularization" (1711.05101).

14 bytes per parameter with 16-bit weights: weight 2, tail 2, gradient 2, two FP32 moments 8.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.optim.base import MasterOptimizer


class AdamW(MasterOptimizer):
    """AdamW that updates FP32 masters of 16-bit weights, or FP32 weights.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        seed: of the random bits for weights that are rounded stochastically; without meaning elsewhere.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is neither FP32, BF16 nor FP16.

    >>> import duotone.torch as dt
    >>> model = dt.cast(torch.nn.Linear(2, 1), "bf16")
    >>> optimizer = AdamW(model.parameters(), lr=1e-2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise OptimizerError(f"betas are {betas}; each must be in [0, 1)")
        if eps < 0.0 or weight_decay < 0.0 or (not isinstance(lr, Tensor) and lr < 0.0):
            raise OptimizerError(f"lr is {lr}, eps {eps}, weight_decay {weight_decay}; none may be negative")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _new_moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(param, dtype=torch.float32, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32, requires_grad=False),
            "beta_products": torch.ones(2, dtype=torch.float64, device=param.device),
        }

    def _update(
        self,
        group: dict[str, Any],
        weights: kernels.Weights,
        grads: list[Tensor],
        states: list[dict[str, Any]],
        grad_multiplier: Tensor,
        found_inf: Tensor,
    ) -> None:
        kernels.adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["beta_products"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_multiplier=grad_multiplier,
            found_inf=found_inf,
        )
