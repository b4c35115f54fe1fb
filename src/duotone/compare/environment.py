"""What a comparison's figures depend on besides the code: machine and versions, one short line each."""

import datetime
import hashlib
import os
import platform
from pathlib import Path

import torch

import duotone
from duotone.compare.measuring.device_state import DeviceState

_CPU, _MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
# what a CPU needs to multiply 16-bit numbers faster than FP32, as Linux names it
_PRODUCTS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "avx10_2", "bf16", "asimdhp")


def describe(device_state: DeviceState, task: str = "") -> dict[str, str]:
    """Return the environment, without starting CUDA; of a task in a file, what tells it from an edited one.

    >>> sorted(describe(DeviceState("cpu", None, None)))
    ['cores', 'cpu', 'date', 'device', 'duotone', 'memory', 'python', 'system', 'threads', 'torch']
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device_state.device,
        **({} if device_state.gpu is None else {"gpu": device_state.gpu}),
        "cpu": _cpu(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "duotone": duotone.__version__,
        **_task_file(task),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _task_file(task: str) -> dict[str, str]:
    if not task.endswith(".py"):
        return {}
    digest = hashlib.sha256(Path(task).read_bytes()).hexdigest()
    return {"task file": f"{task}, SHA-256 {digest[:16]}"}


def _cpu() -> str:
    lines = _CPU.read_text(encoding="utf-8").splitlines() if _CPU.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or platform.processor() or "unknown"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    products = [flag for flag in _PRODUCTS if flag in flags]
    return f"{name} ({', '.join(products)})" if products else name


def _memory() -> str:
    if not _MEMORY.exists():
        return "unknown"
    total = next(line for line in _MEMORY.read_text(encoding="ascii").splitlines() if line.startswith("MemTotal"))
    return f"{int(total.split()[1]) * 1024 / 1e9:.0f} GB"
