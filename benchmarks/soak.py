"""Kills training runs with SIGKILL at random moments, resumes them, and compares every bit with runs left alone.

    python benchmarks/soak.py                 # 50 kills, half under fp16 and half under bf16
    python benchmarks/soak.py --ranks 2       # 12 kills of one of two ranks, half under DDP and half under FSDP
    python benchmarks/soak.py --kills 6 --seed 1

A run is killed while it starts or loads, before its first checkpoint, between steps, and while it writes a checkpoint;
now and then a byte of its newest checkpoint is flipped besides. In the end every byte of the last checkpoint (weights,
tails, moments, scaler, schedule, random states) and every line of metrics must be the undisturbed run's. Exit code 1
says that something was lost.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import duotone.torch as dt
from duotone.errors import CheckpointError

TASK = Path(__file__).with_name("soak_task.py")
# arguments of the runs for one process and for several, by name
ALONE = {"fp16": ["--policy", "fp16"], "bf16": ["--policy", "bf16"]}
RANKS = {f"bf16 {way}": ["--policy", "bf16", "--parallel", way] for way in ("ddp", "fsdp")}
TENSORS = "tensors.safetensors"
STEPS_PER_KILL = 16
PATIENCE_SECONDS = 120
# for steps this small more threads would only wait for each other
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
# what a run measures of itself, which is no result
MEASURED = ("units_per_second", "peak_memory_bytes")


@dataclass
class Tally:
    """What a soaked run went through.

    Attributes:
        policy: of the run, and how its model is spread over ranks.
        kills: with SIGKILL; of several ranks one is hit, and torchrun ends the others.
        starting: of them, before the process's first step.
        writing: of them, in the middle of writing a checkpoint.
        without_checkpoint: of them, before the run's first checkpoint.
        damaged: newest checkpoints in which a byte was flipped.
        repeated: steps that were trained more than once.
        lost: differences from the run that was left alone, checkpoints that a kill broke, and leftovers at the end.
    """

    policy: str
    kills: int = 0
    starting: int = 0
    writing: int = 0
    without_checkpoint: int = 0
    damaged: int = 0
    repeated: int = 0
    lost: int = 0


class Run:
    """A run of `duotone train` in a folder of its own, by one process, or group of ranks, after another.

    Args:
        folder: the run's.
        arguments: that it is begun with.
        steps: how many.
        ranks: how many processes train together.

    Attributes:
        folder: the run's.
        damaged: inodes and times of the files in which a byte was flipped.
    """

    def __init__(self, folder: Path, arguments: list[str], steps: int, ranks: int = 1) -> None:
        self.folder = folder
        self.damaged: set[tuple[int, int]] = set()
        self._ranks = ranks
        self._settings = [*arguments, "--steps", str(steps), "--lr", "1e-3"]
        self._settings += ["--log-every", "1", "--evaluate-every", "20", "--checkpoint-every", "3", "--keep", "3"]
        self._log = folder.with_suffix(".log")
        folder.parent.mkdir(parents=True, exist_ok=True)

    def start(self) -> subprocess.Popen[bytes]:
        """Start a process that begins the run, or goes on with it."""
        begun = (self.folder / "settings.yaml").exists()
        told = ["--resume", "latest-valid"] if begun else [str(TASK), *self._settings]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(self._ranks)] if self._ranks > 1 else []
        command = [sys.executable, *torchrun, "-m", "duotone", "train", "--out", str(self.folder), *told]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | ONE_THREAD
            )

    def kill(self, process: subprocess.Popen[bytes], chance: random.Random) -> None:
        """Kill what `start` started, or one of its ranks, whose others then end; return when nothing of it is left.

        Raises:
            RuntimeError: it ended by itself.
        """
        victims = [process.pid]
        if self._ranks > 1:
            _wait(process, lambda: len(_children(process)) == self._ranks)
            victims = _children(process)
        if victims and process.poll() is None:
            os.kill(chance.choice(victims), signal.SIGKILL)
        if process.wait() == 0:
            raise RuntimeError("the run ended before it was killed; give it more steps")

    def finish(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: the run failed.
        """
        if self.start().wait() != 0:
            raise RuntimeError(f"the run failed:\n{self._log.read_text(encoding='utf-8')[-2000:]}")

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return dt.checkpoints.list_all(self.folder / "checkpoints")

    def leftovers(self) -> list[Path]:
        """Return what writers left beside the checkpoints, or are writing."""
        return list((self.folder / "checkpoints").glob(".*"))

    def last_step(self) -> int:
        """Return the last step in the metrics, 0 if there is none."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics, without what depends on the machine's mood."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]

    def result(self) -> dict[str, Any]:
        """Return everything that the run came to, by name: its last checkpoint's files and its lines of metrics."""
        last = self.checkpoints()[-1]
        files = {f"{last.name}/{path.name}": _content(path) for path in sorted(last.iterdir())}
        evaluation = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))["evaluation"]
        lines = {f"metrics of line {index}": line for index, line in enumerate(self.metrics())}
        return {**files, **lines, "evaluation": evaluation}


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Return the names of what is missing, too many, or not the same."""
    uneven = got.keys() ^ want.keys()
    return sorted(uneven | {name for name in got.keys() & want.keys() if got[name] != want[name]})


def soak(name: str, arguments: list[str], ranks: int, kills: int, chance: random.Random, folder: Path) -> Tally:
    """Train one run undisturbed and one under kills, and compare them."""
    steps = STEPS_PER_KILL * (kills + 1)
    alone, run = (Run(folder / kind, arguments, steps, ranks) for kind in ("alone", "killed"))
    tally = Tally(name)
    alone.finish()
    while tally.kills < kills:
        before = run.last_step()
        process = run.start()
        try:
            wait_for_the_moment(run, process, chance, STEPS_PER_KILL * (tally.kills + 1), first=tally.kills == 0)
        finally:
            run.kill(process, chance)
        examine(run, tally, chance, before)
        print(f"{name}: kill {tally.kills} of {kills} at step {run.last_step()} of {steps}", flush=True)
    run.finish()
    lost = differences(run.result(), alone.result()) + [path.name for path in run.leftovers()]
    if lost:
        print(f"{name}: {len(lost)} differ, the first: {', '.join(lost[:5])}", file=sys.stderr)
    tally.lost += len(lost)
    return tally


def wait_for_the_moment(
    run: Run, process: subprocess.Popen[bytes], chance: random.Random, step: int, *, first: bool
) -> None:
    """Wait until the process is where it should be killed.

    Args:
        run: the process's.
        process: to be killed.
        chance: decides.
        step: from which on it is killed, unless it is to be killed while it starts.
        first: kill it as soon as the run has a folder, before any checkpoint.
    """
    kind = "folder" if first else chance.choice(["start", "step", "write", "write"])
    if kind == "folder":
        _wait(process, (run.folder / "settings.yaml").exists)
    elif kind == "start":
        # no longer than to its first step, or a quick machine would be through before all kills are done
        until, before = time.monotonic() + chance.uniform(0, 4), run.last_step()
        _wait(process, lambda: time.monotonic() > until or run.last_step() > before)
    else:
        _wait(process, lambda: run.last_step() >= step)
        if kind == "write":
            _wait(process, lambda: bool(run.leftovers()))
        time.sleep(chance.uniform(0, 0.01 if kind == "write" else 0.02))


def examine(run: Run, tally: Tally, chance: random.Random, before: int) -> None:
    """Count what a kill hit, look at every checkpoint, and damage the newest one now and then."""
    tally.kills += 1
    tally.writing += bool(run.leftovers())
    tally.starting += run.last_step() <= before
    found = run.checkpoints()
    tally.without_checkpoint += not found
    intact = [path for path in found if _is_intact(path)]
    # by file, as a run may write a damaged checkpoint anew
    broken = [path for path in found if path not in intact and _identity(path) not in run.damaged]
    if broken:
        print(f"{tally.policy}: broken by kill {tally.kills}: {', '.join(map(str, broken))}", file=sys.stderr)
        tally.lost += len(broken)
    if len(intact) > 1 and intact[-1] == found[-1] and chance.random() < 0.2:
        _flip_a_byte(intact[-1] / TENSORS, chance)
        run.damaged.add(_identity(intact.pop()))
        tally.damaged += 1
    resumes_from = int(intact[-1].name.removeprefix("step-")) if intact else 0
    tally.repeated += run.last_step() - resumes_from


def report(tallies: list[Tally]) -> str:
    """Return the tallies as a table in Markdown, a line each."""
    names = [field.name for field in fields(Tally)]
    rows = [names, ["---"] * len(names), *([str(getattr(tally, name)) for name in names] for tally in tallies)]
    return "\n".join(f"| {' | '.join(cell.replace('_', ' ') for cell in row)} |" for row in rows)


def _wait(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not holds():
        if process.poll() is not None or time.monotonic() - started > PATIENCE_SECONDS:
            return
        time.sleep(0.001)


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the ranks that torchrun has started."""
    told = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "duotone"], capture_output=True, text=True, check=False
    )
    return [int(line) for line in told.stdout.split()]


