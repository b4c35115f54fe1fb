"""The processes that train together, as torchrun starts them: a group of ranks, or this process alone.

Every rank joins a process group, of gloo for tensors on CPUs and of NCCL for those on GPUs; beside it lies one of gloo
for what ranks tell each other. `Alone` has the interface of `Group` and speaks to nobody: whoever trains need not know.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from duotone import errors
from duotone.errors import DuotoneError, TaskError
from duotone.train.settings import find_device

Result = TypeVar("Result")
Mode = Literal["whole", "ddp", "fsdp"]

# set by torchrun, and by other launchers in the same way
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# how long a rank whose error came first waits for rank 0 to have the same one
_PATIENCE_SECONDS = 3.0


class Group:
    """The ranks of torch.distributed's default process group, which has to be there; every rank makes one of these.

    Args:
        local_rank: which rank this is on its machine, and so which GPU it takes; None for the same as its rank.
        store: where ranks leave the errors that end them; None for nowhere.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, local_rank: int | None = None, store: Any = None) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._local_rank = self.rank if local_rank is None else local_rank
        self._store = store
        # what ranks tell each other waits neither for a device nor for gradients on their way
        self._control: Any = dist.new_group(backend="gloo")

    def mode(self, parallel: Literal["auto", "ddp", "fsdp"]) -> Mode:
        """Return how the model is spread when the setting says `parallel`.

        Raises:
            TaskError: there is one process only, which nobody started as a rank, and ranks are asked for by name.
        """
        if parallel == "auto":
            return "ddp" if self.size > 1 else "whole"
        return parallel

    def device(self, name: str) -> torch.device:
        """Return this rank's device when the setting says `name`.

        Raises:
            TaskError: it is not there, or it is one GPU for several ranks.
        """
        kind, _, index = name.partition(":")
        if index and kind != "cpu" and self.size > 1:
            raise TaskError(f'device "{name}" is one for {self.size} ranks; say "{kind}", and each takes its own')
        device = find_device(name)
        if device.type == "cuda":
            device = device if index else find_device(f"cuda:{self._local_rank}")
            torch.cuda.set_device(device)
        return device

    def gather(self, value: Result) -> list[Result]:
        """Return what every rank gave, in their order; it is pickled on the way."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    def first(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0 and return its result, pickled on the way, on every rank.

        Raises:
            DuotoneError: it failed; on every rank.
        """
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [(action(), None)]
            except BaseException as error:
                dist.broadcast_object_list([(None, _packed(error))], group=self._control)
                raise
        dist.broadcast_object_list(told, group=self._control)
        result, failure = told[0]
        if failure is not None:
            raise _unpacked(*failure)
        return result

    def agree(self, action: Callable[[], Result]) -> Result:
        """Run an action, in which ranks do not speak, on every rank; return its result once it succeeded on all.

        Raises:
            DuotoneError: it failed on a rank; the same on every rank.
        """
        failure: BaseException | None = None
        result: Any = None
        try:
            result = action()
        except BaseException as error:
            failure = error
        told = self.gather(None if failure is None else _packed(failure))
        failed = {rank: each for rank, each in enumerate(told) if each is not None}
        if failure is not None and (len(set(told)) == 1 or not isinstance(failure, Exception)):
            raise failure
        if failed:
            kind = next(iter(failed.values()))[0]
            words = "; ".join(f"{message} (on rank {rank})" for rank, (_, message) in failed.items())
            raise _unpacked(kind, words) from failure
        return result

    def any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Ask whether a flag is set on any rank; return a function that waits for the answer, the same everywhere."""
        told = torch.tensor([flag()], dtype=torch.uint8)
        asked: Any = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control, async_op=True)

        def answer() -> bool:
            asked.wait()
            return bool(told)

        return answer

    def share(self, batches: Iterator[Result]) -> Iterator[Result]:
        """Yield this rank's batches of an endless stream that all ranks draw alike: the `rank`-th of every `size`."""
        while True:
            # all of them are drawn and the others' dropped, so that every rank stands at the same place in the data
            (own,) = [batch for rank, batch in zip(range(self.size), batches, strict=False) if rank == self.rank]
            yield own

    def send(self, model: nn.Module) -> nn.Module:
        """Give every rank rank 0's weights and buffers, and return the model."""
        for tensor in chain(model.parameters(), model.buffers()):
            if not is_lazy(tensor):
                dist.broadcast(tensor.detach(), 0)
        return model

    def part_ways(self, seed: int) -> None:
        """Seed the random generators of every rank but the first by the run's seed and the rank's number."""
        if self.rank:
            words = np.random.SeedSequence((seed, self.rank)).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]))

    def speaks(self, error: Exception) -> bool:
        """Return whether this rank is the one to print an error that ends it.

        One that comes on all ranks is rank 0's to print. One that comes on another alone is that one's, and what then
        fails elsewhere, because a rank is missing, is nobody's.
        """
        if self._store is None:
            return True
        own = repr(_packed(error))
        try:
            self._store.set(_failure_of(self.rank), own)
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
            # the store has ended with whoever held it
            return True

    def in_words(self, error: Exception) -> Exception:
        """Return an error as people should read it: what comes of another rank's end as just that."""
        if not isinstance(error, dist.DistError) and not (type(error) is RuntimeError and "gloo" in str(error)):
            return error
        return TaskError(
            "another rank has ended, and this one cannot go on without it; what was saved is intact: go on by --resume"
        )

    def _failure(self, rank: int) -> str | None:
        name = _failure_of(rank)
        return self._store.get(name).decode() if self._store.check([name]) else None


