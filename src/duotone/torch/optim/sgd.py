"""Stochastic gradient descent on FP32 masters, with momentum, dampening, Nesterov and weight decay as in torch.

Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013), as torch writes it.
10 bytes per parameter with 16-bit weights and momentum: weight 2, tail 2, gradient 2, FP32 momentum 4.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.kernels.updates.sgd import UPDATE, SGDSettings
from duotone.torch.optim.base import check_settings
from duotone.torch.optim.fused import FusedOptimizer
from duotone.torch.optim.portable import PortableFormat

# torch counts no steps of this one
_PORTABLE = PortableFormat(
    counterpart=torch.optim.SGD,
    counts_steps=False,
    kind_settings=frozenset({"momentum", "dampening", "nesterov"}),
    implementation={"foreach": None, "differentiable": False, "fused": None},
    fixed={},
)


class SGD(FusedOptimizer):
    """SGD that updates FP32 masters of 16-bit weights, or FP32 weights.

    Args:
        params: parameters or parameter groups, as in torch.
        lr: learning rate, a number or a 0-d tensor.
        momentum: 0 for none; no buffer is kept then.
        dampening: of the momentum.
        weight_decay: added to the gradient as `weight_decay * weight`.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        seed: of the random bits where weights or moments are rounded stochastically; without meaning elsewhere.
        backend: whose kernels run: `"auto"` for those of the device, or `"reference"`, `"cpu"`, `"cuda"` by name.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is neither FP32, BF16 nor FP16.
        BackendError: there is no such backend; at a step, that it does not work here.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.5])
    >>> SGD([weight], lr=0.1).step()
    >>> weight.data
    tensor([0.9500])
    """

    _update = UPDATE
    _portable = _PORTABLE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        seed: int = 0,
        backend: kernels.Backend = "auto",
    ) -> None:
        check_settings(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise OptimizerError(
                f"nesterov needs a momentum and no dampening; got momentum {momentum}, dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults, backend)

    def _settings(self, group: dict[str, Any]) -> SGDSettings:
        return SGDSettings(
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            group["seed"],
        )
