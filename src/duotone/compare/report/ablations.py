"""What an ablation shows: which mechanism its policy goes without, and what its result says about that one."""

from collections.abc import Sequence

from duotone.compare.report.report import ArmResult, Verdict
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


def lesson(arm: ArmResult, arms: Sequence[ArmResult]) -> str:
    """Return what an ablation's verdict on quality says about the mechanism that it lacks; nothing if it is open.

    That it is worse says something only if the policy with the mechanism is not, and that stochastic rounding is no
    worse only if rounding to nearest is.

    Args:
        arm: the ablation.
        arms: all results, its own among them.
    """
    if arm.policy is None:
        return ""
    mechanism = _lacks(arm.policy)
    if not mechanism:
        return ""
    whole = _verdict_of(arms, _whole(arm.policy))
    if arm.quality_verdict == "worse" and whole != "no worse":
        return f"that says nothing of {mechanism}, for it is worse with it too" if whole == "worse" else ""
    if mechanism == _STOCHASTIC and arm.quality_verdict == "no worse":
        nearest = Policy.parse(f"{_whole(arm.policy)}-true,rounding=nearest").name
        if _verdict_of(arms, nearest) != "worse":
            return ""
    return _LESSONS.get((mechanism, arm.quality_verdict), "")


def _whole(text: str) -> str:
    """Return the preset that an ablation leaves a mechanism out of."""
    policy = Policy.parse(text)
    return {"bfloat16": "bf16", "float16": "fp16"}.get(policy.param, "fp16-mixed")


def _verdict_of(arms: Sequence[ArmResult], policy: str) -> Verdict | None:
    for arm in arms:
        if arm.policy is not None and Policy.parse(arm.policy).name == policy:
            return arm.quality_verdict
    return None


def _lacks(text: str) -> str:
    """Return what a policy goes without, or in the case of stochastic rounding, what it has in its place.

    >>> _lacks("fp16,loss_scale=1"), _lacks("bf16-true,rounding=nearest"), _lacks("bf16")
    ('loss scaling', 'master weights', '')
    """
    policy = Policy.parse(text)
    if policy.rounding is not None:
        return _STOCHASTIC if policy.rounding == "stochastic" else _MASTERS
    return _SCALING if policy.loss_scale == 1.0 else ""
