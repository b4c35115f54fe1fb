"""Calls that a mode of Duotone's passes on, and calls that it carries out itself, whatever the rules are today."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import duotone.torch
from duotone.torch.explanation import explain

# as if it were a file of Duotone's: softmax in FP32, in several steps, and everything else passed on
MODE = """
from torch import softmax
from torch.overrides import TorchFunctionMode

def in_steps(x):
    return x.float().exp()

class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not softmax:
            return func(*args, **(kwargs or {}))
        steps = in_steps(args[0])
        return (steps / steps.sum(-1, keepdim=True)).to(args[0].dtype)
"""


@pytest.fixture
def mode():
    made: dict = {}
    exec(compile(MODE, str(Path(duotone.torch.__file__).parent / "made_up.py"), "exec"), made)
    return made["Mode"]


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(x, -1)
        x = torch.softmax(x, -1)
        return (x * 2).float()


def test_who_asked_and_what_for(mode):
    def run() -> None:
        with mode(), mode():
            Model()(torch.ones(2, 4, dtype=torch.bfloat16))

    found = explain(nn.Identity(), run=run)
    first = inspect.getsourcelines(Model.forward)[1]
    here = Path(__file__).resolve().relative_to(Path.cwd().resolve()).as_posix()
    casts = {(each.by, each.operation, each.from_dtype, each.calls, each.source_line) for each in found.casts}
    assert casts == {
        ("duotone", "softmax", "bfloat16", 1, f"{here}:{first + 1}"),
        ("duotone", "softmax", "float32", 1, f"{here}:{first + 1}"),
        ("duotone", "softmax", "bfloat16", 1, f"{here}:{first + 2}"),
        ("duotone", "softmax", "float32", 1, f"{here}:{first + 2}"),
        ("model", "float", "bfloat16", 1, f"{here}:{first + 3}"),
    }
    # what a mode does in steps is the one operation that was asked for
    operations = {(each.name, each.compute_dtype, each.output_dtype, each.calls) for each in found.operations}
    assert operations == {("softmax", "float32", "bfloat16", 2), ("mul", "bfloat16", "bfloat16", 1)}
