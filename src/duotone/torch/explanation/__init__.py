"""Where precision is in a model: one forward pass, watched, and what stands out of it in words.

`explain` runs the model and returns an `Explanation`; what that is made of stands in `records`.
"""

from duotone.torch.explanation.explanation import Explanation
from duotone.torch.explanation.recording import explain

__all__ = ["Explanation", "explain"]
