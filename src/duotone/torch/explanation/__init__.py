"""Where precision is in a model: one forward pass, watched, and what stands out of it in words.

`explain` runs the model and returns an `Explanation`; `saved_for_backward` is its count of what autograd keeps, alone.
"""

from duotone.torch.explanation.explanation import (
    Cast,
    Explanation,
    ModuleDtypes,
    Operation,
    Output,
    RepeatedCast,
    Widening,
)
from duotone.torch.explanation.recording import explain
from duotone.torch.explanation.saved import SavedBytes, saved_for_backward

__all__ = [
    "Cast",
    "Explanation",
    "ModuleDtypes",
    "Operation",
    "Output",
    "RepeatedCast",
    "SavedBytes",
    "Widening",
    "explain",
    "saved_for_backward",
]
