"""An update of an average against torch's own: equality first, then time, as ratios within one run.

    python benchmarks/average.py             # checks, measures, writes results/average.json, fills docs/evidence.md
    python benchmarks/average.py --tables    # fills docs/evidence.md from the results that are there
    python benchmarks/average.py --device cuda --out FOLDER

The arms, each on its own copies of the same parameters, in turn within each round:

- `duotone`: `Average.update` of BF16 weights with tails.
- `duotone, FP32`: the same of FP32 weights.
- `torch`: `AveragedModel.update_parameters` of FP32 weights with `get_ema_multi_avg_fn`, which is foreach lerp.
- `copy`: `Tensor.copy_` of as many bytes as an update of Duotone moves, 12 per parameter, reads and writes together.
"""

from typing import Any

import report
import step
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import duotone.torch as dt
from duotone.torch.kernels import Backend
from duotone.torch.parameters.masters import ensure_tail, write_master

# weight 2, tail 2 and average 4 are read, the average is written; of FP32 weights, too, 4 and 4 are read and 4 written
BYTES_PER_PARAMETER = 12
DECAY = 0.999
SECONDS = 5.0
ROUNDS = (9, 101)
SIZES = {name: step.SIZES[name] for name in ("124 M GPT, 148 tensors", "1,000 tensors of 256")}


def model_of(shapes: list[list[int]], device: str, *, split: bool) -> nn.Module:
    """Return a module of parameters of these shapes, in BF16 with tails or in FP32."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        master = torch.randn(shape, generator=generator, device=device)
        param = nn.Parameter(master.bfloat16() if split else master)
        if split:
            ensure_tail(param)
            write_master(param, master)
        params.append(param)
    return nn.ParameterList(params)


def duotone_update(shapes: list[list[int]], device: str, *, split: bool, backend: Backend = "auto") -> Any:
    """Return an average of Duotone's, past its first update."""
    average = dt.Average(model_of(shapes, device, split=split), DECAY, backend=backend)
    average.update()
    return average


def torch_update(shapes: list[list[int]], device: str) -> tuple[step.Step, AveragedModel]:
    """Return an update of torch's average of FP32 weights, past its first, and the average."""
    model = model_of(shapes, device, split=False)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    return lambda: averaged.update_parameters(model), averaged


def check(shapes: list[list[int]], device: str) -> dict[str, Any]:
    """Compare an update of weights that have moved with the reference, in every bit, and with torch's.

    Raises:
        SystemExit: they differ; nothing is timed then.
    """
    fused, plain = (duotone_update(shapes, device, split=True, backend=backend) for backend in ("auto", "reference"))
    theirs, averaged = torch_update(shapes, device)
    for average in (fused, plain):
        # as if all weights had moved to where nobody has been
        for kept in average.state_dict()["averages"].values():
            kept.mul_(0.5)
        average.update()
    with torch.no_grad():
        for kept in averaged.module.parameters():
            kept.mul_(0.5)
    theirs()
    own, expected = (list(average.state_dict()["averages"].values()) for average in (fused, plain))
    if not all(
        torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in zip(own, expected, strict=True)
    ):
        raise SystemExit("the fused kernel differs from the reference; nothing was timed")
    distance = max(
        ((one - other.detach()).abs() / other.detach().abs().clamp(min=1.0)).max().item()
        for one, other in zip(own, averaged.module.parameters(), strict=True)
    )
    if distance > 1e-6:
        raise SystemExit(f"an update differs from torch's by {distance:.2e} of a weight; nothing was timed")
    return {"equal_to_reference_in_every_bit": True, "largest_distance_to_torch": distance}


def measure(shapes: list[list[int]], device: str, at_least: float = SECONDS) -> dict[str, Any]:
    """Check, then time every arm in turn, and return medians, quartiles and ratios round by round."""
    checked = check(shapes, device)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    source = torch.ones(BYTES_PER_PARAMETER * numel // 8, device=device)
    target = torch.zeros_like(source)
    arms: dict[str, step.Step] = {
        "duotone": duotone_update(shapes, device, split=True).update,
        "duotone, FP32": duotone_update(shapes, device, split=False).update,
        "torch": torch_update(shapes, device)[0],
        "copy": lambda: target.copy_(source),
    }
    calls = step.calls_per_sample(arms, device)
    seconds = step.in_turn(arms, calls, device, at_least, ROUNDS)
    own = seconds["duotone"]
    return {
        "parameters": numel,
        "tensors": len(shapes),
        "bytes_moved": BYTES_PER_PARAMETER * numel,
        "rounds": len(own),
        "calls_per_sample": calls,
        **checked,
        "milliseconds": report.milliseconds(seconds),
        "times_faster_than": report.times_faster(seconds, "duotone"),
        "bytes_per_second": report.quartiles([BYTES_PER_PARAMETER * numel / value for value in own]),
    }


def tables(results: dict[str, Any]) -> str:
    """Return the table of docs/evidence.md in Markdown."""
    peers = ("torch", "duotone, FP32", "copy")
    lines = [
        "| parameters | Duotone, ms | against torch, FP32 | against Duotone, FP32 | against copy | GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["sizes"].items():
        faster = [report.with_quartiles(result["times_faster_than"][peer]) for peer in peers]
        lines.append(
            f"| {name} | {result['milliseconds']['duotone']['median']:.2f} | {' | '.join(faster)} | "
            f"{result['bytes_per_second']['median'] / 1e9:.1f} |"
        )
    text = "\n".join(lines) + "\n\nHow many times faster: medians, with quartiles, of ratios taken round by round. "
    return text + report.provenance(results["machine"])


def main() -> None:
    """Run as the command line says."""

    def measure_sizes(device: str, seconds: float) -> dict[str, Any]:
        return {"sizes": step.by_size(SIZES, lambda shapes: measure(shapes, device, seconds))}

    report.run("average", __doc__, measure_sizes, tables, SECONDS)


if __name__ == "__main__":
    main()
