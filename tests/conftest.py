"""What all tests share: one thread a process, a kernel cache of the checkout's own, several ranks at once."""

import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

_WORKER = Path(__file__).with_name("rank_worker.py")
MAX_RANKS = 3


def pytest_configure(config: pytest.Config) -> None:
    """Set what this process and all that it starts read: threads, and where compiled kernels and fonts are kept."""
    if config.getoption("numprocesses", None):
        # torch's threads spin: with more of them than cores everything takes many times as long
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as in whatever a shell runs in the background; tests of Ctrl-C send it to themselves
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        # never the user's own: a test must neither find kernels there nor leave any
        os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".pytest_cache" / "xdg")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take thousands of tests and what they import out of every garbage collection from here on."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter take down what was kept out of collections: libraries complain about what it leaves."""
    gc.unfreeze()


class Ranks:
    """Runs a test's functions on several ranks at once, in processes that are started once and used again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = Listener(str(folder / "socket"), "AF_UNIX")
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []
        self._calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(*arguments)`, of a test file, returns on each of the ranks of a gloo group.

        The ranks are `torch.distributed`'s default group. What goes in and comes out is pickled; torch's seed is 0.

        Raises:
            AssertionError: it raised on one of them; with the traceback.
        """
        assert world_size <= MAX_RANKS
        answers = self._ask(world_size, function, arguments)
        if any(kind == "no group" for kind, _ in answers):
            # gloo's connections of one machine's processes fail now and then, and all later ones of a process then do
            self.close()
            answers = self._ask(world_size, function, arguments)
        for rank, (kind, answer) in enumerate(answers):
            assert kind == "value", f"rank {rank}, {kind}:\n{answer}"
        return [answer for _, answer in answers]

    def _ask(self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
        if not self._connections:
            self._process = subprocess.Popen([sys.executable, str(_WORKER), self._listener.address, str(MAX_RANKS)])
            self._connections = [self._listener.accept() for _ in range(MAX_RANKS)]
        self._calls += 1
        store = self._folder / f"store-{self._calls}"
        path = function.__code__.co_filename
        for rank, connection in enumerate(self._connections[:world_size]):
            call = (path, function.__name__, rank, world_size, str(store), arguments)
            connection.send_bytes(pickle.dumps(call))
        return [pickle.loads(connection.recv_bytes()) for connection in self._connections[:world_size]]

    def close(self) -> None:
        """End the processes; a later `run` starts others."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps(None))
        self._connections.clear()
        if self._process:
            self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Return `Ranks`; a function that it is to run is one of the test file's own, by name."""
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
