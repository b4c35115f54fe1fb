"""Hundreds of bad inputs, to every verb: each ends in one line that says what is wrong, and in its exit code."""

import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bad_files import comparisons, environments, exports, folders, tasks
from .bad_settings import RUN, command_lines, configs, settings, written
from .test_one_line import FINE
from .test_one_line import TASK as TASK_FILE

pytestmark = pytest.mark.slow

MOST_SECONDS = 30
# beside what is loaded: a process of the size of a model's would need less
MOST_BYTES = 400_000_000

ALL = {
    f"{kind.__name__}-{number}": case
    for kind in (settings, command_lines, configs, tasks, folders, exports, comparisons, environments)
    for number, case in enumerate(kind())
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with a run that can be resumed, one that has ended, a comparison, and a task."""
    from ..compare.scripted import scripted
    from .conftest import in_folder

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        duotone = in_folder(patch, folder)
        written("mine.py", TASK_FILE.format_map(FINE))()
        assert duotone("train", *RUN, "--out", "run", "--stop-after", "2")[0] == 0
        assert duotone("train", *RUN, "--out", "done")[0] == 0
        scripted(patch)
        assert duotone("compare", "mine.py", "--arms", "fp32,bf16", "--seeds", "2", "--out", "comparison")[0] == 0
    return folder


@pytest.fixture
def _bounded() -> Iterator[None]:
    """Bound the memory of this process and the time of a test."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MOST_BYTES, limits[1]))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it took more than {MOST_SECONDS} seconds"))
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_there_are_enough():
    assert len(ALL) >= 250


@pytest.mark.usefixtures("_bounded")
@pytest.mark.parametrize("name", ALL)
def test_each_is_one_line(name, made, duotone, monkeypatch, tmp_path):
    case = ALL[name]
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for key, value in case.environment.items():
        monkeypatch.setenv(key, value)
    case.prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.monotonic()
    code, _, error = duotone(*case.arguments)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES
    assert time.monotonic() - started < MOST_SECONDS
    if case.code == -1 and code == 0:
        # a part that this verb does not need
        return
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, error
    (line,) = lines
    assert line.startswith("error: ")
    assert case.words in line
    assert code == abs(case.code) or (case.code == -1 and code == 2), line
    assert "Traceback" not in line
    assert line.isprintable()
    assert len(line) < 2100