class Alone:
    """This process, training by itself: `Group`'s interface without anybody to speak to.

    >>> ranks = Alone()
    >>> ranks.gather("mine"), ranks.first(lambda: 3), list(ranks.share(iter("ab")))
    (['mine'], 3, ['a', 'b'])
    """

    rank = 0
    size = 1

    def mode(self, parallel: Literal["auto", "ddp", "fsdp"]) -> Mode:
        """As in `Group`."""
        if parallel != "auto":
            raise TaskError(
                f'parallel is "{parallel}", but this process was not started as a rank; start with torchrun '
                f"--nproc-per-node 2 -m duotone train --parallel {parallel}, or leave parallel out"
            )
        return "whole"

    def device(self, name: str) -> torch.device:
        """As in `Group`."""
        return find_device(name)

    def gather(self, value: Result) -> list[Result]:
        """As in `Group`."""
        return [value]

    def first(self, action: Callable[[], Result]) -> Result:
        """As in `Group`."""
        return action()

    def agree(self, action: Callable[[], Result]) -> Result:
        """As in `Group`."""
        return action()

    def any(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """As in `Group`; here the flag may still be set until the answer is read."""
        return flag

    def share(self, batches: Iterator[Result]) -> Iterator[Result]:
        """As in `Group`."""
        return batches

    def send(self, model: nn.Module) -> nn.Module:
        """As in `Group`."""
        return model

    def part_ways(self, seed: int) -> None:
        """As in `Group`."""

    def speaks(self, error: Exception) -> bool:
        """As in `Group`."""
        return True

    def in_words(self, error: Exception) -> Exception:
        """As in `Group`."""
        return error


Ranks: TypeAlias = Group | Alone


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, for the length of a block; or stay alone if it has not.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment, as torchrun sets them.

    Raises:
        TaskError: some of them are missing.

    >>> with open_ranks() as ranks:
    ...     ranks.rank, ranks.size
    (0, 1)
    """
    told = [name for name in _TOLD if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} <= {*told}:
        yield Alone()
        return
    if len(told) < len(_TOLD):
        missing = ", ".join(name for name in _TOLD if name not in told)
        raise TaskError(f"{', '.join(told)} are set in the environment, but {missing} is not; start ranks by torchrun")
    # not every build of torch has it, and whoever is alone needs none
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    # NCCL is started by the first tensor on a GPU, not before
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Group(int(os.environ.get("LOCAL_RANK", rank)), store)
    finally:
        dist.destroy_process_group()


def _failure_of(rank: int) -> str:
    return f"duotone-failure-{rank}"


def _packed(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _unpacked(kind: str, message: str) -> DuotoneError:
    """Return another rank's error as one of Duotone's, of its own kind if it was one."""
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, DuotoneError):
        return own(message)
    return TaskError(f"{kind}: {message}")