def _content(path: Path) -> Any:
    """Return what a checkpoint's file holds, whatever the order of its header, which torch does not fix for parts."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), content[end:]
    manifest = json.loads(content)["manifest"]
    # digests of the parts' files depend on that order
    return {name: value for name, value in manifest.items() if name != "shards_sha256"}


def _is_intact(path: Path) -> bool:
    try:
        dt.checkpoints.verify(path)
    except CheckpointError:
        return False
    return True


def _identity(checkpoint: Path) -> tuple[int, int]:
    file = (checkpoint / TENSORS).stat()
    return file.st_ino, file.st_mtime_ns


def _flip_a_byte(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    path.write_bytes(content)


def main() -> None:
    """Soak every policy, print what happened, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together (default: 1)")
    parser.add_argument("--kills", type=int, help="in all (default: 50, with several ranks 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    told = parser.parse_args()
    cases = RANKS if told.ranks > 1 else ALONE
    kills = told.kills or (12 if told.ranks > 1 else 50)
    if kills < len(cases):
        parser.error(f"--kills is {kills}; it must be at least {len(cases)}, one for each of {', '.join(cases)}")
    chance = random.Random(told.seed)
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, arguments) in enumerate(cases.items()):
            share = (kills + index) // len(cases)
            tallies.append(soak(name, arguments, told.ranks, share, chance, Path(folder, name)))
    print(report(tallies))
    sys.exit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
