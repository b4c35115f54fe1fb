"""The examples of tasks run; those in JAX and Keras have their tests in `tests/jax` and `tests/keras`."""

from pathlib import Path

import pytest
import torch

from duotone.train import Trainer, resolve_settings
from duotone.train.task import load_task_file

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith(("jax_", "keras_")))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_an_example_learns_under_every_preset(path, policy):
    torch.manual_seed(0)
    task = load_task_file(path)
    # enough to see that it learns; how well is for whoever runs it
    trainer = Trainer(task, resolve_settings(dict(task.settings), {"policy": policy, "steps": 100}))
    before = trainer.summary().evaluation[task.quality]
    list(trainer.run())
    after = trainer.summary().evaluation[task.quality]
    assert (after < before) == task.lower_is_better


def test_an_example_is_short():
    assert EXAMPLES
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)
