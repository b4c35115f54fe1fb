"""The machine as processes see it: memory that is free within all limits, and what figures depend on."""

from pathlib import Path

import pytest
import torch

from duotone.compare import environment
from duotone.compare.environment import describe
from duotone.compare.measuring import device_state
from duotone.compare.measuring.device_state import DeviceState, read_device_state

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "free_bytes"), [("3000000", 1_000_000), ("max", 4_096_000), (None, 4_096_000), ("9" * 15, 4_096_000)]
)
def test_free_memory_is_what_the_tightest_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, free_bytes: int
) -> None:
    memory, most, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    memory.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    used.write_text("2000000\n")
    if limit is not None:
        most.write_text(f"{limit}\n")
    monkeypatch.setattr(device_state, "_MEMORY", memory)
    monkeypatch.setattr(device_state, "_LIMITS", ((str(most), str(used)),))
    assert read_device_state(CPU) == DeviceState("cpu", None, free_bytes)


def test_where_nothing_tells_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr(device_state, "_LIMITS", ())
    assert read_device_state(CPU).free_bytes is None


def test_an_environment_names_the_cpu_with_its_16_bit_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information, memory = tmp_path / "cpuinfo", tmp_path / "meminfo"
    information.write_text(
        "model name\t: Some CPU: fast\nflags\t\t: fpu avx512_bf16 amx_bf16 sse\n\nmodel name\t: other\n"
    )
    memory.write_text("MemTotal:       16000000 kB\n")
    monkeypatch.setattr(environment, "_CPU", information)
    monkeypatch.setattr(environment, "_MEMORY", memory)
    lines = describe(DeviceState("cuda", "H100", None))
    assert lines["cpu"] == "Some CPU: fast (avx512_bf16, amx_bf16)"
    assert (lines["memory"], lines["gpu"], lines["torch"]) == ("16 GB", "H100", torch.__version__)
    assert all(isinstance(line, str) for line in lines.values())


def test_an_environment_tells_a_task_file_from_an_edited_one(tmp_path: Path) -> None:
    task, here = tmp_path / "task.py", DeviceState("cpu", None, None)
    lines = []
    for text in ("lr = 1", "lr = 2", "lr = 1"):
        task.write_text(text)
        lines.append(describe(here, str(task))["task file"])
    assert lines[0] == lines[2] != lines[1]
    assert lines[0].startswith(f"{task}, SHA-256 ")
    assert "task file" not in describe(here, "stdlib-text")
