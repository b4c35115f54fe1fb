"""What every benchmark's report has in common: the machine it ran on, and the pages that show its tables."""

import datetime
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EVIDENCE = ROOT / "docs" / "evidence.md"


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
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


def provenance(where: dict[str, Any], command: str = "make bench") -> str:
    """Return date, hardware, versions and the command to repeat it, as a sentence."""
    device = where["gpu"] or f"{where['cores']} cores of an {where['cpu']}"
    return (
        f"Measured {where['date']} on {device}, torch {where['torch']}, Python {where['python']}. Repeat it with "
        f"`{command}`.\n"
    )


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
