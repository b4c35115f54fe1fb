"""The device that a comparison runs on; reading it starts CUDA if it is a GPU."""

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
class DeviceState:
    """A device and its free memory.

    Attributes:
        device: its type: "cpu", "cuda", ...
        gpu: its name, or None.
        free_bytes: memory that new processes can have, on the device that holds the models; None if that is unknown.
    """

    device: str
    gpu: str | None
    free_bytes: int | None


def read_device_state(device: torch.device) -> DeviceState:
    """Return what a device is and has.

    >>> read_device_state(torch.device("cpu")).device
    'cpu'
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return DeviceState("cuda", torch.cuda.get_device_name(device), free)
    return DeviceState(device.type, None, _available_bytes())


def _available_bytes() -> int | None:
    limits = []
    if _MEMORY.exists():
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in lines:
            limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in _LIMITS:
        try:
            # "max" where there is no limit
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)
