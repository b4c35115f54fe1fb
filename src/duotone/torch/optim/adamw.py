"""AdamW on FP32 masters: Loshchilov and Hutter, "Decoupled weight decay regularization" (1711.05101).

14 bytes per parameter with 16-bit weights: weight 2, tail 2, gradient 2, two FP32 moments 8; 10 with BF16 moments
(`state=bfloat16` in the policy), which are rounded stochastically.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.kernels.updates.adamw import UPDATE, AdamWSettings
from duotone.torch.optim.base import check_settings
from duotone.torch.optim.fused import FusedOptimizer
from duotone.torch.optim.portable import PortableFormat

_PORTABLE = PortableFormat(
    counterpart=torch.optim.AdamW,
    counts_steps=True,
    kind_settings=frozenset({"betas", "eps"}),
    implementation={"foreach": None, "capturable": False, "differentiable": False, "fused": None},
    fixed={"amsgrad": False, "decoupled_weight_decay": True},
)


class AdamW(FusedOptimizer):
    """AdamW that updates FP32 masters of 16-bit weights, or FP32 weights.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        seed: of the random bits where weights or moments are rounded stochastically; without meaning elsewhere.
        backend: whose kernels run: `"auto"` for those of the device, or `"reference"`, `"cpu"`, `"cuda"` by name.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is neither FP32, BF16 nor FP16.
        BackendError: there is no such backend; at a step, that it does not work here.

    >>> import duotone.torch as dt
    >>> model = dt.cast(torch.nn.Linear(2, 1), "bf16")
    >>> optimizer = AdamW(model.parameters(), lr=1e-2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    """

    _update = UPDATE
    _portable = _PORTABLE

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
        backend: kernels.Backend = "auto",
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise OptimizerError(f"betas are {betas}; each must be in [0, 1)")
        check_settings(lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend)

    def _settings(self, group: dict[str, Any]) -> AdamWSettings:
        beta1, beta2 = group["betas"]
        return AdamWSettings(
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"], group["seed"]
        )
