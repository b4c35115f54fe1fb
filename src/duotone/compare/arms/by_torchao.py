"""torchao's 8-bit AdamW on BF16 weights, which it rounds stochastically, as its documentation recommends for them.

https://github.com/pytorch/ao/tree/main/torchao/optim. About 6 bytes per parameter: weight 2, gradient 2, two 8-bit
moments with an FP32 scale for each 256 elements. Tensors of less than 4,096 elements, or of no multiple of 256, have
BF16 moments, so they take 8. Its update is compiled by `torch.compile`, anew for each shape of a parameter, so the
first step takes long; on a CPU that needs a C++ compiler.
"""

from typing import Any

import torch

from duotone.compare.arms.loop_stepper import LoopStepper
from duotone.compare.arms.stepper import Assignment
from duotone.compare.arms.whole_bfloat16 import whole_bfloat16
from duotone.errors import ArmError
from duotone.train import optimizer_arguments


def build(assignment: Assignment) -> LoopStepper:
    """Return what trains with torchao.

    Raises:
        ArmError: the settings ask for something else than AdamW, or its update cannot be compiled here.
    """
    settings = assignment.settings
    if settings.optimizer != "adamw":
        raise ArmError(f'torchao has no 8-bit optimizer "{settings.optimizer}"; compare with --optimizer adamw')
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    _try_to_step(AdamW8bit, assignment.device)
    model = whole_bfloat16(assignment.task.model, assignment.device)
    optimizer = AdamW8bit(model.parameters(), bf16_stochastic_round=True, **optimizer_arguments(settings))
    return LoopStepper(assignment, model, optimizer)


def _try_to_step(optimizer_class: Any, device: torch.device) -> None:
    """Raise unless an update of a parameter of one element can be compiled: it would fail in the midst of training."""
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16, device=device))
    param.grad = torch.zeros_like(param)
    try:
        optimizer_class([param]).step()
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArmError(
            f"torchao's update is compiled by torch.compile, and that fails here: {first_line}; it needs a C++ "
            "compiler for a CPU, such as g++, and Triton for a GPU"
        ) from error
