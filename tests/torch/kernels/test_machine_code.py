"""Compiled kernels on disk: used again without Numba, made anew when damaged, and done without."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from duotone.torch.kernels.cpu import machine_code
from duotone.torch.kernels.cpu.threads import pieces_of

STEP = """
import sys, torch, duotone.torch as dt
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
dt.SGD([weight], lr=0.5, backend="cpu").step()
print(weight.tolist(), "numba" in sys.modules)
"""


def step_in_a_new_process(folder) -> str:
    kept = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    environment = {"XDG_CACHE_HOME": str(folder), "PATH": "/usr/bin:/bin", **kept}
    result = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    return result.stdout.strip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "cache_folder", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def add_one():
    from duotone.torch.kernels.cpu.memory import read_i64, write_i64

    def kernel(job):
        write_i64(job, 1, read_i64(job, 0) + 1)

    return kernel


def call(entry) -> list[int]:
    job = torch.tensor([41, 0])
    entry(job.data_ptr())
    return job.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="the cache folder is set by XDG_CACHE_HOME on Linux only")
def test_a_second_process_needs_no_compiler(tmp_path):
    assert step_in_a_new_process(tmp_path) == "[0.5, 0.5, 0.5] True"
    assert step_in_a_new_process(tmp_path) == "[0.5, 0.5, 0.5] False"


def test_code_is_kept_and_used_again(folder):
    assert call(machine_code.entry_of("add", add_one)) == [41, 42]
    (path,) = folder.iterdir()
    assert path.name.startswith("add-")
    # what was kept is used, whatever would be made now
    assert call(machine_code.entry_of("add", lambda: pytest.fail("compiled again"))) == [41, 42]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_code_is_never_run(folder, damage):
    machine_code.entry_of("add", add_one)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert call(machine_code.entry_of("add", add_one)) == [41, 42]
    assert machine_code._read(path) is not None


def test_where_nothing_can_be_kept_it_compiles_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine_code, "cache_folder", lambda: tmp_path / "file" / "kernels")
    assert call(machine_code.entry_of("add", add_one)) == [41, 42]


@pytest.mark.parametrize(
    "source", ["sums.py", "formats.py", "table.py", "reference.py", "slots.py", "adamw.py", "definition.py"]
)
def test_other_sources_have_other_names(monkeypatch, source):
    before = machine_code._fingerprint.__wrapped__()
    assert before == machine_code._fingerprint.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == source else b""))
    assert machine_code._fingerprint.__wrapped__() != before


def test_pieces_cover_every_chunk_and_none_is_long():
    lengths = np.random.default_rng(0).integers(1, 32769, 1000)
    pieces = pieces_of(lengths)
    assert (pieces[0], pieces[-1]) == (0, 1000)
    assert (np.diff(pieces) > 0).all()
    # a piece ends with the chunk that fills it
    assert max(lengths[start:stop].sum() for start, stop in pairwise(pieces)) < 2 * 32768
    assert pieces_of(np.array([], dtype=np.int64)).tolist() == [0]
