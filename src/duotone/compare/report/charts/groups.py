"""Groups of arms: what they are called, and arms of one group brought together."""

from collections.abc import Sequence

from duotone.compare.report.report import ArmResult

GROUPS = {
    "torch": "PyTorch",
    "duotone": "Duotone",
    "compiled": "compiled",
    "peers": "other libraries",
    "ablations": "ablations",
}


def by_group(arms: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    """Return arms with those of a group side by side, groups and arms in the order in which they come first.

    >>> by_group([])
    ()
    """
    order = list(dict.fromkeys(arm.group for arm in arms))
    return tuple(sorted(arms, key=lambda arm: order.index(arm.group)))
