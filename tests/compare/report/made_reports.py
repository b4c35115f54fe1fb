"""Reports without any measurement: a usual one, and the extremes that a page must bear; the same at every call."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType

from duotone.compare.arms.catalogue import Arm
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Failure, Fit, Phases
from duotone.compare.report.report import ArmResult, Curve, Report, Spread
from duotone.compare.subject import Subject

STEPS = 1400
HOSTILE = '<b>&"x</b><script>alert(1)</script>'
LONG = "bf16,blocks.*.attention=float32,blocks.*.mlp.up=bfloat16,head=float32,embedding=float32,state=bfloat16"

_ARMS = (
    Arm("fp32", "torch", "FP32 throughout, fused AdamW", "a:b"),
    Arm("torch-amp-bf16", "torch", "autocast to BF16, fused AdamW", "a:b"),
    Arm("torch-amp-fp16", "torch", "autocast to FP16, GradScaler, fused AdamW", "a:b"),
    Arm("bf16", "duotone", "BF16 weights with FP32 masters", "a:b", "bf16"),
    Arm("fp16", "duotone", "FP16 weights with FP32 masters, loss scaling", "a:b", "fp16"),
    Arm("mine", "duotone", "a policy of one's own", "a:b", "bf16,head=fp32"),
    Arm("accelerate-bf16", "peers", "Accelerate, mixed_precision bf16", "a:b", None, "accelerate"),
    Arm("fabric-bf16", "peers", "Lightning Fabric, bf16-mixed", "a:b", None, "lightning"),
    Arm("optimi-kahan", "peers", "optimi, Kahan summation", "a:b", None, "torch-optimi"),
    Arm("torchao-8bit", "peers", "torchao's 8-bit AdamW", "a:b", None, "torchao"),
    Arm("bf16-no-masters", "ablations", "BF16 weights without masters, nearest rounding", "a:b", "bf16,master=none"),
    Arm("bf16-stochastic", "ablations", "BF16 weights without masters, stochastic rounding", "a:b", "bf16,sr"),
    Arm("fp16-no-scaling", "ablations", "FP16 weights with FP32 masters, losses not scaled", "a:b", "fp16"),
    Arm("fp16-no-masters", "ablations", "FP16 weights without masters", "a:b", "fp16,master=none"),
)

_SUBJECT = Subject(
    name="stdlib-text",
    quality="bits_per_byte",
    lower_is_better=True,
    unit="bytes",
    parameters=10_817_280,
    baselines={"unigram frequencies": 4.533, "xz -9": 2.0571, "zstd --ultra -22": 2.11},
    facts={"training": "3,000,000 bytes of Python's standard library", "held out": "200,000 bytes of other files"},
    task_steps=1400,
    task_warmup_steps=100,
    micro_batch=8,
)


def usual() -> Report:
    """Return a report of five arms, all finished, one of which leaves the frame of its chart."""
    return report_of([_ARMS[index] for index in (0, 1, 3, 4, 10)])


def few() -> Report:
    """Return a report of three arms, none of which scales; their last step is a label at the very end of an axis."""
    report = report_of([_ARMS[index] for index in (0, 1, 3)])
    return replace(report, arms=tuple(replace(arm, curves=tuple(map(_round, arm.curves))) for arm in report.arms))


def many() -> Report:
    """Return a report of fourteen arms with the largest micro-batches, and two that failed."""
    report = report_of(_ARMS)
    arms = [replace(arm, fit=_fit(arm)) for arm in report.arms]
    arms[7] = _failed(arms[7], Failure("not installed", "lightning is not installed; pip install lightning"))
    curves = tuple(_broken(curve) for curve in arms[12].curves)
    failure = Failure("not finite", "the loss is nan at step 701 with seed 0")
    arms[12] = replace(arms[12], failure=failure, curves=curves, quality=None, worse_by=None, skipped=None)
    arms[12] = replace(arms[12], quality_verdict="not tested")
    return replace(report, arms=tuple(arms))


def hostile() -> Report:
    """Return a report whose every text could be taken for markup, with very long names."""
    arms = [replace(_ARMS[0], name=HOSTILE, summary=HOSTILE), replace(_ARMS[3], name=LONG, policy=LONG), _ARMS[4]]
    report = report_of(arms)
    subject = replace(report.subject, name=HOSTILE, quality="a_quality_of_a_very_long_name", facts={HOSTILE: HOSTILE})
    results = [replace(arm, notes=(HOSTILE, LONG), fit=_fit(arm)) for arm in report.arms]
    results[2] = replace(results[2], failure=Failure("error", f"RuntimeError: {HOSTILE} {'x' * 120}"))
    texts = (HOSTILE, f"{LONG} is faster than {HOSTILE} by 1.72 (1.66 to 1.79).")
    environment = {HOSTILE: HOSTILE, "cpu": "x" * 150}
    commands = (f"duotone compare --arm mine='{LONG}' --out {HOSTILE}",)
    return replace(
        report,
        subject=subject,
        arms=tuple(results),
        verdicts=texts,
        rules=texts,
        remarks=texts,
        environment=environment,
        commands=commands,
    )


def trials_only() -> Report:
    """Return a report before the first run, in which one arm was not tried yet."""
    report = report_of([_ARMS[index] for index in (0, 3, 6)])
    before = {"seeds": 0, "times_faster": None, "quality": None, "evaluation": {}, "worse_by": None, "skipped": None}
    arms = [replace(arm, **before, quality_verdict="not tested", curves=(), loss_scale=None) for arm in report.arms]
    arms[2] = _failed(arms[2], None)
    return replace(
        report, pace=None, arms=tuple(arms), verdicts=(), remarks=("No run has ended yet.",), is_complete=False
    )


def alone() -> Report:
    """Return a report of one arm with one seed, whose memory is not known, and whose axes have wide labels."""
    report = report_of([replace(_ARMS[0], name="the only one")], seeds=(0,))
    unknown = {"peak_memory_bytes": None, "memory": {}, "saved_bytes": 0, "memory_ratio": None}
    curve = report.arms[0].curves[0]
    tiny = replace(curve, losses=tuple((step * 2500, loss * 2e-5) for step, loss in curve.losses[:100]))
    return replace(report, arms=(replace(report.arms[0], curves=(tiny,), **unknown),), is_complete=False)


def without_baseline() -> Report:
    """Return a report whose baseline failed before its first step, and in which an arm was NaN from the start."""
    report = report_of([_ARMS[index] for index in (0, 3, 4)])
    arms = [replace(arm, times_faster=None, memory_ratio=None, worse_by=None) for arm in report.arms]
    arms[0] = _failed(arms[0], Failure("out of memory", "the process was killed; use a smaller micro-batch"))
    broken = tuple(replace(curve, losses=((10, math.nan), (20, math.nan))) for curve in arms[2].curves)
    arms[2] = replace(arms[2], curves=broken, failure=Failure("not finite", "the loss is nan at step 1"))
    return replace(report, arms=tuple(arms), verdicts=("The baseline fp32 has no result, so nothing is judged.",))


def report_of(arms: Sequence[Arm], seeds: tuple[int, ...] = (0, 1, 2)) -> Report:
    """Return a complete report of such arms; the first is the baseline."""
    baseline = arms[0].name
    return Report(
        subject=_SUBJECT,
        plan=Plan(task="stdlib-text", arms=tuple(arms), baseline=baseline, seeds=seeds),
        pace=Pace(STEPS, 100, 10, True),
        environment={
            "device": "cpu, Example 9000, 2 threads",
            "system": "Linux 6.1",
            "torch": "2.13.0",
            "duotone": "0.3.0",
            "date": "2026-11-25",
        },
        arms=tuple(_result(arm, seeds, baseline) for arm in arms),
        verdicts=(
            f"bf16 is faster than {baseline} by 1.72 (1.66 to 1.79), and no worse in bits per byte.",
            f"fp16 is as fast as {baseline}: 1.01 (0.99 to 1.03), and no worse.",
            "bf16-no-masters is worse by 0.6012: it has lost updates.",
        ),
        rules=(
            "Speed: turns are compared round by round; the median ratio with its interval of 95 % confidence.",
            "Quality: no worse if the mean over seeds is worse by less than 1 % with 95 % confidence (paired t-test).",
        ),
        remarks=("Evaluation is deterministic in every arm.",),
        commands=(
            "duotone compare stdlib-text --arms fp32,torch-amp-bf16,bf16,fp16 --seeds 3 --out comparison",
            "duotone compare --show comparison",
        ),
        is_complete=True,
    )


def _result(arm: Arm, seeds: tuple[int, ...], baseline: str) -> ArmResult:
    random = Random(arm.name)
    is_half, is_ablation = "16" in arm.name or arm.group != "torch", arm.group == "ablations"
    forward, backward, update = (seconds * random.uniform(0.9, 1.1) for seconds in (0.21, 0.4, 0.055))
    if not is_half:
        forward, backward = 0.37, 0.74
    step = forward + backward + update
    size = _SUBJECT.parameters
    split = {"weights": 2 * size, "tails": 0 if is_ablation else 2 * size, "gradients": 2 * size, "moments": 8 * size}
    whole = {"weights": 4 * size, "tails": 0, "gradients": 4 * size, "moments": 8 * size}
    memory = {**(split if arm.policy else whole), "other": 400_000}
    worse = 0.6 if arm.name == "bf16-no-masters" else random.uniform(-0.004, 0.006)
    quality = 2.4 + worse
    is_baseline = arm.name == baseline
    scaled = "fp16" in arm.name and "no-scaling" not in arm.name
    saved = 150_000_000 if is_half else 290_000_000
    curves = tuple(_curve(seed, quality, step, scaled) for seed in seeds)
    return ArmResult(
        name=arm.name,
        group=arm.group,
        summary=arm.summary,
        policy=arm.policy,
        failure=None,
        seeds=len(seeds),
        step_seconds=Spread(step, step * 0.97, step * 1.04),
        phases=Phases(step, forward, backward, update),
        units_per_second=8192 / step,
        times_faster=None if is_baseline else Spread(1.165 / step, 1.13 / step, 1.2 / step),
        peak_memory_bytes=int((sum(memory.values()) + saved) * 1.13),
        memory_ratio=None if is_baseline else 0.62,
        memory=memory,
        saved_bytes=saved,
        bytes_per_parameter=14.0 if arm.policy else 16.0,
        quality=Spread(quality, quality - 0.01, quality + 0.012),
        evaluation={
            "bits_per_byte": Spread(quality, quality - 0.01, quality + 0.012),
            "accuracy": Spread(0.5, 0.49, 0.51),
        },
        worse_by=None if is_baseline else Spread(worse, worse - 0.004, worse + 0.004),
        quality_verdict="not tested" if is_baseline else "worse" if worse > 0.1 else "no worse",
        skipped=2.0 if scaled else 0.0,
        loss_scale=16384.0 if scaled else 1.0,
        curves=curves,
        fit=None,
        notes=("this CPU has no FP16 matrix product; FP16 is computed in FP32",) if "fp16" in arm.name else (),
    )


def _curve(seed: int, quality: float, step_seconds: float, scaled: bool) -> Curve:
    random = Random(f"{seed} {quality}")
    losses = tuple(
        (step, quality * 0.68 + 4.0 * math.exp(-step / 160) + random.gauss(0, 0.03)) for step in range(4, STEPS + 1, 4)
    )
    if not scaled:
        return Curve(seed, losses, ((1, 1.0),), (), step_seconds)
    skipped = (3 + seed, 640 + 100 * seed)
    scales = ((1, 65536.0), (skipped[0] + 1, 32768.0), (skipped[1] + 1, 16384.0))
    return Curve(seed, losses, scales, skipped, step_seconds)


def _round(curve: Curve) -> Curve:
    return replace(curve, losses=tuple((step * 10, loss) for step, loss in curve.losses if step <= 1000))


def _broken(curve: Curve) -> Curve:
    return replace(curve, losses=tuple((step, loss if step <= 700 else math.nan) for step, loss in curve.losses))


def _failed(arm: ArmResult, failure: Failure | None) -> ArmResult:
    return ArmResult(
        name=arm.name,
        group=arm.group,
        summary=arm.summary,
        policy=arm.policy,
        failure=failure,
        seeds=0,
        step_seconds=None,
        phases=None,
        units_per_second=None,
        times_faster=None,
        peak_memory_bytes=None,
        memory_ratio=None,
        memory=MappingProxyType({}),
        saved_bytes=0,
        bytes_per_parameter=0.0,
        quality=None,
        evaluation=MappingProxyType({}),
        worse_by=None,
        quality_verdict="not tested",
        skipped=None,
        loss_scale=None,
        curves=(),
        fit=None if failure is None or arm.fit is None else replace(arm.fit, micro_batch=0, failure=failure),
        notes=(),
    )


def _fit(arm: ArmResult) -> Fit:
    samples = int(900_000_000 / (arm.saved_bytes or 1) * 8)
    return Fit(arm.name, 2_000_000_000, samples, 1_970_000_000, arm.units_per_second or 0.0)
