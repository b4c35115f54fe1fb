"""What benchmarks have in common: their command line, the machine they ran on, ratios, and pages that show tables."""

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EVIDENCE = ROOT / "docs" / "evidence.md"


def run(
    name: str,
    description: str | None,
    measure: Callable[[str, float], dict[str, Any]],
    tables: Callable[[dict[str, Any]], str],
    seconds: float,
) -> None:
    """Be a benchmark's command: measure unless told not to, write the results, show them as tables.

    Args:
        name: of the file of results, and of the place in docs/evidence.md that shows those of a CPU.
        description: what `--help` says.
        measure: returns the results, given a device and how many seconds the arms of a row take turns.
        tables: returns the results in Markdown.
        seconds: how many, if the command does not say.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only fill the tables of docs/evidence.md")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long the arms of a row take turns")
    arguments = parser.parse_args()
    path = arguments.out / (f"{name}.json" if arguments.device == "cpu" else f"{name}-cuda.json")
    if not arguments.tables:
        results = {"machine": machine(), **measure(arguments.device, arguments.seconds)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shown = tables(json.loads(path.read_text(encoding="utf-8")))
    if path == RESULTS / f"{name}.json":
        fill(EVIDENCE, name, shown)
    else:
        print(shown)


def times_faster(seconds: Mapping[str, Sequence[float]], arm: str) -> dict[str, dict[str, float]]:
    """Return how many times faster an arm is than each other one, round by round."""
    return {
        peer: quartiles([theirs / own for theirs, own in zip(values, seconds[arm], strict=True)])
        for peer, values in seconds.items()
        if peer != arm
    }


def milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return what a call of each arm takes."""
    return {arm: quartiles([1e3 * value for value in values]) for arm, values in seconds.items()}


def with_quartiles(ratio: Mapping[str, float]) -> str:
    """Return a ratio as tables show it."""
    return "{median:.2f} ({lower:.2f} to {upper:.2f})".format(**ratio)


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def provenance(where: dict[str, Any], command: str = "make bench", libraries: str | None = None) -> str:
    """Return date, hardware, versions (torch's, if none are given) and the command to repeat it, as a sentence."""
    device = where["gpu"] or f"{where['cores']} cores of an {where['cpu']}"
    libraries = libraries or f"torch {where['torch']}"
    return f"Measured {where['date']} on {device}, {libraries}, Python {where['python']}. Repeat it with `{command}`.\n"


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"lower": lower, "median": median, "upper": upper}


def fill(page: Path, name: str, text: str) -> None:
    """Put a report between a page's marks for it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
