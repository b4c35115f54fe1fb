"""A comparison's folder without any training: plausible records of every kind, the same at every call.

`made_folder(path)` writes a whole comparison: a baseline, autocast, two policies, a peer that is not installed, and two
ablations. Its parts (`made_plan`, `made_trial`, `made_run`, `SHAPES`) make others with `dataclasses.replace`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from duotone.compare.arms.catalogue import Arm
from duotone.compare.folder import ComparisonFolder
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Failure, Fit, Phases, Run, Trial
from duotone.compare.subject import Subject

STEPS, TURN_STEPS, PARAMETERS = 240, 10, 1_000_000

SUBJECT = Subject(
    name="stdlib-text",
    quality="bits_per_byte",
    lower_is_better=True,
    unit="bytes",
    parameters=PARAMETERS,
    baselines={"unigram": 4.533, "xz -9": 2.0571},
    facts={"training": "3,000,000 bytes of Python's standard library", "held out": "200,000 bytes of other files"},
    task_steps=1400,
    task_warmup_steps=100,
    micro_batch=8,
)
ENVIRONMENT = {
    "device": "cpu, Example 9000, 2 threads",
    "system": "Linux 6.1",
    "python": "3.11.7",
    "torch": "2.13.0",
    "duotone": "0.3.0",
    "date": "2026-11-25",
}


@dataclass(frozen=True)
class Shape:
    """What an arm's records are made of.

    Attributes:
        arm: it itself.
        seconds: of a step's forward, backward and update.
        memory: bytes per parameter: weights, tails, gradients, moments.
        peak_memory_bytes: of its trial.
        worse_by: added to the quality of every seed.
        loss_scale: at the start; it halves at each skipped step.
        skipped: the steps that are.
        failure: of the trial, which has nothing else then.
        run_failure: of every run, after half of its steps.
        notes: of the trial and of the runs.
    """

    arm: Arm
    seconds: tuple[float, float, float] = (0.3, 0.6, 0.1)
    memory: tuple[int, int, int, int] = (4, 0, 4, 8)
    peak_memory_bytes: int | None = 200_000_000
    worse_by: float = 0.0
    loss_scale: float = 1.0
    skipped: tuple[int, ...] = ()
    failure: Failure | None = None
    run_failure: Failure | None = None
    notes: tuple[str, ...] = ()


def arm(name: str, group: str, summary: str, policy: str | None = None, distribution: str | None = None) -> Arm:
    """Return an arm; no stepper is behind it."""
    return Arm(name, group, summary, "made:up", policy, distribution)  # type: ignore[arg-type]


SHAPES = (
    Shape(arm("fp32", "torch", "FP32 throughout, fused AdamW")),
    Shape(
        arm("torch-amp-bf16", "torch", "autocast to BF16, fused AdamW"),
        seconds=(0.2, 0.37, 0.1),
        peak_memory_bytes=150_000_000,
        worse_by=0.004,
    ),
    Shape(
        arm("bf16", "duotone", "BF16 weights with FP32 masters", "bf16"),
        seconds=(0.17, 0.34, 0.07),
        memory=(2, 2, 2, 8),
        peak_memory_bytes=110_000_000,
        worse_by=-0.002,
    ),
    Shape(
        arm("fp16", "duotone", "FP16 weights with FP32 masters, loss scaling", "fp16"),
        seconds=(0.33, 0.65, 0.07),
        memory=(2, 2, 2, 8),
        peak_memory_bytes=112_000_000,
        worse_by=0.002,
        loss_scale=65536.0,
        skipped=(3, 90),
        notes=("this CPU has no FP16 matrix product; FP16 is computed in FP32",),
    ),
    Shape(
        arm("lightning-bf16", "peers", "Lightning Fabric, bf16-mixed", distribution="lightning"),
        failure=Failure("not installed", "lightning is not installed; pip install lightning"),
    ),
    Shape(
        arm(
            "bf16-no-masters",
            "ablations",
            "BF16 weights without masters, nearest rounding",
            "bf16,master=none,rounding=nearest",
        ),
        seconds=(0.17, 0.34, 0.06),
        memory=(2, 0, 2, 8),
        peak_memory_bytes=105_000_000,
        worse_by=0.6,
    ),
    Shape(
        arm("fp16-no-scaling", "ablations", "FP16 weights with FP32 masters, losses not scaled", "fp16,loss_scale=1"),
        seconds=(0.33, 0.65, 0.07),
        memory=(2, 2, 2, 8),
        peak_memory_bytes=112_000_000,
        run_failure=Failure("not finite", "the loss is nan at step 120"),
    ),
)


@dataclass(frozen=True)
class Made:
    """What `made_folder` writes, and how much of it.

    Attributes:
        shapes: the arms; the first is the baseline.
        seeds: of the runs.
        trials: how many arms have been tried.
        runs: how many runs are written, seed by seed; None for all.
        together: as in `Pace`.
        fits: whether largest micro-batches were looked for.
        settings: of the plan.
    """

    shapes: Sequence[Shape] = SHAPES
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int | None = None
    runs: int | None = None
    together: bool = True
    fits: bool = False
    settings: dict[str, object] = field(default_factory=dict)


def made_folder(path: Path, made: Made = Made()) -> ComparisonFolder:
    """Write a comparison into a new folder and return it."""
    folder = ComparisonFolder(path)
    folder.start(made_plan(made))
    folder.write(SUBJECT)
    folder.write_environment(ENVIRONMENT)
    for shape in list(made.shapes)[: made.trials]:
        folder.write(made_trial(shape))
    if made.trials is not None and made.trials < len(made.shapes):
        return folder
    folder.write(Pace(STEPS, 17, TURN_STEPS, made.together))
    runs = [made_run(shape, seed) for seed in made.seeds for shape in made.shapes if shape.failure is None]
    for run in runs[: made.runs]:
        folder.write(run)
    for shape in made.shapes if made.fits else ():
        folder.write(made_fit(shape))
    return folder


def made_plan(made: Made) -> Plan:
    """Return what would have been asked for."""
    return Plan(
        task="stdlib-text",
        arms=tuple(shape.arm for shape in made.shapes),
        baseline=made.shapes[0].arm.name,
        seeds=made.seeds,
        steps=STEPS,
        settings=made.settings,
        fit_memory_bytes=500_000_000 if made.fits else None,
    )


def made_trial(shape: Shape) -> Trial:
    """Return the trial of an arm."""
    if shape.failure is not None:
        return Trial(shape.arm.name, shape.failure)
    roles = ("weights", "tails", "gradients", "moments")
    memory = {role: size * PARAMETERS for role, size in zip(roles, shape.memory, strict=True)}
    return Trial(
        arm=shape.arm.name,
        parameters=PARAMETERS,
        phases=_phases(shape, 1.0),
        units_per_step=2048.0,
        memory={**memory, "other": 4096},
        saved_bytes={"float32": 4_000_000, "bfloat16": 30_000_000},
        peak_memory_bytes=shape.peak_memory_bytes,
        start_seconds=2.5,
        evaluate_seconds=1.25,
        evaluation={"bits_per_byte": 6.5, "accuracy": 0.11},
        notes=shape.notes,
        versions={shape.arm.distribution: "1.0"} if shape.arm.distribution else {},
    )


def made_run(shape: Shape, seed: int) -> Run:
    """Return a run of an arm: all of it, or the half before its failure."""
    noise = Random(f"{shape.arm.name} {seed}")
    steps = STEPS // 2 if shape.run_failure else STEPS
    # drift hits every arm in the same round alike, as it does when they take turns
    drift = [Random(f"{seed} {turn}").lognormvariate(0, 0.05) for turn in range(steps // TURN_STEPS)]
    turns = tuple(_phases(shape, factor * noise.lognormvariate(0, 0.01)) for factor in drift)
    quality = 2.4 + 0.01 * seed + shape.worse_by + noise.uniform(-0.001, 0.001)
    losses = tuple((step, quality - 0.8 + 4 * math.exp(-step / 60)) for step in range(5, steps + 1, 5))
    skipped = tuple(step for step in shape.skipped if step <= steps)
    scales = [(1, shape.loss_scale)]
    scales += [(step + 1, shape.loss_scale / 2**count) for count, step in enumerate(skipped, 1)]
    evaluation = {} if shape.run_failure else {"bits_per_byte": quality, "accuracy": 0.9 - quality / 6}
    return Run(
        arm=shape.arm.name,
        seed=seed,
        steps=steps,
        failure=shape.run_failure,
        turns=turns,
        losses=losses,
        loss_scales=tuple(scales),
        skipped=skipped,
        evaluation=evaluation,
        seconds=sum(turn.step for turn in turns) * TURN_STEPS,
        notes=shape.notes,
    )


def made_fit(shape: Shape) -> Fit:
    """Return the search for an arm's largest micro-batch: 5 MB a sample beside the peak's half."""
    limit = 500_000_000
    if shape.failure is not None or shape.peak_memory_bytes is None:
        return Fit(shape.arm.name, limit, failure=shape.failure or Failure("not possible", "no peak is known"))
    fixed = shape.peak_memory_bytes // 2
    largest = (limit - fixed) // 5_000_000
    tried = ((8, fixed + 40_000_000), (largest, fixed + largest * 5_000_000), (2 * largest, None))
    return Fit(shape.arm.name, limit, largest, tried[1][1], 2048 / sum(shape.seconds), tried)


def _phases(shape: Shape, factor: float) -> Phases:
    forward, backward, update = (seconds * factor for seconds in shape.seconds)
    return Phases(forward + backward + update, forward, backward, update)
