"""The device that a setting names."""

import torch

from duotone.errors import TaskError


def find_device(name: str) -> torch.device:
    """Return the device that a setting names: `"auto"` is a GPU if there is one.

    Raises:
        TaskError: this machine has no such device.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise TaskError(f'device "{name}" is not there; this machine has {available}') from error
    return device
