"""First light on a GPU: what is worth knowing there, in one command, ordered so that a cut loses the least.

    python benchmarks/gpu.py              # at most six minutes; writes results/gpu.json and README's table
    python benchmarks/gpu.py --short      # at most four: what decides whether the rest is worth running
    python benchmarks/gpu.py --dry        # every stage on a CPU, small, in Triton's interpreter: does this program run?
    python benchmarks/gpu.py --only step,gpt
    python benchmarks/gpu.py --tables     # README's table from the results that are there

Each stage (`gpu_stages.py`) is a process of its own with its own limit, so that a hang, a crash or an error that
sticks to a CUDA context ends that stage alone. A stage appends its results to `gpu.jsonl` as it goes, on disk before it
goes on; its output is in `STAGE.log` beside it. A table comes last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import report

ROOT = Path(__file__).parents[1]
# a CPU that interprets kernels takes longer
DRY_FACTOR = 6


class Stage(NamedTuple):
    """A stage and its limit."""

    name: str
    seconds: int
    in_short: bool
    what: str


# what is worth most comes first
STAGES = (
    Stage("environment", 40, True, "versions, the device, copies and products per second"),
    Stage("bits", 120, True, "kernels against their references"),
    Stage("launches", 40, True, "kernels of a step, and whether anything waits for the device"),
    Stage("graph", 30, True, "a step captured in a CUDA graph, with a moving learning rate and loss scale"),
    Stage("gpt", 60, True, "a GPT-2 of 124 M parameters against FP32 and torch.amp"),
    Stage("step", 60, False, "the optimizer step against torch's chain and a copy"),
    Stage("loss", 30, False, "cross-entropy of 8,192 x 50,304 logits, and norms, against torch's"),
    Stage("tests", 90, False, "the tests that need a GPU"),
    Stage("compiled", 90, False, "the GPT-2 compiled"),
    Stage("compare", 60, False, "duotone compare, small"),
)
TOTAL, TOTAL_SHORT = 360, 240


def main() -> int:
    """Run as the command line says; return the exit status: how many stages failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, small")
    parser.add_argument("--short", action="store_true", help="the first stages alone, in at most four minutes")
    parser.add_argument("--only", default="", help="some stages, by name, with commas between")
    parser.add_argument("--total", type=float, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and JSON lines")
    parser.add_argument("--tables", action="store_true", help="only fill README's table")
    arguments = parser.parse_args()
    if arguments.tables:
        fill_readme(json.loads((report.RESULTS / "gpu.json").read_text(encoding="utf-8")))
        return 0
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.jsonl").unlink(missing_ok=True)
    known = [stage.name for stage in STAGES]
    only = [name for name in arguments.only.split(",") if name]
    if not set(only) <= set(known):
        parser.error(f"there is no stage {', '.join(sorted(set(only) - set(known)))}; there are {', '.join(known)}")
    chosen = [stage for stage in STAGES if (stage.name in only if only else stage.in_short or not arguments.short)]
    if arguments.total is not None:
        total = arguments.total
    else:
        total = (TOTAL_SHORT if arguments.short else TOTAL) * (DRY_FACTOR if arguments.dry else 1)
    rows = run(chosen, out, total, is_dry=arguments.dry)
    records = read(out)
    print(table(rows, records))
    if not arguments.dry and any(record["stage"] == "environment" for record in records):
        path = report.RESULTS / "gpu.json"
        path.write_text(json.dumps({"stages": rows, "records": records}, indent=1) + "\n", encoding="utf-8")
        fill_readme({"stages": rows, "records": records})
    return sum(row["exit"] != 0 for row in rows)


def run(stages: list[Stage], out: Path, total: float, *, is_dry: bool) -> list[dict[str, Any]]:
    """Run stages in turn, each in a process, until the time is up; return what became of each."""
    started = time.monotonic()
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    rows = []
    for stage in stages:
        left = total - (time.monotonic() - started)
        if left < 5:
            rows.append({"stage": stage.name, "exit": "no time was left", "seconds": 0.0})
            continue
        limit = min(stage.seconds * (DRY_FACTOR if is_dry else 1), left)
        begun = time.monotonic()
        command = [sys.executable, str(Path(__file__).with_name("gpu_stages.py")), stage.name, str(out)]
        with open(out / f"{stage.name}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, *(["--dry"] if is_dry else [])],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"ended after {limit:.0f} s"
        rows.append({"stage": stage.name, "exit": code, "seconds": round(time.monotonic() - begun, 1)})
        print(f"{stage.name}: {code}, {rows[-1]['seconds']} s", flush=True)
    return rows


def read(out: Path) -> list[dict[str, Any]]:
    """Return what stages have written; a last line that was cut off is left out."""
    path = out / "gpu.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def table(rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    """Return stages, and what each found, in Markdown."""
    what = {stage.name: stage.what for stage in STAGES}
    lines = ["", "| stage | exit | seconds | what |", "|---|---|---|---|"]
    lines += [f"| {row['stage']} | {row['exit']} | {row['seconds']} | {what[row['stage']]} |" for row in rows]
    lines.append("")
    for record in records:
        rest = {key: value for key, value in record.items() if key not in ("stage", "what")}
        found = ", ".join(f"{key} {value}" for key, value in rest.items())
        lines.append(f"- {record['stage']}: {record['what']}: {found}"[:400])
    return "\n".join(lines)


def readme_table(results: dict[str, Any]) -> str:
    """Return README's table: a GPT-2's tokens per second and peak memory, by arm."""
    records = results["records"]
    (where,) = [record for record in records if record["what"] == "versions"]
    arms = [record for record in records if record["stage"] in ("gpt", "compiled") and "tokens_per_second" in record]
    peer = next((arm["tokens_per_second"] for arm in arms if arm["what"] == "torch.amp bf16"), None)
    lines = [
        "| GPT-2 124 M, 8 x 1,024 tokens | tokens per second | against torch.amp | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for arm in arms:
        against = f"{arm['tokens_per_second'] / peer:.2f}" if peer else ""
        speed, peak = arm["tokens_per_second"], arm["peak_bytes"] / 1e9
        lines.append(f"| `{arm['what']}` | {speed:,.0f} | {against} | {peak:.1f} |")
    said = f"\n\nMeasured {where['date']} on an {where['gpu']}, torch {where['torch']}, Python {where['python']}. "
    return "\n".join(lines) + said + "Repeat it with `make gpu`.\n"


def fill_readme(results: dict[str, Any]) -> None:
    """Put the table into README, if a GPT was measured."""
    if any("tokens_per_second" in record for record in results["records"]):
        report.fill(report.README, "gpu", readme_table(results))


if __name__ == "__main__":
    sys.exit(main())
