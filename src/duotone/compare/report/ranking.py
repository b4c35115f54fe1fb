"""Which of Duotone's policies to use, and which other library is ahead of all of them.

The policy to use is the fastest whose quality is no worse than the baseline's. Where no test has shown that of any, as
with a single seed, those that are not known to be worse are compared, and it is said.
"""

from collections.abc import Iterator, Sequence

from duotone.compare.plan import Plan
from duotone.compare.report import words
from duotone.compare.report.report import ArmResult, Spread
from duotone.compare.subject import Subject

_SAME = Spread(1.0, 1.0, 1.0)
# peaks are measured once, and differ by a percent from process to process
_TELLING = 0.98


def ranking(subject: Subject, plan: Plan, arms: Sequence[ArmResult]) -> tuple[str, ...]:
    """Return what to use, then who is ahead of it; nothing before there are runs of two arms."""
    measured = [arm for arm in arms if arm.failure is None and (arm.times_faster or arm.name == plan.baseline)]
    ours = [arm for arm in measured if arm.group == "duotone"]
    if not ours or not any(arm.times_faster for arm in measured):
        return ()
    level = [arm for arm in measured if arm.name == plan.baseline or arm.quality_verdict == "no worse"]
    fitting = [arm for arm in level if arm in ours]
    if not fitting:
        level = [arm for arm in measured if arm.quality_verdict != "worse"]
        fitting = [arm for arm in level if arm in ours]
    if not fitting:
        return (f"no policy of Duotone keeps {plan.baseline}'s {subject.quality} on this task",)
    best = max(fitting, key=lambda arm: _speed(arm).value)
    rivals = [arm for arm in level if arm.group in ("torch", "peers") and arm.name != plan.baseline]
    ahead = [text for rival in rivals for text in _ahead(rival, fitting, plan.baseline)]
    ahead = [*_undecided(ours, best, plan, subject), *ahead]
    # one policy that is the baseline itself has won nothing
    return tuple(ahead) if len(ours) == 1 and best.name == plan.baseline else (_best(best, subject, plan), *ahead)


def _speed(arm: ArmResult) -> Spread:
    return arm.times_faster or _SAME


def _best(best: ArmResult, subject: Subject, plan: Plan) -> str:
    baseline, quality = plan.baseline, subject.quality
    if best.name == baseline:
        return (
            f"{baseline}, the baseline, is the policy to use here: no other of Duotone's is shown to be faster at no "
            f"worse {quality}"
        )
    speed = words.speed(_speed(best), baseline)
    memory = f", and {words.memory(best.memory_ratio)}" if best.memory_ratio is not None else ""
    if best.quality_verdict != "no worse":
        return (
            f"{best.name} is the fastest of Duotone's policies, {speed}{memory}; whether its {quality} is as good as "
            f"{baseline}'s is {best.quality_verdict}"
        )
    if words.direction(_speed(best)) != "faster":
        return (
            f"no policy of Duotone is shown to be faster than {baseline} at no worse {quality}: {best.name} is {speed}"
            f"{memory}"
        )
    return (
        f"{best.name} is the policy to use here: of Duotone's, it is the fastest whose {quality} is no worse than "
        f"{baseline}'s; it is {speed}{memory}"
    )


def _undecided(ours: Sequence[ArmResult], best: ArmResult, plan: Plan, subject: Subject) -> Iterator[str]:
    """Name the fastest policy whose quality is open, if it is faster than the best that is known."""
    if best.quality_verdict != "no worse" and best.name != plan.baseline:
        return
    faster = [arm for arm in ours if arm.quality_verdict == "undecided" and _speed(arm).lower > _speed(best).upper]
    if faster:
        name = max(faster, key=lambda arm: _speed(arm).value).name
        quality = subject.quality
        yield f"{name} is faster than that, but whether its {quality} is worse is undecided; more seeds may tell"


def _ahead(rival: ArmResult, ours: Sequence[ArmResult], baseline: str) -> Iterator[str]:
    """Say where an arm that is not Duotone's is ahead of every one of its policies."""
    shown = "no" if any(arm.quality_verdict == "no worse" for arm in ours) else "not known to be"
    every = f"{rival.name} is ahead of every policy of Duotone that is {shown} worse"
    best = max(ours, key=lambda arm: _speed(arm).value)
    # not by less than is written
    if float(words.ratio(_speed(rival).value)) > float(words.ratio(_speed(best).value)):
        close = "" if _speed(rival).lower > _speed(best).upper else ", but by less than the intervals tell apart"
        theirs, its = (words.spread(_speed(arm), words.ratio) for arm in (rival, best))
        yield f"{every} in speed{close}: {theirs} times {baseline}'s against {its} of {best.name}"
    peaks = {arm.name: arm.peak_memory_bytes for arm in ours if arm.peak_memory_bytes is not None}
    if peaks and rival.peak_memory_bytes is not None and rival.peak_memory_bytes < _TELLING * min(peaks.values()):
        least = min(peaks, key=peaks.__getitem__)
        yield f"{every} in memory: {words.size(rival.peak_memory_bytes)} against {words.size(peaks[least])} of {least}"
    sizes = {arm.name: arm.bytes_per_parameter for arm in ours if arm.bytes_per_parameter}
    if sizes and 0 < rival.bytes_per_parameter < min(sizes.values()):
        least = min(sizes, key=sizes.__getitem__)
        theirs, its = (f"{value:.3g}" for value in (rival.bytes_per_parameter, sizes[least]))
        yield f"{every} in bytes per parameter: {theirs} against {its} of {least}"
