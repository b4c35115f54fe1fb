"""The processes that train together, as torchrun starts them: several ranks, or this process alone.

Every rank joins a process group, of gloo for tensors on CPUs and of NCCL for those on GPUs; a second one, of gloo,
carries messages between ranks. A trainer uses one process alone and several in the same way.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from duotone.errors import TaskError
from duotone.ranks import Ranks
from duotone.train.device import find_device

Result = TypeVar("Result")
Mode = Literal["whole", "ddp", "fsdp"]

# set by torchrun, and by other launchers in the same way
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# how long a rank whose error came first waits for rank 0 to have the same one
_PATIENCE_SECONDS = 3.0


class Group:
    """The processes that train together; by default this one alone.

    Args:
        ranks: the processes; `Group.join` makes them.
        local_rank: number of this process on its machine, which is the GPU that it takes.
        store: where ranks leave the errors that end them; None for nowhere.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.

    >>> group = Group()
    >>> group.gather("mine"), group.first(lambda: 3), list(group.share(iter("ab")))
    (['mine'], 3, ['a', 'b'])
    """

    def __init__(self, ranks: Ranks | None = None, local_rank: int = 0, store: Any = None) -> None:
        self._ranks = ranks or Ranks()
        self.rank, self.size = self._ranks.rank, self._ranks.size
        self._local_rank = local_rank
        self._store = store

    @classmethod
    def join(cls, local_rank: int | None = None, store: Any = None) -> "Group":
        """Return the ranks of torch.distributed's default process group; every one of them calls this.

        Args:
            local_rank: as above; None for the same as its rank.
            store: as above.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        # messages wait neither for a device nor for gradients on their way
        control: Any = dist.new_group(backend="gloo")

        def exchange(value: Any) -> list[Any]:
            values: list[Any] = [None] * size
            dist.all_gather_object(values, value, group=control)
            return values

        return cls(Ranks(rank, size, exchange, TaskError, control), rank if local_rank is None else local_rank, store)

    def gather(self, value: Result) -> list[Result]:
        """As `Ranks.gather`."""
        return self._ranks.gather(value)

    def first(self, action: Callable[[], Result]) -> Result:
        """As `Ranks.first`."""
        return self._ranks.first(action)

    def agree(self, action: Callable[[], Result]) -> Result:
        """As `Ranks.agree`."""
        return self._ranks.agree(action)

    def mode(self, parallel: Literal["auto", "ddp", "fsdp"]) -> Mode:
        """Return how the model is distributed when the setting says `parallel`.

        Raises:
            TaskError: the setting asks for ranks, and this process was not started as one.
        """
        if parallel == "auto":
            return "ddp" if self.size > 1 else "whole"
        if self._ranks.exchange is None:
            raise TaskError(
                f'parallel is "{parallel}", but this process was not started as a rank; start with torchrun '
                f"--nproc-per-node 2 -m duotone train --parallel {parallel}, or leave parallel out"
            )
        return parallel

    def device(self, name: str) -> torch.device:
        """Return this rank's device when the setting says `name`.

        Raises:
            TaskError: this machine does not have it, or it is one GPU for several ranks.
        """
        kind, _, index = name.partition(":")
        if index and kind != "cpu" and self.size > 1:
            raise TaskError(f'device "{name}" is one for {self.size} ranks; say "{kind}", and each takes its own')
        device = find_device(name)
        if device.type == "cuda" and self._ranks.exchange is not None:
            device = device if index else find_device(f"cuda:{self._local_rank}")
            torch.cuda.set_device(device)
        return device

    def any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Ask whether a flag is set on any rank; return a function that waits for the answer, the same everywhere.

        Alone, the flag may still be set until the answer is read.
        """
        if self._ranks.exchange is None:
            return flag
        any_set = torch.tensor([flag()], dtype=torch.uint8)
        request: Any = dist.all_reduce(any_set, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True)

        def answer() -> bool:
            request.wait()
            return bool(any_set)

        return answer

    def share(self, batches: Iterator[Result]) -> Iterator[Result]:
        """Yield this rank's batches of a stream that all ranks draw alike: the `rank`-th of every `size`."""
        own = [None]
        while own:
            # all of them are drawn and the others' dropped, so that every rank is at the same point in the data
            own = [batch for rank, batch in zip(range(self.size), batches, strict=False) if rank == self.rank]
            yield from own

    def broadcast(self, model: nn.Module) -> nn.Module:
        """Give every rank rank 0's weights and buffers, and return the model."""
        if self._ranks.exchange is not None:
            for tensor in chain(model.parameters(), model.buffers()):
                if not is_lazy(tensor):
                    dist.broadcast(tensor.detach(), 0)
        return model

    def seed_generators(self, seed: int) -> None:
        """Seed the random generators of every rank but the first by the run's seed and the rank's number."""
        if self.rank:
            words = np.random.SeedSequence((seed, self.rank)).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]))

    def prints(self, error: Exception) -> bool:
        """Return whether this rank is the one to print an error that ends it.

        Rank 0 prints one that all ranks have. One that came first on another rank is printed there; what then fails
        elsewhere, because a rank is missing, is not printed.
        """
        if self._store is None:
            return True
        own = f"{type(error).__name__}: {error}"
        try:
            self._store.set(_failure_key(self.rank), own)
            is_first = self._store.add("duotone-failures", 1) == 1
            if self.rank == 0:
                return is_first or any(self._failure(rank) == own for rank in range(1, self.size))
            if not is_first:
                return False
            started = time.monotonic()
            while self._failure(0) is None and time.monotonic() - started < _PATIENCE_SECONDS:
                time.sleep(0.05)
            return self._failure(0) != own
        except RuntimeError:
            # the store has ended with the process that held it
            return True

    def readable(self, error: Exception) -> Exception:
        """Return an error, or if it follows from the end of another rank, one that says so."""
        is_of_gloo = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
        if self._ranks.exchange is None or not is_of_gloo:
            return error
        return TaskError(
            "another rank has ended, and this one cannot go on without it; what was saved is intact: go on by --resume"
        )

    def _failure(self, rank: int) -> str | None:
        key = _failure_key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


