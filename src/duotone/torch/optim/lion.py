"""Lion on FP32 masters: Chen et al., "Symbolic discovery of optimization algorithms" (2302.06675), algorithm 2.

10 bytes per parameter with 16-bit weights: weight 2, tail 2, gradient 2, one FP32 moment 4; 8 with a BF16 moment. Its
updates all have the size of the learning rate, so that is three to ten times smaller than AdamW's, and the weight decay
as much larger (section 5 there).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.optim.fused import FusedOptimizer
from duotone.torch.optim.portable import PortableForm

# torch has no Lion; others keep its states so
_PORTABLE = PortableForm(
    moments=("exp_avg",),
    counts_steps=False,
    telling=frozenset({"betas"}),
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
        if weight_decay < 0.0 or (not isinstance(lr, Tensor) and lr < 0.0):
            raise OptimizerError(f"lr is {lr}, weight_decay {weight_decay}; neither may be negative")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend)

    @property
    def _portable(self) -> PortableForm:
        return _PORTABLE

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _settings(self, group: dict[str, Any]) -> kernels.LionSettings:
        beta1, beta2 = group["betas"]
        return kernels.LionSettings(group["lr"], beta1, beta2, group["weight_decay"], group["maximize"], group["seed"])

    def _update(
        self, operands: Sequence[kernels.Operand], settings: list[Any], grad_multiplier: Tensor, found_inf: Tensor
    ) -> None:
        kernels.lion(operands, settings, grad_multiplier, found_inf, self.backend)
