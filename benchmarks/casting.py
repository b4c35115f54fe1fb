"""Casting against its peers: dtypes first, then saved activations, peak memory and time of a training step.

    python benchmarks/casting.py             # checks, measures, writes results/casting.json, fills docs/evidence.md
    python benchmarks/casting.py --tables    # fills docs/evidence.md from the results that are there
    python benchmarks/casting.py --device cuda --out FOLDER

The arms of a step, each with its own model from the same seed, in turn within each round:

- `fp32`: FP32 throughout, `clip_grad_norm_`, torch's fused AdamW.
- `torch.amp bf16`, `torch.amp fp16`: forward pass and loss under `torch.autocast`, `GradScaler` for FP16,
  `clip_grad_norm_`, fused AdamW, as PyTorch's documentation has it.
- `bf16`, `fp16`: Duotone's policies, `dt.AdamW` and `LossScaler.step(clip_norm=1.0)`.

On a CPU, memory is compared with `torch.amp` by CUDA's rules too: autocast with FP32 results of norms and losses. Saved
activations are counted by storage; peak memory adds up every allocation and release of a step, weights and optimizer
state included, as torch's profiler sees them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import duotone.torch as dt
from duotone.torch.watching import saved_for_backward
from duotone.train.tasks.gpt import GPT, GPTConfig

SECONDS = 60.0
ROUNDS = (5, 41)
# about 11 M parameters and 2,048 tokens in a step
SMALL = (GPTConfig(layers=6, heads=6, width=384, context=256), 8)
# for the arm that takes more than ten times as long
TINY = (GPTConfig(layers=2, heads=4, width=256, context=128), 4)
# a batch at which activations outweigh 0.9 M parameters by far
WIDE_BATCH = (GPTConfig(layers=4, heads=4, width=128, context=256), 64)
GPT2 = (GPTConfig(layers=12, heads=12, width=768, context=1024, vocabulary=50304), 8)

Step = Callable[[], None]


class CudaRules(TorchFunctionMode):
    """What autocast does on CUDA and not on a CPU: norms, softmax and losses in FP32, their results too."""

    RAISED = frozenset({F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, Tensor.softmax})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in self.RAISED:
            args = tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def torch_amp_as_on_cuda(device: str) -> Iterator[None]:
    """Autocast in BF16 with CUDA's rules, on a CPU too."""
    with torch.autocast(device, torch.bfloat16), CudaRules() if device == "cpu" else nullcontext():
        yield


class PreNormBlock(nn.Module):
    """A pre-norm transformer block as people write it: LayerNorm with weights, biases, GELU of four times the width."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_residual = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to the same."""
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.to_residual(attended)
        return x + self.mlp(self.mlp_norm(x))


# what an arm's forward pass runs in
Around = Callable[[], AbstractContextManager[Any]]


def saved_activations(device: str) -> dict[str, float]:
    """Return what a block inside a model saves for backward, in bytes per token and channel."""
    arms: dict[str, tuple[str | None, Around]] = {
        "fp32": ("fp32", nullcontext),
        "torch.amp bf16": (None, lambda: torch.autocast(device, torch.bfloat16)),
        "torch.amp bf16, CUDA's rules": (None, lambda: torch_amp_as_on_cuda(device)),
        "bf16": ("bf16", nullcontext),
        "fp16": ("fp16", nullcontext),
        "bf16, checkpointed": ("bf16", nullcontext),
    }
    tokens, channels = (8, 1024), 128
    result = {}
    for arm, (policy, around) in arms.items():
        saved_bytes = []
        for blocks in (2, 3):
            model = nn.Sequential(*(PreNormBlock(channels) for _ in range(blocks))).to(device)
            if policy is not None:
                dt.cast(model, policy)
            if arm.endswith("checkpointed"):
                dt.checkpoint_activations(model, "*")
            x = torch.randn(*tokens, channels, device=device, requires_grad=True)
            with around(), saved_for_backward(model.parameters()) as saved:
                model(x)
            saved_bytes.append(saved.total_activation_bytes)
        result[arm] = (saved_bytes[1] - saved_bytes[0]) / (tokens[0] * tokens[1] * channels)
    return result


