"""What goes wrong in mixed precision under Keras, and what becomes of it with Duotone, on each backend.

    python benchmarks/keras_faults.py            # on all backends that are installed; fills docs/keras.md
    python benchmarks/keras_faults.py --tables   # fills it from the results that are there

Each scenario of `keras_scenarios.py` runs twice, as people write it in Keras and with what Duotone puts in its place,
in a process for each backend. Every cell is what was obtained there.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keras_backends import BACKENDS, in_words, on_each, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "keras_faults.json"
PAGE = ROOT / "docs" / "keras.md"


def here() -> dict[str, Any]:
    """Return what both sides did on the backend of this process."""
    from keras_scenarios import found_by
    from keras_sides import Duotone, Keras

    sides = {side.name: found_by(side) for side in (Keras(), Duotone())}
    scenarios = sides["Keras"]
    return {
        "versions": versions(),
        "found": {each: {side: asdict(found[each]) for side, found in sides.items()} for each in scenarios},
    }


def everywhere() -> dict[str, Any]:
    """Return what `here` returns on each backend that is installed."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "python": platform.python_version(), "backends": on_each(__file__)}


def tables(results: Mapping[str, Any]) -> str:
    """Return the table of docs/keras.md in Markdown: where backends agree, a cell says it once."""
    backends = results["backends"]
    lines = ["| what is done | Keras | with Duotone |", "|---|---|---|"]
    for scenario in next(iter(backends.values()))["found"]:
        cells = []
        for side in ("Keras", "Duotone"):
            by_text: dict[str, list[str]] = {}
            for backend, result in backends.items():
                by_text.setdefault(result["found"][scenario][side]["text"], []).append(BACKENDS[backend])
            agree = len(by_text) == 1
            cells.append("<br>".join(text if agree else f"{', '.join(at)}: {text}" for text, at in by_text.items()))
        lines.append(f"| {scenario} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"Found {results['date']} on a CPU with {in_words(backends)}, Python {results['python']}. "
        "Repeat it with `make bench-keras`, or `python benchmarks/keras_faults.py` alone.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, help="run on KERAS_BACKEND alone, and print JSON")
    parser.add_argument("--tables", action="store_true", help="only fill the table of docs/keras.md")
    arguments = parser.parse_args()
    if arguments.backend:
        print(json.dumps(here()))
        return
    if not arguments.tables:
        RESULTS.write_text(json.dumps(everywhere(), indent=1) + "\n", encoding="utf-8")
    # the pages are filled by what imports torch, which a process of another backend goes without
    import report

    report.fill(PAGE, "keras_faults", tables(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
