"""The same task under several policies: quality, speed against FP32 in the same run, and bytes per parameter.

    python benchmarks/policies.py             # measures, writes benchmarks/results/policies.json, fills README's tables
    python benchmarks/policies.py --tables    # fills README's tables from the results that are there

Each run is a `duotone train` of its own process. Speed is the median over the run's logged intervals, with the lower
and upper quartile; its ratio is to the FP32 run of the same task and seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

RESULTS = report.RESULTS / "policies.json"
POLICIES = ("fp32", "bf16", "fp16")
SEEDS = {"stdlib-text": (0,), "digits": (0, 1, 2), "digits:convnet": (0, 1, 2)}


def train(task: str, policy: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run `duotone train` and return what it measured."""
    out = folder / f"{task.replace(':', '-')}-{policy}-{seed}"
    command = [sys.executable, "-m", "duotone.cli.main", "train", task, "--policy", policy, "--seed", str(seed)]
    print(" ".join(command[3:]), flush=True)
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # the first interval holds what every process does once
    speeds = [line["units_per_second"] for line in lines[1:]]
    return {
        "task": task,
        "policy": policy,
        "seed": seed,
        "steps": summary["step"],
        "skipped": summary["skipped"],
        "seconds": summary["seconds"],
        "evaluation": summary["evaluation"],
        "bytes_per_parameter": summary["bytes_per_parameter"],
        "units_per_second": report.quartiles(speeds),
    }


def baselines(task: str) -> dict[str, float]:
    """Return what reference methods get on the same held-out data."""
    from duotone.train import find_task

    return dict(find_task(task).baselines)


def tables(results: dict[str, Any]) -> str:
    """Return README's tables in Markdown."""
    text = _text_table(results) + "\n" + _digits_table(results)
    return f"{text}\nSpeeds are medians over a run, quartiles stand in the results file. " + report.provenance(
        results["machine"]
    )


def _text_table(results: dict[str, Any]) -> str:
    runs = [run for run in results["runs"] if run["task"] == "stdlib-text"]
    fp32 = runs[0]["units_per_second"]["median"]
    lines = [
        "| `stdlib-text` | bits per byte | steps | skipped | speed against FP32 | bytes per parameter |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        ratio = run["units_per_second"]["median"] / fp32
        lines.append(
            f"| `--policy {run['policy']}` | {run['evaluation']['bits_per_byte']:.4f} | {run['steps']} | "
            f"{run['skipped']} | {ratio:.2f} | {run['bytes_per_parameter']:g} |"
        )
    lines += [f"| {name} | {bits:.4f} | | | | |" for name, bits in results["baselines"]["stdlib-text"].items()]
    return "\n".join(lines) + "\n"


def _digits_table(results: dict[str, Any]) -> str:
    lines = ["| `digits` | policy | accuracy | NLL |", "|---|---|---|---|"]
    for task in ("digits", "digits:convnet"):
        for policy in POLICIES:
            runs = [run["evaluation"] for run in results["runs"] if (run["task"], run["policy"]) == (task, policy)]
            cells = [_spread([run[name] for run in runs]) for name in ("accuracy", "nll")]
            lines.append(f"| `{task}` | `{policy}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n\nMean of three seeds, with their smallest and largest.\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def measure() -> dict[str, Any]:
    """Train every task under every policy and return all of it."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            train(task, policy, seed, Path(folder))
            for task, seeds in SEEDS.items()
            for seed in seeds
            for policy in POLICIES
        ]
    return {"machine": report.machine(), "baselines": {task: baselines(task) for task in SEEDS}, "runs": runs}


def main() -> None:
    """Measure unless told not to, and fill README's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only fill README's tables")
    if not parser.parse_args().tables:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    report.fill_readme("results", tables(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
