"""What the tests of training share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from duotone.train import RunFolder, RunSettings, Task, Trainer

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer() -> MakeTrainer:
    """Return a function that seeds torch, builds a task and puts a trainer around it."""

    def make(task: Callable[[], Task], folder: Path | None = None, *, resume: bool = False, **settings: Any) -> Trainer:
        told = RunSettings(**{"steps": 12, "log_every": 4, "learning_rate": 1e-2, **settings})
        torch.manual_seed(told.seed)
        trainer = Trainer(task(), told, None if folder is None else RunFolder(folder))
        if resume:
            trainer.resume()
        elif trainer.folder is not None:
            trainer.folder.start(told)
        return trainer

    return make
