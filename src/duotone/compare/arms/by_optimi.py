"""optimi: BF16 weights whose rounding errors are kept by Kahan summation, in BF16 too.

https://optimi.benjaminwarner.dev/kahan_summation: the model in BF16, and an optimizer of optimi's, which adds the
compensation by itself. 10 bytes per parameter with AdamW: weight 2, gradient 2, two BF16 moments 4, compensation 2. Its
AdamW has an eps of 1e-6 by default, the others 1e-8; that stays as it is.
"""

from duotone.compare.arms.loop_stepper import LoopStepper
from duotone.compare.arms.stepper import Assignment
from duotone.compare.arms.whole_bfloat16 import whole_bfloat16
from duotone.train import optimizer_arguments


def build(assignment: Assignment) -> LoopStepper:
    """Return what trains with optimi."""
    import optimi  # pyright: ignore[reportMissingImports]

    settings = assignment.settings
    model = whole_bfloat16(assignment.task.model, assignment.device)
    optimizer = {"adamw": optimi.AdamW, "lion": optimi.Lion, "sgd": optimi.SGD}[settings.optimizer]
    return LoopStepper(assignment, model, optimizer(model.parameters(), **optimizer_arguments(settings)))
