"""What an update reads and writes besides gradients and moments: weights, their tails, and their step counts."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Rounding(StrEnum):
    """How an updated FP32 value becomes a 16-bit weight that has no master."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True)
class Weights:
    """Parallel lists over the parameters of one update.

    Attributes:
        values: resident weights in FP32, BF16 or FP16.
        tails: int16 tails shaped like the weights; None where the weight is FP32 or has no master.
        steps: int64, 0-d: how often each parameter has been updated.
        indices: each parameter's index in its optimizer.
        roundings: how each 16-bit weight without a tail is rounded; without meaning for the others.
        seed: of the random bits that stochastic rounding draws.
    """

    values: list[Tensor]
    tails: list[Tensor | None]
    steps: list[Tensor]
    indices: list[int]
    roundings: list[Rounding]
    seed: int
