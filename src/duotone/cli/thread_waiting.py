"""How long threads of OpenMP wait in a loop for work before they sleep: briefly, where the user has not said.

Torch's threads wait so after each operation. By default those of GNU's OpenMP, which torch's wheels for Linux bring, do
it for milliseconds: beside any other program they take the cores from the very threads that they wait for, and a step
takes several times as long. A thousand rounds are about ten microseconds, enough for the next operation of an idle
machine.
LLVM's and Intel's runtimes, of other wheels, wait for 200 milliseconds, and take a time in place of rounds. Measured
by `benchmarks/busy.py`.
"""

from collections.abc import MutableMapping

SPIN_COUNT = "GOMP_SPINCOUNT"
# names by which a user decides, for one runtime or another
_VARIABLES = ("OMP_WAIT_POLICY", SPIN_COUNT, "KMP_BLOCKTIME", "KMP_LIBRARY")
_BRIEFLY = {SPIN_COUNT: "1000", "KMP_BLOCKTIME": "0"}


def wait_briefly(environment: MutableMapping[str, str]) -> bool:
    """Set how threads wait in an environment, for this process and those it starts; leave it as it is if it says.

    The runtime reads it once, as torch is imported.

    Returns:
        Whether it was set.

    >>> environment = {}
    >>> wait_briefly(environment), environment["GOMP_SPINCOUNT"], wait_briefly({"OMP_WAIT_POLICY": "active"})
    (True, '1000', False)
    """
    if any(name in environment for name in _VARIABLES):
        return False
    environment.update(_BRIEFLY)
    return True
