"""A training on a machine that does something else too: what a step takes beside a busy process.

    python benchmarks/busy.py             # measures, writes results/busy.json, fills docs/evidence.md
    python benchmarks/busy.py --tables    # fills docs/evidence.md from the results that are there

The arms are whole processes, which train a GPT of 3 M parameters in BF16 on all cores through `duotone.train`:

- `torch's default`: threads wait for work as OpenMP does by itself.
- `duotone train`: they wait as Duotone's command line has it (`duotone.cli.thread_waiting`).

They run in pairs, one after the other, alone and beside a process that keeps one or two threads busy. A training's
share of the cores is its part of all threads that want to run, if those are more than there are cores.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from statistics import median
from typing import Any

import report

from duotone.cli.thread_waiting import SPIN_COUNT, wait_briefly

ARMS = ("torch's default", "duotone train")
# pairs of processes beside so many busy threads
PAIRS = {0: 4, 1: 2, 2: 2}
# OpenMP's own, said by the user
_DEFAULT = {SPIN_COUNT: "300000"}
_WARM_UP_STEPS = 4


def train(seconds: float) -> None:
    """Train for some seconds, and print the mean time of a step."""
    import torch

    from duotone.run_settings import RunSettings
    from duotone.train import Task, Trainer
    from duotone.train.tasks.gpt import GPT
    from duotone.train.tasks.stdlib_text import SIZES, window_loss

    torch.manual_seed(0)
    size = SIZES["small"].model

    def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
        yield torch.randint(256, (16, size.context + 1), generator=generator)

    task = Task("random bytes", GPT(size), window_loss, batches, evaluate=lambda model: {"loss": 0.0})
    steps = Trainer(task, RunSettings(log_every=1, evaluate_every=10_000, steps=10_000)).run()
    for _ in range(_WARM_UP_STEPS):
        next(steps)
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds:
        next(steps)
        times.append(time.perf_counter())
    print((times[-1] - times[0]) / (len(times) - 1))


def keep_busy(threads: int) -> None:
    """Use so many cores, without end."""
    block = bytes(1 << 20)

    def work() -> None:
        # it lets go of the interpreter's lock
        while True:
            sha256(block).digest()

    for _ in range(threads - 1):
        threading.Thread(target=work, daemon=True).start()
    work()


@contextmanager
def beside(threads: int) -> Iterator[None]:
    """Keep threads of another process busy for the length of a block."""
    other = subprocess.Popen([sys.executable, __file__, "--busy", str(threads)]) if threads else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def step_seconds(arm: str, seconds: float) -> float:
    """Return the mean time of a step in a process of its own."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", SPIN_COUNT, "KMP_BLOCKTIME", "KMP_LIBRARY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    if arm == ARMS[0]:
        environment |= _DEFAULT
    wait_briefly(environment)
    command = [sys.executable, __file__, "--train", str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Run all pairs."""
    rows = {}
    for threads, pairs in PAIRS.items():
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        with beside(threads):
            for number in range(pairs):
                for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                    times[arm].append(step_seconds(arm, seconds))
        print(threads, times, flush=True)
        rows[str(threads)] = times
    return {"step_seconds": rows}


def tables(results: dict[str, Any]) -> str:
    """Return the table of docs/evidence.md in Markdown."""
    cores = results["machine"]["cores"]
    rows: Mapping[str, Mapping[str, list[float]]] = results["step_seconds"]
    lines = [
        "| busy threads beside it | the training's share of the cores | `torch's default`: a step, ms | "
        "`duotone train`: a step, ms | of torch's default, by pairs | of its own time alone |",
        "|---|---|---|---|---|---|",
    ]
    alone = median(rows["0"][ARMS[1]])
    for threads, times in rows.items():
        share = min(1.0, cores / (cores + int(threads)))
        default, own = (median(times[arm]) for arm in ARMS)
        ratio = median(ours / theirs for theirs, ours in zip(*(times[arm] for arm in ARMS), strict=True))
        lines.append(
            f"| {threads} | {share:.2f} | {1e3 * default:.0f} | {1e3 * own:.0f} | {ratio:.2f} | {own / alone:.2f} |"
        )
    return "\n".join(lines) + "\n\n" + report.provenance(results["machine"], "python benchmarks/busy.py")


def main() -> None:
    """Run as the command line says; the processes of a measurement are this program too."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--train", type=float)
    parser.add_argument("--busy", type=int)
    chosen, _ = parser.parse_known_args()
    if chosen.train is not None:
        train(chosen.train)
    elif chosen.busy is not None:
        keep_busy(chosen.busy)
    else:
        report.run("busy", __doc__, measure, tables, 2.0)


if __name__ == "__main__":
    main()
