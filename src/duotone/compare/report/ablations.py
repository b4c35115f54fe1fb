"""What an ablation shows: which mechanism its policy goes without, and what its result says about that one."""

from duotone.compare.report.report import ArmResult
from duotone.policy import Policy

_SCALING, _MASTERS, _STOCHASTIC = "loss scaling", "master weights", "stochastic rounding"

_LESSONS = {
    (_SCALING, "worse"): "this is what loss scaling is for",
    (_SCALING, "no worse"): "the gradients of this task are large enough for FP16 as they are",
    (_MASTERS, "worse"): "this is what master weights are for",
    (_MASTERS, "no worse"): "the updates of this task are large enough to go without master weights",
    (_STOCHASTIC, "worse"): "stochastic rounding does not stand in for master weights here",
    (_STOCHASTIC, "no worse"): "stochastic rounding stands in for master weights here",
}


def lesson(arm: ArmResult) -> str:
    """Return what an ablation's verdict on quality says about the mechanism that it lacks; nothing if it is open."""
    return _LESSONS.get((_lacks(arm.policy), arm.quality_verdict), "") if arm.policy is not None else ""


def _lacks(text: str) -> str:
    """Return what a policy goes without, or in the case of stochastic rounding, what it has in its place.

    >>> _lacks("fp16,loss_scale=1"), _lacks("bf16-true,rounding=nearest"), _lacks("bf16")
    ('loss scaling', 'master weights', '')
    """
    policy = Policy.parse(text)
    if policy.rounding is not None:
        return _STOCHASTIC if policy.rounding == "stochastic" else _MASTERS
    return _SCALING if policy.loss_scale == 1.0 else ""
