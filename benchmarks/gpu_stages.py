"""The stages of `gpu.py`, one a process: `python gpu_stages.py STAGE FOLDER [--dry]`; results are lines of JSON."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STAGE, OUT = sys.argv[1], Path(sys.argv[2])
DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
ROOT = Path(__file__).parents[1]

import report  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import duotone.torch as dt  # noqa: E402


def emit(what: str, **found: Any) -> None:
    """Write a result, on disk before this returns."""
    line = json.dumps({"stage": STAGE, "what": what, **found}, default=str)
    with open(OUT / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line, flush=True)


@contextlib.contextmanager
def part(what: str) -> Iterator[None]:
    """Write what goes wrong in a part of a stage as its result, and go on with the next."""
    try:
        yield
    except Exception as error:  # whatever is found out here is a result
        emit(what, failed=f"{type(error).__name__}: {error}"[:400])
        failures.append(what)


failures: list[str] = []


def wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], repeat: int = 10, warmup: int = 3) -> float:
    """Return the median of what a call takes, the device's work included."""
    for _ in range(warmup):
        call()
    found = []
    for _ in range(2 if DRY else repeat):
        wait()
        started = time.perf_counter()
        call()
        wait()
        found.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(found), 4)


def environment() -> None:
    import triton

    emit("versions", **report.machine(), triton=triton.__version__, cuda=torch.version.cuda)
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        emit("device", multiprocessors=properties.multi_processor_count, bytes=properties.total_memory)
    numel, width = (2**20, 256) if DRY else (2**30, 8192)
    source = torch.ones(numel, device=DEVICE)
    target = torch.empty_like(source)
    emit("copy", bytes_per_second=8e3 * numel / milliseconds(lambda: target.copy_(source)))
    a, b = (torch.randn(width, width, device=DEVICE).bfloat16() for _ in range(2))
    emit("product in bf16", flops_per_second=2e3 * width**3 / milliseconds(lambda: a @ b))
    one = torch.zeros((), device=DEVICE)
    emit("1,000 small kernels", milliseconds=milliseconds(lambda: [one.add_(1) for _ in range(1000)]))


def pytest(what: str, *arguments: str) -> None:
    """Run some of the project's tests."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    # which the other tests, among them those of kernels that are compiled, do not expect
    added = {"TRITON_INTERPRET": "1"} if DRY and STAGE == "bits" else {}
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **added}, capture_output=True, text=True, check=False)
    print(run.stdout[-20_000:], run.stderr[-2_000:])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    summary = next((line for line in reversed(run.stdout.splitlines()) if " passed" in line or " failed" in line), "")
    emit(what, exit=run.returncode, summary=summary.strip("= "), failed=failed[:20])
    if run.returncode:
        failures.append(what)


def bits() -> None:
    folder = "tests/torch/kernels"
    pytest("cross-entropy and norms", f"{folder}/cuda_cross_entropy.py", f"{folder}/cuda_norms.py")
    some = ["-k", "decoding or two_chunks"] if DRY else []
    pytest("formats and averages", f"{folder}/cuda_formats.py", f"{folder}/cuda_averages.py", *some)
    pytest("updates", f"{folder}/cuda_grid.py", *(["-k", "maximize and lion"] if DRY else ["-m", "not slow"]))


def small(policy: str) -> tuple[nn.Module, Any, Any, Callable[[], object]]:
    """Return a small cast model, its optimizer and scaler, and a whole step of it."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)
    model = dt.cast(nn.Sequential(*layers).to(DEVICE), policy)
    optimizer = dt.AdamW(model.parameters(), lr=torch.tensor(1e-3, device=DEVICE))
    scaler = dt.LossScaler(policy)
    x = torch.randn(32, 64, device=DEVICE)

    def step() -> None:
        scaler.backward(model(x).float().square().mean())
        scaler.step(optimizer, clip_norm=1.0)
        optimizer.zero_grad()

    return model, optimizer, scaler, step