def training_step(arm: str, shape: tuple[GPTConfig, int], device: str, compiled: bool = False) -> Step:
    """Return one whole training step of a GPT in an arm: forward, backward, clipping, update."""
    config, batch = shape
    torch.manual_seed(0)
    model: nn.Module = GPT(config).to(device)
    tokens = torch.randint(config.vocabulary, (batch, config.context + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return _step(arm, model, lambda model: model(x, y), device, compiled)


def mlp_step(arm: str, device: str) -> Step:
    """Return one training step of an MLP of width 64, where overhead is all there is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    x, y = torch.randn(32, 64, device=device), torch.randint(10, (32,), device=device)
    return _step(arm, model, lambda model: F.cross_entropy(model(x), y), device, compiled=False)


def _step(arm: str, model: nn.Module, loss_of: Callable[[Any], Tensor], device: str, compiled: bool) -> Step:
    if arm in ("bf16", "fp16"):
        dt.cast(model, arm)
        duotone, scaler = dt.AdamW(model.parameters(), lr=1e-4), dt.LossScaler(arm)
        run = torch.compile(model) if compiled else model

        def step() -> None:
            scaler.backward(loss_of(run))
            scaler.step(duotone, clip_norm=1.0)
            duotone.zero_grad()

        return step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = torch.float16 if arm.startswith("torch.amp fp16") else torch.bfloat16
    grad_scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    run = torch.compile(model) if compiled else model

    def around() -> AbstractContextManager[Any]:
        if arm.endswith("CUDA's rules"):
            return torch_amp_as_on_cuda(device)
        return torch.autocast(device, dtype, enabled=arm != "fp32")

    def peer_step() -> None:
        with around():
            loss = loss_of(run)
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()

    return peer_step


def peak_bytes(make: Callable[[], Step], device: str) -> int:
    """Return the most bytes that were allocated at one time while a model was built and took two steps."""
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_twice(make)
        return torch.cuda.max_memory_allocated() - before
    # kernels are compiled, and whatever is kept for good is allocated, before the count
    run_twice(make)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run_twice(make)
    held = most = 0
    for change in allocations(profiled):
        held += change
        most = max(most, held)
    return most


def run_twice(make: Callable[[], Step]) -> None:
    """Build a step and take it twice: the optimizer's state exists from the first on."""
    step = make()
    step()
    step()


def allocations(profiled: profile) -> list[int]:
    """Return the sizes of allocations, and of releases as negative numbers, in the order of time."""
    results: Any = profiled.profiler
    found: list[tuple[int, int]] = []
    events = list(results.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if hasattr(event.extra_fields, "alloc_size"):
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found, key=lambda change: change[0])]


def timed(steps: dict[str, Step], device: str, at_least: float, calls: int = 1) -> dict[str, list[float]]:
    """Time every arm in turn, round by round, and return the seconds of a call."""
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    started = time.perf_counter()
    first = next(iter(seconds.values()))
    while len(first) < ROUNDS[0] or (time.perf_counter() - started < at_least and len(first) < ROUNDS[1]):
        for arm, step in steps.items():
            begun = time.perf_counter()
            for _ in range(calls):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append((time.perf_counter() - begun) / calls)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return milliseconds by arm, and how many times faster than each other arm Duotone's are, round by round."""
    own = [arm for arm in seconds if arm in ("bf16", "fp16")]
    return {
        "milliseconds": report.milliseconds(seconds),
        "times_faster": {arm: report.times_faster(seconds, arm) for arm in own},
    }


def check(device: str) -> dict[str, Any]:
    """Check that every product of a BF16 step reads 16 bits, that its loss is FP32, and near FP32's.

    Raises:
        SystemExit: it is not so; nothing is measured then.
    """
    config, batch = TINY
    tokens = torch.randint(config.vocabulary, (batch, config.context + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses = {}
    for policy in ("fp32", "bf16"):
        torch.manual_seed(0)
        losses[policy] = dt.cast(GPT(config).to(device), policy)(x, y)
    torch.manual_seed(0)
    explained = dt.explain(dt.cast(GPT(config).to(device), "bf16"), x, y)
    products = [each for each in explained.operations if each.name in ("linear", "scaled_dot_product_attention")]
    wide = [each.name for each in products if each.compute_dtype != "bfloat16"]
    distance = abs(losses["bf16"].item() - losses["fp32"].item()) / losses["fp32"].item()
    if not products or wide or losses["bf16"].dtype != torch.float32 or distance > 1e-2:
        raise SystemExit(
            f"products in FP32: {wide}; loss {losses['bf16']}, FP32 has {losses['fp32']}; nothing was timed"
        )
    return {"products_in_bfloat16": sum(each.calls for each in products), "distance_of_loss_to_fp32": distance}


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Check, then measure everything there is for a device."""
    results: dict[str, Any] = {"check": check(device)}
    print("saved activations", flush=True)
    results["saved_bytes_per_token_and_channel"] = saved_activations(device)
    print("peak memory", flush=True)
    peers = ("fp32", "torch.amp bf16", "torch.amp bf16, CUDA's rules", "bf16", "fp16")
    results["peak_bytes"] = {
        arm: peak_bytes(lambda arm=arm: training_step(arm, WIDE_BATCH, device), device) for arm in peers
    }
    print("training steps", flush=True)
    if device == "cuda":
        arms = ("fp32", "torch.amp bf16", "torch.amp fp16", "bf16", "fp16")
        for name, compiled in (("GPT-2 124 M", False), ("GPT-2 124 M, compiled", True)):
            steps = {arm: training_step(arm, GPT2, device, compiled) for arm in arms}
            results.setdefault("steps", {})[name] = summary(timed(steps, device, seconds))
    else:
        arms = ("fp32", "torch.amp bf16", "bf16", "fp16")
        name = "GPT, 11 M, 2,048 tokens"
        results["steps"] = {
            name: summary(timed({arm: training_step(arm, SMALL, device) for arm in arms}, device, seconds))
        }
        arms = ("fp32", "torch.amp fp16", "fp16")
        name = "GPT, 1.6 M, 512 tokens"
        results["steps"][name] = summary(
            timed({arm: training_step(arm, TINY, device) for arm in arms}, device, seconds)
        )
    arms = ("fp32", "torch.amp bf16", "bf16")
    results["steps"]["MLP, 64 wide"] = summary(
        timed({arm: mlp_step(arm, device) for arm in arms}, device, seconds, calls=50)
    )
    return results


def tables(results: dict[str, Any]) -> str:
    """Return the tables of docs/evidence.md in Markdown."""
    saved, peak = results["saved_bytes_per_token_and_channel"], results["peak_bytes"]
    lines = [
        "| arm | saved by a transformer block, bytes per token and channel | peak of a GPT's step, MB |",
        "|---|---|---|",
    ]
    for arm in dict.fromkeys([*saved, *peak]):
        most = f"{peak[arm] / 1e6:.0f} ({peak[arm] / peak['fp32']:.2f} of FP32)" if arm in peak else ""
        lines.append(f"| `{arm}` | {saved[arm]:.1f} | {most} |" if arm in saved else f"| `{arm}` | | {most} |")
    lines += ["", "| training step | Duotone's | ms | times faster than |", "|---|---|---|---|"]
    for name, result in results["steps"].items():
        for arm, peers in result["times_faster"].items():
            faster = "; ".join(f"`{peer}` " + report.with_quartiles(ratio) for peer, ratio in peers.items())
            lines.append(f"| {name} | `{arm}` | {result['milliseconds'][arm]['median']:.4g} | {faster} |")
    text = "\n".join(lines) + "\n\nMedians, with quartiles, of ratios taken round by round. "
    return text + report.provenance(results["machine"])


def main() -> None:
    """Run as the command line says."""
    report.run("casting", __doc__, measure, tables, SECONDS)


if __name__ == "__main__":
    main()
