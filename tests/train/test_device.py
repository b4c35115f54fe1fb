"""The device that a setting names."""

import pytest
import torch

from duotone.errors import TaskError
from duotone.train import find_device


def test_a_device_that_is_not_there_is_named():
    assert find_device("auto").type in ("cpu", "cuda")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(TaskError, match=f'device "{missing}" is not there; this machine has cpu'):
        find_device(missing)
    with pytest.raises(TaskError, match='device "gpu" is not there'):
        find_device("gpu")
