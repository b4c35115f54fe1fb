"""Where precision is in a program of JAX, which is traced and not run, and what stands out of it in words.

`explain` returns an `Explanation`; what that is made of stands in `records` and in `duotone.wording`.
"""

from duotone.jax.explanation.explanation import Explanation
from duotone.jax.explanation.tracing import explain

__all__ = ["Explanation", "explain"]
