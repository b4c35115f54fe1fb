"""The states of the random generators that training draws from: torch's on every device, Python's and NumPy's."""

import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of all generators, as tensors and JSON values.

    >>> states = random_states()
    >>> drawn = torch.rand(3), random.random()
    >>> restore_random_states(states)
    >>> torch.equal(torch.rand(3), drawn[0]), random.random() == drawn[1]
    (True, True)
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], *rest],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put all generators into states that `random_states` returned; CUDA's only if there are as many devices."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def restore_of_rank(saved: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
    """Put the generators of one of several ranks into the states that ranks saved.

    As many ranks as saved get their own. Of another number, rank 0 gets the first, and the generators of every other
    rank are seeded from the first and its own number: the same in every run, different on each rank.

    Args:
        saved: what `random_states` returned on each of the ranks that saved.
        rank: of this process, from 0.
        size: how many ranks there are now.
    """
    if len(saved) == size or rank == 0:
        restore_random_states(saved[rank])
        return
    digest = sha256(saved[0]["torch"].numpy().tobytes() + rank.to_bytes(8, "little")).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[8:12], "little"))
