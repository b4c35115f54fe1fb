"""The errors that a run ends with if it only skips, in words that all frameworks share."""

from typing import Protocol

from duotone.errors import LossScaleCollapse, NonFiniteLoss


class Settings(Protocol):
    """A loss scale's settings, as `duotone.loss_scale.LossScale` has them."""

    @property
    def is_none(self) -> bool: ...
    @property
    def is_dynamic(self) -> bool: ...
    @property
    def min_scale(self) -> float: ...


def overflow_error(
    *, skipped: int, scale: float, settings: Settings, failed: int, parameters: int, shown: str, advice: str
) -> LossScaleCollapse:
    """Return the error of a run whose every step is skipped because gradients overflow.

    Args:
        skipped: steps skipped in a row.
        scale: the loss scale of the last of them.
        settings: of the loss scale.
        failed: how many gradients are not finite.
        parameters: of how many.
        shown: some of their names.
        advice: what to do first, in the framework's own words.

    >>> from duotone.loss_scale import LossScale
    >>> first = "keep that in FP32"
    >>> print(
    ...     overflow_error(
    ...         skipped=3, scale=1, settings=LossScale(), failed=1, parameters=6, shown="a.weight", advice=first
    ...     )
    ... )
    3 steps in a row were skipped, the last at loss scale 1, its floor: 1 of 6 gradients are not finite (a.weight); keep
    that in FP32, look for a division by 0 or a root of 0 there, lower the learning rate, or use policy "bf16"
    """
    where = "no loss scale" if settings.is_none else f"loss scale {scale:g}"
    if settings.is_dynamic and scale <= settings.min_scale:
        where += ", its floor"
    return LossScaleCollapse(
        f"{skipped} steps in a row were skipped, the last at {where}: {failed} of {parameters} gradients are not "
        f"finite ({shown}); {advice}, look for a division by 0 or a root of 0 there, lower the learning rate, or use "
        'policy "bf16"'
    )


def non_finite_loss_error(*, skipped: int, loss: str, advice: str) -> NonFiniteLoss:
    """Return the error of a run whose loss is not a number in step after step.

    Args:
        skipped: steps skipped in a row.
        loss: which loss, in words.
        advice: what to do.

    >>> print(non_finite_loss_error(skipped=3, loss="the last loss", advice="look at the data"))
    3 steps in a row were skipped, and the last loss is not finite: that is the forward pass, not the loss scale; look
    at the data
    """
    return NonFiniteLoss(
        f"{skipped} steps in a row were skipped, and {loss} is not finite: that is the forward pass, not the loss "
        f"scale; {advice}"
    )
