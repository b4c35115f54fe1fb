"""The optimizer step against its peers: equality first, then time, as ratios within one run.

    python benchmarks/step.py             # checks, measures, writes results/step.json, fills docs/evidence.md
    python benchmarks/step.py --tables    # fills docs/evidence.md from the results that are there
    python benchmarks/step.py --device cuda --out FOLDER

The arms, each on its own copies of the same parameters, in turn within each round:

- `duotone`: `LossScaler.step(AdamW, clip_norm=1.0)` on BF16 weights with tails and BF16 gradients.
- `torch chain`: what `torch.amp` does to FP32 weights in a step: `GradScaler.unscale_`, `clip_grad_norm_`, fused AdamW
  under `GradScaler.step`, `update`, and the cast of every weight to BF16 that autocast makes in the next forward pass.
- `torch chain, foreach`: the same with foreach AdamW.
- `torch FP32`: fused AdamW on FP32 weights, no scaling, clipping or casting.
- `copy`: `Tensor.copy_` of as many bytes as a step of Duotone moves, 28 per parameter, reads and writes together.

A sample is one call, or the mean of as many in a row as take 30 ms: what is small then stays in the caches, for every
arm alike.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import report
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.kernels import Backend
from duotone.torch.parameters.masters import ensure_tail, read_master, write_master

# a step reads weight, tail, gradient (twice) and two FP32 moments, and writes all but the gradient
BYTES_PER_PARAMETER = 28
SECONDS = 25.0
ROUNDS = (9, 101)
# elements of a tensor that are checked, and that are copied at once: three copies of 1 B parameters with gradients,
# moments, and what the reference makes on its way would take 90 GB
AT_ONCE = 2**26
# calls in a row that one sample is the mean of: as many as take this long, as `torch.utils.benchmark` does it
SAMPLE_SECONDS = 0.03


def gpt_shapes(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[list[int]]:
    """Return the shapes of a GPT with tied embeddings, 124 M parameters by default."""
    block = [
        *([width], [width], [3 * width, width], [3 * width], [width, width], [width]),
        *([width], [width], [4 * width, width], [4 * width], [width, 4 * width], [width]),
    ]
    return [[vocabulary, width], [context, width], *(block * layers), [width], [width]]


SIZES: dict[str, list[list[int]]] = {
    "one tensor of 30 M": [[30_000_000]],
    "124 M GPT, 148 tensors": gpt_shapes(),
    "1,000 tensors of 256": [[256]] * 1000,
}
CUDA_SIZES = {**SIZES, "one tensor of 1 B": [[1_000_000_000]]}

Step = Callable[[], object]


def duotone_step(shapes: list[list[int]], device: str, backend: Backend = "auto") -> tuple[Step, list[nn.Parameter]]:
    """Return a step of Duotone, and its parameters."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        master = torch.randn(shape, generator=generator, device=device)
        param = nn.Parameter(master.bfloat16())
        ensure_tail(param)
        write_master(param, master)
        param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3).bfloat16()
        params.append(param)
    optimizer = dt.AdamW(params, lr=1e-3, backend=backend)
    scaler = dt.LossScaler("bf16")
    return lambda: scaler.step(optimizer, clip_norm=1.0), params


def torch_chain(shapes: list[list[int]], device: str, kind: str) -> tuple[Step, list[nn.Parameter]]:
    """Return the same step as `torch.amp` takes it on FP32 weights, and its parameters."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = nn.Parameter(torch.randn(shape, generator=generator, device=device))
        param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3).bfloat16().float()
        params.append(param)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=kind == "fused", foreach=kind == "foreach")
    scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.ones((), device=device))

    def chain() -> list[torch.Tensor]:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        return [param.detach().to(torch.bfloat16) for param in params]

    return chain, params


def torch_fp32(shapes: list[list[int]], device: str) -> Step:
    """Return a step of torch's fused AdamW on FP32 weights and gradients."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)
    return torch.optim.AdamW(params, lr=1e-3, fused=True).step


