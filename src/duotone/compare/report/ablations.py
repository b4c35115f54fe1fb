"""What an ablation shows: which mechanism its policy goes without, and what its result says about that one."""

from collections.abc import Sequence
from dataclasses import replace

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
    policy = _policy_of(arm)
    mechanism = "" if policy is None else _lacks(policy)
    if policy is None or not mechanism:
        return ""
    whole = _verdict_of(arms, Policy.parse(_whole(policy)))
    if arm.quality_verdict == "worse" and whole != "no worse":
        return f"that says nothing of {mechanism}, for it is worse with it too" if whole == "worse" else ""
    if mechanism == _STOCHASTIC and arm.quality_verdict == "no worse":
        nearest = replace(policy, rounding="nearest")
        if _verdict_of(arms, nearest) != "worse":
            return ""
    return _LESSONS.get((mechanism, arm.quality_verdict), "")


def _policy_of(arm: ArmResult) -> Policy | None:
    return None if arm.policy is None else Policy.parse(arm.policy)


def _whole(policy: Policy) -> str:
    """Return the preset that an ablation leaves a mechanism out of."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(policy.param, "fp16-mixed")


def _verdict_of(arms: Sequence[ArmResult], policy: Policy) -> Verdict | None:
    return next((arm.quality_verdict for arm in arms if _policy_of(arm) == policy), None)


def _lacks(policy: Policy) -> str:
    """Return what a policy goes without, or in the case of stochastic rounding, what it has in its place.

    >>> [_lacks(Policy.parse(text)) for text in ("fp16,loss_scale=1", "bf16-true,rounding=nearest", "bf16")]
    ['loss scaling', 'master weights', '']
    """
    if policy.rounding is not None:
        return _STOCHASTIC if policy.rounding == "stochastic" else _MASTERS
    return _SCALING if policy.loss_scale == 1.0 else ""
