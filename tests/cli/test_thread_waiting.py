"""How the command line has threads wait, before torch is there, in its own process and in those that it starts."""

import os
import subprocess
import sys

import pytest

from duotone.cli.thread_waiting import wait_briefly

SAYS = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
# the command line up to the import of torch, then a process of its own
PROGRAM = f"""
import subprocess, sys
from duotone.cli import main
assert "torch" not in sys.modules
sys.argv = ["duotone", "formats"]
try:
    main.main()
except SystemExit:
    pass
assert "torch" not in sys.modules
subprocess.run([sys.executable, "-c", {SAYS!r}], check=True)
"""
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def test_it_is_set_before_torch_is_loaded_and_handed_on():
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "1000 0", result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_says_stays(name):
    environment = {name: "mine"}
    assert not wait_briefly(environment)
    assert environment == {name: "mine"}