def copy_step(numel: int, device: str) -> Step:
    """Return a copy that reads and writes as many bytes as a step of Duotone, in parts where it is much."""
    words = BYTES_PER_PARAMETER * numel // 8
    times = -(-words // (8 * AT_ONCE))
    source = torch.ones(words // times, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    return copy


def check(shapes: list[list[int]], device: str) -> dict[str, Any]:
    """Compare one step of the fused kernels with the reference, in every bit, and with torch's chain.

    Raises:
        SystemExit: they differ; nothing is timed then.
    """
    shapes = at_most(shapes)
    fused, params = duotone_step(shapes, device)
    plain, expected = duotone_step(shapes, device, "reference")
    chain, peers = torch_chain(shapes, device, "fused")
    for step in (fused, plain, chain):
        step()
    if not all(map(same_master, params, expected)):
        raise SystemExit("the fused kernels differ from the reference; nothing was timed")
    distance = max(
        ((read_master(one) - other.detach()).abs() / other.detach().abs().clamp(min=1.0)).max().item()
        for one, other in zip(params, peers, strict=True)
    )
    if distance > 1e-6:
        raise SystemExit(f"a step differs from torch's chain by {distance:.2e} of a weight; nothing was timed")
    return {"equal_to_reference_in_every_bit": True, "largest_distance_to_torch_chain": distance}


def at_most(shapes: list[list[int]]) -> list[list[int]]:
    """Return shapes with the first dimension cut of those that have too many elements to be checked."""
    cut = []
    for shape in shapes:
        rest = torch.Size(shape[1:]).numel()
        cut.append([min(shape[0], max(1, AT_ONCE // rest)), *shape[1:]] if rest else shape)
    return cut


def same_master(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the masters of two parameters have the same bits."""
    return torch.equal(read_master(one).view(torch.int32), read_master(other).view(torch.int32))


def measure(shapes: list[list[int]], device: str, at_least: float = SECONDS) -> dict[str, Any]:
    """Check, then time every arm in turn, and return medians, quartiles and ratios round by round."""
    checked = check(shapes, device)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    arms: dict[str, Step] = {"duotone": duotone_step(shapes, device)[0]}
    arms["torch chain"] = torch_chain(shapes, device, "fused")[0]
    if numel < 500_000_000:
        arms["torch chain, foreach"] = torch_chain(shapes, device, "foreach")[0]
        arms["torch FP32"] = torch_fp32(shapes, device)
    arms["copy"] = copy_step(numel, device)
    calls = calls_per_sample(arms, device)
    seconds = in_turn(arms, calls, device, at_least, ROUNDS)
    own = seconds["duotone"]
    moved = BYTES_PER_PARAMETER * numel
    return {
        "parameters": numel,
        "tensors": len(shapes),
        "rounds": len(own),
        "calls_per_sample": calls,
        **checked,
        "milliseconds": report.milliseconds(seconds),
        "times_faster_than": report.times_faster(seconds, "duotone"),
        "bytes_per_second": report.quartiles([moved / value for value in own]),
    }


def by_size(
    sizes: Mapping[str, list[list[int]]], measure_one: Callable[[list[list[int]]], dict[str, Any]]
) -> dict[str, Any]:
    """Return what is measured of parameters of some shapes, by what these are called."""
    results = {}
    for name, shapes in sizes.items():
        print(name, flush=True)
        results[name] = measure_one(shapes)
    return results


def calls_per_sample(arms: Mapping[str, Step], device: str) -> dict[str, int]:
    """Return how many calls in a row a sample of each arm is the mean of."""
    calls = {}
    for name, arm in arms.items():
        arm()
        calls[name] = max(1, round(SAMPLE_SECONDS / timed(arm, 3, device)))
    return calls


def in_turn(
    arms: Mapping[str, Step], calls: Mapping[str, int], device: str, at_least: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Time every arm in turn, round by round, for some seconds, and return the seconds of a call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    started, count = time.perf_counter(), 0
    while count < rounds[0] or (time.perf_counter() - started < at_least and count < rounds[1]):
        for name, arm in arms.items():
            seconds[name].append(timed(arm, calls[name], device))
        count += 1
    return seconds


def timed(arm: Step, calls: int, device: str) -> float:
    """Return the seconds that a call takes, the mean of some in a row, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        arm()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


FIRST_STEP = """
import time, torch, duotone.torch as dt
weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
weight.grad = torch.ones_like(weight)
optimizer, scaler = dt.AdamW([weight]), dt.LossScaler("bf16")
seconds = []
for _ in range(2):
    started = time.perf_counter()
    scaler.step(optimizer, clip_norm=1.0)
    seconds.append(time.perf_counter() - started)
print(seconds[0] - seconds[1])
"""


def first_step() -> dict[str, float]:
    """Return what a process' first step takes more than its second, in seconds, without and with kernels on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}

        def seconds() -> float:
            command = [sys.executable, "-c", FIRST_STEP]
            return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

        compiling = seconds()
        return {"compiling": compiling, "loading": report.quartiles([seconds() for _ in range(7)])["median"]}


def tables(results: dict[str, Any]) -> str:
    """Return the table of docs/evidence.md in Markdown."""
    peers = ("torch chain", "torch chain, foreach", "torch FP32")
    lines = [
        f"| parameters | Duotone, ms | {' | '.join(f'against {peer}' for peer in peers)} | GB/s | against copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results["sizes"].items():
        faster = [
            report.with_quartiles(result["times_faster_than"][peer]) if peer in result["times_faster_than"] else ""
            for peer in peers
        ]
        own = result["milliseconds"]["duotone"]["median"]
        lines.append(
            f"| {name} | {own:.2f} | {' | '.join(faster)} | {result['bytes_per_second']['median'] / 1e9:.1f} | "
            f"{result['times_faster_than']['copy']['median']:.2f} |"
        )
    text = "\n".join(lines) + "\n\nHow many times faster: medians, with quartiles, of ratios taken round by round. "
    if results["first_step_seconds"]:
        loading, compiling = (results["first_step_seconds"][key] for key in ("loading", "compiling"))
        text += (
            f"The first step of a process takes {loading:.2f} s more than the second with compiled kernels on disk, "
            f"{compiling:.1f} s when they have to be compiled. "
        )
    return text + report.provenance(results["machine"])


def main() -> None:
    """Run as the command line says."""

    def measure_sizes(device: str, seconds: float) -> dict[str, Any]:
        sizes = CUDA_SIZES if device == "cuda" else SIZES
        results = by_size(sizes, lambda shapes: measure(shapes, device, seconds))
        return {"sizes": results, "first_step_seconds": first_step() if device == "cpu" else None}

    report.run("step", __doc__, measure_sizes, tables, SECONDS)


if __name__ == "__main__":
    main()
