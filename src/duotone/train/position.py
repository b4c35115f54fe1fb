"""Where a run stands in its steps and its data, as its checkpoints hold it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from duotone.errors import CheckpointError
from duotone.train.run_folder import step_of

# the smallest that each may be, and the first that is too large: an epoch is a part of a generator's seed
_LIMITS = {"step": (0, 2**53), "epoch": (0, 2**32), "batches_taken": (0, 2**53), "batches_per_step": (1, 2**53)}


def check_position(path: Path, progress: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's `progress` is a trainer's, of the step that the checkpoint is called by.

    Raises:
        CheckpointError: it is not.

    >>> check_position(Path("step-00000003"), {"step": 3})
    Traceback (most recent call last):
    duotone.errors.CheckpointError: step-00000003 does not say where its run stood (epoch); use another checkpoint
    """
    wrong = [name for name, limits in _LIMITS.items() if not _is_count(progress.get(name), *limits)]
    losses, added = progress.get("losses"), progress.get("losses_added")
    if not isinstance(added, list) or not added or not all(_is_count(each, 0, 2**53) for each in added):
        wrong.append("losses_added")
    elif not isinstance(losses, Tensor) or losses.shape != (len(added),):
        wrong.append("losses")
    if not wrong and progress["step"] != step_of(path):
        wrong.append("step")
    if wrong:
        raise CheckpointError(f"{path} does not say where its run stood ({wrong[0]}); use another checkpoint")


def _is_count(value: Any, least: int, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end
