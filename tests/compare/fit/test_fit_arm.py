"""The largest micro-batch is searched for by processes, and what fails is in the record."""

from pathlib import Path

import pytest

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.fit.fit_arm import fit_arm
from duotone.compare.folder import ComparisonFolder
from duotone.compare.job import Job
from duotone.compare.records import Fit

from ..scripted import Script, Witness, scripted

ENTRY = Job(CATALOGUE["bf16"], "tiny.py", 0, {})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return scripted(monkeypatch)


def fit(tmp_path: Path, limit_bytes: int = 50_000) -> tuple[Fit, Witness]:
    witness = Witness()
    return fit_arm(ENTRY, 8, limit_bytes, ComparisonFolder(tmp_path), witness), witness


def test_the_largest_that_fits_is_found_with_its_speed(script: Script, tmp_path: Path) -> None:
    found, witness = fit(tmp_path)
    assert found.micro_batch in (48, 49)
    assert found.peak_memory_bytes == 1000 * found.micro_batch + 500
    assert found.units_per_second == 100.0 * found.micro_batch
    assert [(size, peak) for _, size, peak in witness.of("fit_tried")] == list(found.tried)
    assert script.started == len(found.tried)


def test_memory_that_runs_out_is_one_of_the_measurements(script: Script, tmp_path: Path) -> None:
    script.fail("measure", "bf16", "out of memory")
    found, _ = fit(tmp_path)
    assert (found.micro_batch, found.peak_memory_bytes, found.failure) == (0, None, None)
    assert found.tried[0] == (8, None)


def test_any_other_failure_ends_the_search(script: Script, tmp_path: Path) -> None:
    script.fail("measure", "bf16", "error")
    found, _ = fit(tmp_path)
    assert found.failure is not None
    assert found.failure.kind == "error"
    assert script.started == 1
