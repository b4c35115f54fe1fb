"""Lion on FP32 masters: Chen et al., "Symbolic discovery of optimization algorithms" (2302.06675), algorithm 2.

10 bytes per parameter with 16-bit weights: weight 2, tail 2, gradient 2, one FP32 moment 4; 8 with a BF16 moment. Its
updates all have the size of the learning rate, so that is three to ten times smaller than AdamW's, and the weight decay
as much larger (section 5 there).
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.kernels.updates.lion import UPDATE, LionSettings
from duotone.torch.optim.base import check_settings
from duotone.torch.optim.fused import FusedOptimizer
from duotone.torch.optim.portable import PortableFormat

# torch has no Lion; others keep its states so
_PORTABLE = PortableFormat(
    counterpart=None,
    counts_steps=False,
    kind_settings=frozenset({"betas"}),
    implementation={},
    fixed={},
)


class Lion(FusedOptimizer):
    """Lion that updates FP32 masters of 16-bit weights, or FP32 weights.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate, a number or a 0-d tensor.
        betas: how much of the momentum goes into the update, and how much of it stays; each in [0, 1).
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        seed: of the random bits where weights or moments are rounded stochastically; without meaning elsewhere.
        backend: whose kernels run: `"auto"` for those of the device, or `"reference"`, `"cpu"`, `"cuda"` by name.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is neither FP32, BF16 nor FP16.
        BackendError: there is no such backend; at a step, that it does not work here.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([0.5, -1e-3])
    >>> Lion([weight], lr=0.25).step()
    >>> weight.data
    tensor([0.7500, 2.2500])
    """

    _update = UPDATE
    _portable = _PORTABLE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        seed: int = 0,
        backend: kernels.Backend = "auto",
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise OptimizerError(f"betas are {betas}; each must be in [0, 1)")
        check_settings(lr=lr, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend)

    def _settings(self, group: dict[str, Any]) -> LionSettings:
        beta1, beta2 = group["betas"]
        return LionSettings(group["lr"], beta1, beta2, group["weight_decay"], group["maximize"], group["seed"])
