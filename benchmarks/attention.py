"""Attention on a CPU against torch's: distances to FP64 first, then memory, then time, as ratios within one run.

    python benchmarks/attention.py             # checks, measures, writes results/attention.json, fills docs/evidence.md
    python benchmarks/attention.py --tables    # fills docs/evidence.md from the results that are there

Both arms are given the same BF16 operands, heads side by side as a projection leaves them, and take turns within each
round: `F.scaled_dot_product_attention` as it is, and as a cast model calls it. Saved bytes are counted by storage; peak
memory is the most that was allocated at one time in a forward and a backward pass, as torch's profiler sees it.
"""

import time
from collections.abc import Callable
from typing import Any

import casting
import report
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from duotone.torch.casting.float32_inside.attention import attention
from duotone.torch.watching import saved_for_backward

SECONDS = 1.0
ROUNDS = (5, 101)
# batch, heads, length, width of a head; each causal and not
SHAPES = [
    (16, 8, 64, 64),
    (8, 8, 128, 64),
    (4, 4, 256, 64),
    (8, 6, 256, 64),
    (8, 8, 256, 32),
    (1, 8, 512, 128),
    (2, 4, 1024, 64),
    (1, 8, 2048, 64),
    (1, 4, 2048, 128),
    (1, 2, 4096, 32),
    (1, 2, 4096, 64),
]
ARMS: dict[str, Callable[..., Tensor]] = {
    "torch": F.scaled_dot_product_attention,
    "duotone": lambda *args, **named: attention(F.scaled_dot_product_attention, *args, **named),
}
# what a rounding of torch's own may be larger by
FURTHER = 1.1


def operands(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Return query, key, value, and the gradient of the result."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, batch, length, heads, width, generator=generator).bfloat16()
    return [each.transpose(1, 2) for each in drawn.unbind()]


def forward_and_backward(call: Callable[..., Tensor], given: list[Tensor], is_causal: bool) -> list[Tensor]:
    """Return the result and the gradients of query, key and value."""
    leaves = [each.detach().requires_grad_() for each in given[:3]]
    output = call(*leaves, is_causal=is_causal)
    return [output.detach(), *torch.autograd.grad(output, leaves, given[3])]


def distances(shape: tuple[int, int, int, int], is_causal: bool) -> dict[str, list[dict[str, float]]]:
    """Return how far results and gradients are from FP64's, of one element of the batch.

    Raises:
        SystemExit: Duotone's are further than torch's; nothing is measured then.
    """
    given = [each[:1] for each in operands(shape)]
    exact = forward_and_backward(ARMS["torch"], [each.double() for each in given], is_causal)
    result = {}
    for arm, call in ARMS.items():
        found = forward_and_backward(call, given, is_causal)
        differences = [(one.double() - other, other) for one, other in zip(found, exact, strict=True)]
        result[arm] = [
            {"max": by.abs().max().item(), "relative_l2": (by.norm() / other.norm()).item()}
            for by, other in differences
        ]
    for own, theirs in zip(result["duotone"], result["torch"], strict=True):
        if own["relative_l2"] > FURTHER * theirs["relative_l2"]:
            raise SystemExit(f"{shape}: distances to FP64 {result}; nothing was measured")
    return result


def memory(shape: tuple[int, int, int, int], is_causal: bool) -> dict[str, dict[str, int]]:
    """Return saved bytes and the peak of a forward and a backward pass."""
    result = {}
    for arm, call in ARMS.items():
        given = operands(shape)
        leaves = [each.detach().requires_grad_() for each in given[:3]]
        with saved_for_backward([]) as saved:
            call(*leaves, is_causal=is_causal)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            forward_and_backward(call, given, is_causal)
        held = most = 0
        for change in casting.allocations(profiled):
            held += change
            most = max(most, held)
        result[arm] = {"saved_bytes": saved.total_activation_bytes, "peak_bytes": most}
    return result


def seconds_of(shape: tuple[int, int, int, int], is_causal: bool, seconds: float) -> dict[str, Any]:
    """Return times of the forward pass alone, without a gradient, and of both, arm after arm in each round."""
    given = operands(shape)

    def inference(call: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            call(*given[:3], is_causal=is_causal)

    ways = {"forward": inference, "both": lambda call: forward_and_backward(call, given, is_causal)}
    result: dict[str, Any] = {}
    for way, run in ways.items():
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for call in ARMS.values():
            run(call)
        end = time.perf_counter() + seconds / 2
        while len(times["torch"]) < ROUNDS[0] or (time.perf_counter() < end and len(times["torch"]) < ROUNDS[1]):
            for arm, call in ARMS.items():
                start = time.perf_counter()
                run(call)
                times[arm].append(time.perf_counter() - start)
        result[way] = {
            "milliseconds": report.milliseconds(times),
            "times_faster": report.times_faster(times, "duotone")["torch"],
        }
    return result


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Check every shape, then measure it."""
    rows = []
    for shape in SHAPES:
        for is_causal in (True, False):
            print(shape, "causal" if is_causal else "", flush=True)
            rows.append(
                {
                    "shape": shape,
                    "is_causal": is_causal,
                    "distances": distances(shape, is_causal),
                    "memory": memory(shape, is_causal),
                    **seconds_of(shape, is_causal, seconds),
                }
            )
    return {"rows": rows}


def tables(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| batch, heads, length x width | causal | forward, ms | times faster | both, ms | times faster | "
        "relative distance to FP64, of torch's | peak MB, of torch's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        batch, heads, length, width = row["shape"]
        cells = [f"{batch}, {heads}, {length:,} x {width}", "yes" if row["is_causal"] else "no"]
        for way in ("forward", "both"):
            cells.append(f"{row[way]['milliseconds']['duotone']['median']:.2f}")
            cells.append(report.with_quartiles(row[way]["times_faster"]))
        ratios = [
            own["relative_l2"] / theirs["relative_l2"]
            for own, theirs in zip(row["distances"]["duotone"], row["distances"]["torch"], strict=True)
        ]
        cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        own, theirs = row["memory"]["duotone"], row["memory"]["torch"]
        cells.append(f"{own['peak_bytes'] / 1e6:.1f} ({own['peak_bytes'] / theirs['peak_bytes']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n\nHow many times faster: medians, with quartiles, of ratios taken round by round. "
    return text + report.provenance(results["machine"], command="python benchmarks/attention.py")


def main() -> None:
    """Run as the command line says."""
    report.run("attention", __doc__, measure, tables, SECONDS)


if __name__ == "__main__":
    main()
