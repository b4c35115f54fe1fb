"""What else a report says in pairs of a name and a text: warnings, the task, other methods on its data, environment."""

from collections.abc import Iterator

from duotone.compare.report import words
from duotone.compare.report.report import Report

Pairs = list[tuple[str, str]]


def sections(report: Report) -> Iterator[tuple[str, Pairs]]:
    """Yield titles and pairs, for the page and Markdown; sections without any are left out."""
    subject = report.subject
    quality = subject.quality.replace("_", " ")
    baselines = [(name, f"{words.quality(value)} {quality}") for name, value in subject.baselines.items()]
    for title, pairs in (
        ("What was warned of", [(", ".join(names), note) for note, names in report.notes.items()]),
        ("What was trained", _training(report)),
        ("Simple methods on the same data", baselines),
        ("Environment", list(report.environment.items())),
    ):
        if pairs:
            yield title, pairs


def _training(report: Report) -> Pairs:
    subject, pace = report.subject, report.pace
    pairs = [
        ("task", f"{subject.name}, {words.count(subject.parameters)} parameters"),
        ("quality", f"{subject.quality}, {'lower' if subject.lower_is_better else 'higher'} is better"),
        *subject.facts.items(),
        ("micro-batch", words.counted(subject.micro_batch, "sample")),
    ]
    if pace is None:
        return pairs
    steps = f"{words.count(pace.steps)}, {words.count(pace.warmup_steps)} of them warm-up; by itself the task takes"
    turns = f"all arms of a seed take turns of {words.count(pace.turn_steps)} steps"
    return [
        *pairs,
        ("steps", f"{steps} {words.count(subject.task_steps)}"),
        ("order", turns if pace.together else "one arm after the other"),
    ]