@contextmanager
def open_ranks() -> Iterator[Group]:
    """Join the ranks that torchrun has started, for the length of a block; without torchrun, this process is alone.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment, as torchrun sets them.

    Raises:
        TaskError: some of them are missing.

    >>> with open_ranks() as group:
    ...     group.rank, group.size
    (0, 1)
    """
    present = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} <= {*present}:
        yield Group()
        return
    if len(present) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in present)
        raise TaskError(
            f"{', '.join(present)} are set in the environment, but {missing} is not; start ranks by torchrun"
        )
    size = _number("WORLD_SIZE", 1, 2**31)
    rank = _number("RANK", 0, size)
    local_rank = _number("LOCAL_RANK", 0, size) if "LOCAL_RANK" in os.environ else rank
    _number("MASTER_PORT", 0, 2**16)
    # not every build of torch has it, and a process alone needs none
    from torch.distributed.rendezvous import rendezvous

    # NCCL is started by the first tensor on a GPU, not before
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (dist.DistError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = next(iter(str(error).splitlines()), "")
        raise TaskError(f"the ranks do not meet at {place}: {reason}; start ranks by torchrun") from error
    try:
        yield Group.join(local_rank, store)
    finally:
        dist.destroy_process_group()


def _number(name: str, least: int, end: int) -> int:
    """Return a variable of the environment, which a launcher has set."""
    text = os.environ[name]
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) < end:
        raise TaskError(
            f'{name} in the environment is "{text:.60}"; it must be a whole number from {least} to {end - 1}, '
            "as torchrun sets it"
        )
    return int(text)


def _failure_key(rank: int) -> str:
    return f"duotone-failure-{rank}"
