"""Steps on one device, where updates run in pieces: tests that this process runs on four run again in one with one."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = ("test_masters.py", "test_training.py", "test_pieces.py::test_pieces_are_for_one_device_alone")


def test_steps_on_one_device():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    tests = [str(Path(__file__).with_name(name)) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
