"""Where precision is in a model: one forward pass, watched, and what stands out of it in words.

`explain` runs the model and returns an `Explanation`.
"""

from duotone.torch.explanation.explanation import Explanation
from duotone.torch.explanation.recording import explain
from duotone.torch.explanation.records import (
    Cast,
    ModuleDtypes,
    Operation,
    Output,
    RepeatedCast,
    SavedForBackward,
    Widening,
)

__all__ = [
    "Cast",
    "Explanation",
    "ModuleDtypes",
    "Operation",
    "Output",
    "RepeatedCast",
    "SavedForBackward",
    "Widening",
    "explain",
]
