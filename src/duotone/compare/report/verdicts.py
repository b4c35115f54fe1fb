"""What a comparison's figures mean, in sentences, and the rules that they were judged by."""

from collections.abc import Sequence

from duotone.compare.plan import Plan
from duotone.compare.report import words
from duotone.compare.report.ablations import lesson
from duotone.compare.report.ranking import ranking
from duotone.compare.report.report import ArmResult
from duotone.compare.subject import Subject

_ORDER = ("duotone", "torch", "compiled", "peers", "ablations")
_FAILED = {
    "not installed": "was not run",
    "not possible": "cannot train this task here",
    "out of memory": "ran out of memory",
    "not finite": "did not stay finite",
    "too slow": "was too slow to be trained to the end",
    "error": "failed",
}


def verdicts(subject: Subject, plan: Plan, arms: Sequence[ArmResult]) -> tuple[str, ...]:
    """Return what the arms came to: which policy to use, who is ahead of it, each arm by itself, and failures.

    Args:
        subject: what was trained.
        plan: what was asked for.
        arms: their results, the baseline's among them.
    """
    baseline = next(arm for arm in arms if arm.name == plan.baseline)
    others = sorted((arm for arm in arms if arm is not baseline), key=lambda arm: _ORDER.index(arm.group))
    sentences = [] if baseline.failure is None else [_baseline_failed(baseline, others)]
    sentences += ranking(subject, plan, arms)
    sentences += [_arm(arm, baseline, subject, plan, arms) for arm in others if arm.failure is None]
    sentences += [_failed(arm, arms) for arm in others if arm.failure is not None]
    return tuple(sentence for sentence in sentences if sentence)


def rules(subject: Subject, plan: Plan) -> tuple[str, ...]:
    """Return how speed, quality and memory were judged, a sentence each."""
    baseline, sure, margin = plan.baseline, words.percent(plan.confidence), words.percent(plan.margin)
    return (
        "start: with the same seed, every arm begins with the same FP32 weights and sees the same batches",
        f"speed: seconds of {baseline}'s step over seconds of the arm's, both from the same round of the same seed; "
        f"the median over all rounds but the first, with the {sure} confidence interval of a median by order "
        "statistics, widened to hold the median of every seed; an arm is faster or slower if the interval leaves out "
        "1, as fast if all of it is within 2 % of 1, else not distinguishable; rounds of one process are not quite "
        "independent; drawing batches is a part of a step, evaluating is not",
        f"quality: the arm's {subject.quality} ({'lower' if subject.lower_is_better else 'higher'} is better) against "
        f"{baseline}'s with the same seed, each arm by itself; no worse if the mean difference is at most the margin, "
        f"{margin} of {baseline}'s mean, with {sure} confidence (one-sided paired t test); worse if it is above the "
        "margin with the same confidence, or if the training did not stay finite; undecided between; tested only with "
        "two seeds or more, and once all have ended",
        "memory: the peak over a few steps, alone in a process: on a CPU of the resident set above the process before "
        "the model, on a GPU of the allocator",
        "bytes per parameter: weights, tails, gradients and optimizer moments, counted tensor by tensor",
    )


def _arm(arm: ArmResult, baseline: ArmResult, subject: Subject, plan: Plan, arms: Sequence[ArmResult]) -> str:
    """Return what one arm came to against the baseline; nothing as long as it has not come to anything."""
    if arm.times_faster is None:
        return ""
    quality = _quality(arm, baseline, subject, plan)
    if arm.group == "ablations":
        return _ablation(arm, baseline, quality, arms)
    parts = [f"{arm.name} is {words.speed(arm.times_faster, baseline.name)}"]
    parts += [words.memory(arm.memory_ratio)] if arm.memory_ratio is not None else []
    return ", ".join(parts) + (f", and {quality}" if quality else "")


def _quality(arm: ArmResult, baseline: ArmResult, subject: Subject, plan: Plan) -> str:
    if arm.quality is None or baseline.quality is None:
        return ""
    name, figures, worse = subject.quality, _figures(arm, baseline), arm.worse_by
    if arm.quality_verdict == "not tested":
        return f"its {name} is {figures}, not tested"
    if worse is None:
        return f"its {name} is worse: it is not finite"
    margin = f"margin {words.quality(plan.margin * abs(baseline.quality.value))}"
    sure = f"with {words.percent(plan.confidence)} confidence"
    if arm.quality_verdict == "undecided":
        between = f"from {words.worse(worse.lower)} to {words.worse(worse.upper)}"
        return f"whether its {name} is worse is undecided ({figures}; {between}, each {sure}, {margin})"
    if worse.lower == worse.upper == 0:
        bound = "the same with every seed"
    elif arm.quality_verdict == "worse":
        bound = f"at least {words.worse(worse.lower)} {sure}, {margin}"
    else:
        bound = f"at {'most' if worse.upper >= 0 else 'least'} {words.worse(worse.upper)} {sure}, {margin}"
    return f"its {name} is {arm.quality_verdict} ({figures}; {bound})"


def _figures(arm: ArmResult, baseline: ArmResult) -> str:
    assert arm.quality is not None
    assert baseline.quality is not None
    return f"{words.quality(arm.quality.value)} against {words.quality(baseline.quality.value)}"


def _ablation(arm: ArmResult, baseline: ArmResult, quality: str, arms: Sequence[ArmResult]) -> str:
    learnt = lesson(arm, arms)
    if not learnt or arm.quality is None or baseline.quality is None:
        return f"{arm.name}: {quality}" if quality else ""
    return f"{arm.name}: {arm.quality_verdict} ({_figures(arm, baseline)}): {learnt}"


def _failed(arm: ArmResult, arms: Sequence[ArmResult]) -> str:
    assert arm.failure is not None
    sentence = f"{arm.name} {_FAILED.get(arm.failure.kind, 'failed')}: {arm.failure.reason}"
    if arm.quality_verdict != "worse":
        return sentence
    learnt = lesson(arm, arms) if arm.group == "ablations" else ""
    return f"{sentence}; {learnt or 'that counts as worse'}"


def _baseline_failed(baseline: ArmResult, others: Sequence[ArmResult]) -> str:
    has_speed = any(arm.times_faster is not None for arm in others)
    lost = "no quality is tested" if has_speed else "there is nothing to compare the others with"
    return f"{_failed(baseline, others)}; it is the baseline, so {lost}"
