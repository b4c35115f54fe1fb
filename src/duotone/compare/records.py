"""What was measured: one record for each trial of an arm, each run, and each search for the largest batch.

Records are JSON files in the comparison's folder, with these field names; a field that an older folder lacks has its
default. A report is made of them alone, so it can be made again at any time. Seconds are of one optimizer step, bytes
of one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import median


@dataclass(frozen=True)
class Failure:
    """Why an arm has no result.

    Attributes:
        kind: "not installed", "not possible" (the arm cannot train this task here), "out of memory", "not finite",
            "too slow" or "error".
        reason: a sentence.
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class Phases:
    """Seconds of one step, and of its three parts.

    Attributes:
        step: the whole.
        forward: the model and its loss, for all micro-batches.
        backward: gradients, the scaling of the loss included.
        update: unscaling, clipping, the optimizer, the loss scale, and zeroing gradients.
    """

    step: float
    forward: float
    backward: float
    update: float


@dataclass(frozen=True)
class Trial:
    """A few steps of an arm, alone in a process of its own.

    Attributes:
        arm: its name.
        failure: why there is no more than this, or None.
        parameters: trainable elements.
        phases: medians over the timed steps.
        units_per_step: what the task counts, in one step.
        memory: bytes by role: weights, tails, gradients, moments, other.
        saved_bytes: by dtype, what autograd keeps of a micro-batch's forward pass, weights apart.
        peak_memory_bytes: a CPU: the peak resident set above the process before the model; a GPU: its allocator's peak.
            None on systems that do not tell.
        start_seconds: from the process's start to the first step.
        evaluate_seconds: of one evaluation.
        evaluation: of the model after the trial.
        is_deterministic: whether a second evaluation gave the same figures.
        notes: what was warned of, each once.
        versions: of the libraries that the arm trains with, Duotone and torch apart.
        compile_seconds: of compiling the model, which is in no step's time.
    """

    arm: str
    failure: Failure | None = None
    parameters: int = 0
    phases: Phases | None = None
    units_per_step: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict)
    saved_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    start_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    is_deterministic: bool = True
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of weight, tail, gradient and moments for each trainable parameter; 0 without any."""
        total = sum(self.memory.get(role, 0) for role in ("weights", "tails", "gradients", "moments"))
        return total / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed.

    Attributes:
        arm: its name.
        seed: of the model and the batches.
        steps: optimizer steps taken, skipped ones included.
        failure: why it ended before its last step, or None.
        turns: of each turn in order, the medians over its steps; the first step of a turn is not timed unless it is
            the only one, for the caches hold another arm's data then. The first turn is a warm-up too.
        losses: pairs of a step and the mean training loss since the pair before; at most some hundreds.
        loss_scales: pairs of a step and the scale from there on; one pair if it never moved.
        skipped: the steps that were skipped.
        evaluation: every figure at the end.
        seconds: of all steps.
        notes: what was warned of, each once.
        session: the same for runs that took turns with each other, and for no others.
    """

    arm: str
    seed: int
    steps: int = 0
    failure: Failure | None = None
    turns: tuple[Phases, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    loss_scales: tuple[tuple[int, float], ...] = ()
    skipped: tuple[int, ...] = ()
    evaluation: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    session: str = ""


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of an arm that fits into a given memory.

    Attributes:
        arm: its name.
        limit_bytes: of memory, counted as in `Trial.peak_memory_bytes`.
        micro_batch: in samples; 0 if not even one fits.
        peak_memory_bytes: measured at that micro-batch.
        units_per_second: measured there.
        tried: every micro-batch that was measured, with its peak in bytes, None if memory ran out.
        failure: why there is no result, or None.
        remark: what must be known of the search, or nothing.
    """

    arm: str
    limit_bytes: int
    micro_batch: int = 0
    peak_memory_bytes: int | None = None
    units_per_second: float = 0.0
    tried: tuple[tuple[int, int | None], ...] = ()
    failure: Failure | None = None
    remark: str = ""


def median_phases(phases: Sequence[Phases]) -> Phases:
    """Return the medians of at least one step, part by part.

    >>> median_phases([Phases(6, 1, 2, 3), Phases(7, 1, 3, 3), Phases(9, 2, 4, 3)])
    Phases(step=7, forward=1, backward=3, update=3)
    """
    return Phases(*(median(part) for part in zip(*map(astuple, phases), strict=True)))