def launches() -> None:
    for policy in ("bf16", "fp16", "bf16-mixed", "bf16,state=bfloat16"):
        with part(policy):
            model, optimizer, scaler, step = small(policy)
            for _ in range(3):
                step()
            wait()
            if not DRY:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    step()
            finally:
                if not DRY:
                    torch.cuda.set_sync_debug_mode("default")
            scaler.backward(model(torch.randn(32, 64, device=DEVICE)).float().mean())
            wait()
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [] if DRY else [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiled:
                scaler.step(optimizer, clip_norm=1.0)
                wait()
            kinds = [getattr(event, "device_type", None) for event in profiled.events() or ()]
            emit(policy, waits=False, launches_of_a_step=sum("CUDA" in str(kind) for kind in kinds))


def graph() -> None:
    for policy in ("bf16", "fp16"):
        with part(policy):
            model, optimizer, _, step = small(policy)
            twin, twin_optimizer, _, twin_step = small(policy)
            for _ in range(3):
                step()
                twin_step()
            wait()
            replay = step
            if not DRY:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    step()
                replay = captured.replay
            same = []
            for number in range(4):
                for each in (optimizer, twin_optimizer):
                    each.param_groups[0]["lr"].fill_(1e-3 / (number + 1))
                replay()
                twin_step()
                pairs = zip(dt.master_weights(model).values(), dt.master_weights(twin).values(), strict=True)
                same.append(all(torch.equal(one, other) for one, other in pairs))
            emit(policy, replays_equal_eager_steps=same)


def gpt_step(arm: str, *, compiled: bool) -> tuple[Callable[[], object], int]:
    """Return a training step of a GPT-2 of 124 M parameters, and how many tokens it takes."""
    from duotone.train.tasks.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    large = GPTConfig(layers=12, heads=12, width=768, context=1024, vocabulary=50304)
    config = GPTConfig(layers=1, heads=2, width=32, context=16) if DRY else large
    batch = 2 if DRY else 8
    model: Any = GPT(config).to(DEVICE)
    tokens = torch.randint(config.vocabulary, (batch, config.context + 1), device=DEVICE)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    autocast: Any = contextlib.nullcontext()
    scaler: Any = None
    if arm.startswith("duotone"):
        policy = arm.removeprefix("duotone ")
        optimizer: Any = dt.AdamW(dt.cast(model, policy).parameters(), lr=1e-4)
        scaler = dt.LossScaler(policy)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        torch.set_float32_matmul_precision("high" if arm == "tf32" else "highest")
        if arm == "torch.amp bf16":
            autocast = torch.autocast(DEVICE, torch.bfloat16)
    called = torch.compile(model) if compiled else model

    def step() -> None:
        with autocast:
            loss = called(x, y)
        if scaler is not None:
            scaler.backward(loss)
            scaler.step(optimizer, clip_norm=1.0)
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()

    return step, batch * config.context


def gpt(*, compiled: bool = False) -> None:
    arms = ["duotone bf16", "torch.amp bf16", *([] if compiled else ["fp32", "tf32", "duotone fp16"])]
    for arm in arms:
        name = f"{arm}, compiled" if compiled else arm
        with part(name):
            step, tokens = gpt_step(arm, compiled=compiled)
            took = milliseconds(step)
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
            step()
            wait()
            peak = 0 if DRY else torch.cuda.max_memory_allocated()
            emit(name, milliseconds=took, tokens_per_second=round(1e3 * tokens / took), peak_bytes=peak)
            del step
        if not DRY:
            torch.cuda.empty_cache()


def compiled() -> None:
    if DRY:
        # a compiler of C++ may not be there
        torch._dynamo.config.suppress_errors = True
    gpt(compiled=True)


def step() -> None:
    import step as benchmark

    sizes = {"one of 1,000": [[1000]]} if DRY else benchmark.CUDA_SIZES
    for name, shapes in sizes.items():
        with part(name):
            found = benchmark.measure(shapes, DEVICE, 0.1 if DRY else 5.0)
            ratios = {peer: round(ratio["median"], 3) for peer, ratio in found["times_faster_than"].items()}
            emit(name, milliseconds=found["milliseconds"]["duotone"]["median"], times_faster_than=ratios)


def loss() -> None:
    from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32
    from duotone.torch.casting.float32_inside.norms import layer_norm_in_float32

    rows, classes, width = (64, 500, 32) if DRY else (8192, 50_304, 768)
    x = torch.randn(rows, width, device=DEVICE).bfloat16().requires_grad_()
    head = (torch.randn(classes, width, device=DEVICE) / 16).bfloat16().requires_grad_()
    target = torch.randint(classes, (rows,), device=DEVICE)
    weight, bias = (torch.randn(width, device=DEVICE, requires_grad=True) for _ in range(2))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "head and cross-entropy": lambda: cross_entropy_in_float32(F.cross_entropy, F.linear(x, head), target),
        "head and torch's of logits.float()": lambda: F.cross_entropy(F.linear(x, head).float(), target),
        "linear_cross_entropy": lambda: dt.linear_cross_entropy(x, head, target),
        "LayerNorm": lambda: layer_norm_in_float32(F.layer_norm, x, (width,), weight, bias).sum(),
        "torch's LayerNorm of 16-bit weights": lambda: F.layer_norm(x, (width,), weight.to(x), bias.to(x)).sum(),
    }
    for name, call in calls.items():
        with part(name):
            took = milliseconds(lambda call=call: call().backward())
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
            value = call()
            value.backward()
            peak = 0 if DRY else torch.cuda.max_memory_allocated()
            emit(name, milliseconds=took, value=round(value.item(), 6), peak_bytes=peak)


def tests() -> None:
    pytest("tests marked gpu", "-m", "gpu", "tests/torch", *(["--collect-only", "-q"] if DRY else ["-n", "8"]))


def compare() -> None:
    arms = "fp32,bf16" if DRY else "fp32,torch-amp-bf16,bf16"
    options = ["--arms", arms, "--steps", "10", "--seeds", "1", "--device", DEVICE, "--out", str(OUT / "comparison")]
    command = [sys.executable, "-m", "duotone", "compare", "stdlib-text:tiny", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout[-5_000:], run.stderr[-5_000:])
    emit("stdlib-text:tiny", exit=run.returncode)
    if run.returncode:
        failures.append("compare")


if __name__ == "__main__":
    stages = (environment, bits, launches, graph, gpt, step, loss, tests, compiled, compare)
    {stage.__name__: stage for stage in stages}[STAGE]()
    sys.exit(1 if failures else 0)
