"""The device that a comparison runs on, seen from a process that may start CUDA."""

from dataclasses import dataclass
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
# limits of the container that a process is in, with what is used of each: cgroups of version 2, then 1
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Surroundings:
    """Where processes train.

    Attributes:
        device: its type: "cpu", "cuda", ...
        gpu: its name, or None.
        free_bytes: memory that new processes can have, on the device that holds the models; None if that is unknown.
    """

    device: str
    gpu: str | None
    free_bytes: int | None


def look_around(device: torch.device) -> Surroundings:
    """Return what a device is and has; this starts CUDA if it is a GPU.

    >>> look_around(torch.device("cpu")).device
    'cpu'
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Surroundings("cuda", torch.cuda.get_device_name(device), free)
    return Surroundings(device.type, None, _available_bytes())


def _available_bytes() -> int | None:
    found = []
    if _MEMORY.exists():
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in _LIMITS:
        try:
            # "max" where there is no limit
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return min(found, default=None)
