"""Findings that explain has in the same words for every framework."""

from collections.abc import Sequence
from typing import Protocol

from duotone.wording.words import label, size

NOTHING = "nothing stands out: every floating-point dtype is where the policy puts it"


class Result(Protocol):
    """What a model or a function returns.

    Attributes:
        shape: of the array.
        computed_dtype: what it was before it was cast to what it is.
        result_bytes: of what it is.
    """

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def computed_dtype(self) -> str: ...
    @property
    def result_bytes(self) -> int: ...


def wide_results(results: Sequence[Result], whole: str) -> str:
    """Return the finding about FP32 results that were computed in 16 bits.

    Args:
        results: one or more.
        whole: what they leave: "model" or "function".
    """
    narrow = results[0].computed_dtype
    shape = " x ".join(map(str, max(results, key=lambda each: each.result_bytes).shape))
    leave = "the result leaves" if len(results) == 1 else f"{len(results)} results leave"
    return (
        f"{leave} the {whole} in FP32 although computed in {label(narrow)}: "
        f"{size(sum(each.result_bytes for each in results))} ({shape}); with output={narrow} in the policy it takes "
        f"half, with the loss inside the {whole} nothing"
    )
