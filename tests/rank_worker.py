"""Processes that each stand for one rank after another: they run test functions of files in groups of any size.

Started by `conftest.Ranks` as `python rank_worker.py ADDRESS PROCESSES`; each connects there and answers calls until it
is told None. They are forks of one process, which has imported torch and Duotone for all of them.
"""

import importlib.util
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path
from types import ModuleType
from typing import Any


def _module(path: str) -> ModuleType:
    name = f"rank_worker_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _answer(call: tuple[str, str, int, int, str, tuple[Any, ...]]) -> tuple[str, Any]:
    """Return "value" and what the function returns, or "error" or, where its ranks never met, "no group" and why."""
    import torch
    import torch.distributed as dist

    path, name, rank, world_size, store, arguments = call
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=_timeout()
        )
    except BaseException:
        return "no group", traceback.format_exc()
    torch.manual_seed(0)
    try:
        try:
            return "value", getattr(_module(path), name)(*arguments)
        finally:
            dist.destroy_process_group()
    except BaseException:
        return "error", traceback.format_exc()


def _timeout() -> Any:
    from datetime import timedelta

    return timedelta(seconds=60)


def main() -> None:
    """Answer calls, in this process and in forks of it."""
    # files of tests may import others
    sys.path.append(str(Path(__file__).parents[1]))

    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    import duotone.torch  # noqa: F401

    # loads torch's compiler, as the first step of each would
    torch.compiler.disable(abs)
    torch.set_num_threads(1)
    address, processes = sys.argv[1], int(sys.argv[2])
    children = []
    for _ in range(processes - 1):
        if (child := os.fork()) == 0:
            _serve(address)
            # taking torch down takes a second
            os._exit(0)
        children.append(child)
    _serve(address)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


def _serve(address: str) -> None:
    with Client(address) as connection:
        # as plain pickles: torch would have connections share the memory of tensors
        while (call := pickle.loads(connection.recv_bytes())) is not None:
            connection.send_bytes(pickle.dumps(_answer(call)))


if __name__ == "__main__":
    main()
