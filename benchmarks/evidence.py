"""The comparisons behind README's evidence: every way of training a small GPT, and what each of the mechanisms is for.

    python benchmarks/evidence.py             # compares, writes results/evidence.json, fills README and docs
    python benchmarks/evidence.py --tables    # fills the tables from the results that are there
    python benchmarks/evidence.py --resume --out FOLDER

Three seeds each, about 40 minutes on two cores. The folders hold every record and a page; what is kept in the results
file is each report without its curves.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import report
from rich.console import Console

from duotone.cli.compare_view import open_view
from duotone.compare import Plan, compare, find_arms
from duotone.compare.report import words
from duotone.compare.report.as_json import as_json
from duotone.compare.report.report import Spread

RESULTS = report.RESULTS / "evidence.json"
MECHANISMS = (
    "fp32,torch-amp-bf16,torch-amp-fp16,bf16,fp16,bf16-no-masters,bf16-stochastic,fp16-no-masters,fp16-no-scaling"
)
# the arms of README's one table: of each way of keeping weights and moments one
SHOWN = (
    "fp32",
    "torch-amp-bf16",
    "bf16",
    "bf16-state16",
    "fp16",
    "fabric-bf16-true",
    "torchao-adamw8bit",
    "bf16-no-masters",
)
PLANS = {
    "stdlib-text": Plan("stdlib-text", find_arms("torch,bf16,bf16-state16,fp16,peers,ablations"), "fp32", steps=100),
    "digits-sgd": Plan("digits:sgd", find_arms(MECHANISMS), "fp32", steps=12_000),
    "digits-small-gradients": Plan("digits:small-gradients", find_arms(MECHANISMS), "fp32", steps=12_000),
}


def measure(out: Path, resume: bool) -> dict[str, Any]:
    """Make every comparison, each in a folder of its own, and return their reports as JSON values."""
    results: dict[str, Any] = {"machine": report.machine()}
    for name, plan in PLANS.items():
        with open_view(Console(highlight=False)) as view:
            goes_on = resume and (out / name / "plan.json").exists()
            compared = compare(plan, out / name, resume=goes_on, watcher=view)
        results[name] = json.loads(as_json(compared))
        for arm in results[name]["arms"]:
            del arm["curves"]
    return results


def tables(results: dict[str, Any]) -> str:
    """Return every table in Markdown, for docs/evidence.md."""
    parts = [_table(results[name]) for name in PLANS]
    return "\n".join([*parts, report.provenance(results["machine"], "make evidence")])


def summary(results: dict[str, Any]) -> str:
    """Return README's table in Markdown: some arms of the first comparison."""
    compared = results["stdlib-text"]
    chosen = [arm for arm in compared["arms"] if arm["name"] in SHOWN]
    table = _table({**compared, "arms": chosen, "subject": {**compared["subject"], "baselines": {}}})
    return f"{table}\n{report.provenance(results['machine'], 'make evidence')}"


def _table(compared: dict[str, Any]) -> str:
    subject, pace = compared["subject"], compared["pace"]
    lines = [
        f"| `{subject['name']}`, {pace['steps']:,} steps | a step, ms | times faster | peak memory, MB | bytes per "
        f"parameter | {subject['quality']} | no worse? | skipped |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| `{arm['name']}` | {' | '.join(_cells(arm))} |" for arm in compared["arms"]),
    ]
    for name, value in subject["baselines"].items():
        lines.append(f"| {name} | | | | | {words.quality(value)} | | |")
    return "\n".join(lines) + "\n"


def _cells(arm: dict[str, Any]) -> list[str]:
    step, faster, memory, quality = (
        arm[name] for name in ("step_seconds", "times_faster", "peak_memory_bytes", "quality")
    )
    judged = arm["quality_verdict"] if arm["failure"] is None else arm["failure"]["kind"]
    return [
        "" if step is None else words.milliseconds(step["value"]),
        "" if faster is None else words.spread(Spread(**faster), words.ratio),
        "" if memory is None else f"{memory / 1e6:.0f}",
        f"{arm['bytes_per_parameter']:.3g}" if arm["bytes_per_parameter"] else "",
        "" if quality is None or quality["value"] is None else words.spread(Spread(**quality), words.quality),
        "" if judged == "not tested" else judged,
        "" if arm["skipped"] is None else words.count(arm["skipped"]),
    ]


def main() -> None:
    """Compare unless told not to, and fill the tables of README and docs/evidence.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only fill the tables")
    parser.add_argument("--out", type=Path, help="the folder of the comparisons (default: one that is thrown away)")
    parser.add_argument("--resume", action="store_true", help="go on with the comparisons in --out")
    arguments = parser.parse_args()
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out, the folder of the comparisons to go on with")
    if not arguments.tables:
        with tempfile.TemporaryDirectory() as scratch:
            results = measure(arguments.out or Path(scratch), arguments.resume)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    report.fill(report.README, "evidence", summary(results))
    report.fill(report.EVIDENCE, "evidence", tables(results))


if __name__ == "__main__":
    main()
