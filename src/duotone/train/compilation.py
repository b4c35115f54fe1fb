"""A model compiled by torch.compile, whole or not at all, and what that took apart from training.

The model's own calls are compiled, in place: its parameters keep their names, and a task's loss around it stays Python.
Evaluation runs as it would without, so that shapes and modes of its own are not compiled too, and figures are judged
alike. Left out: the optimizer's step, which is one kernel already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from duotone.errors import TaskError
from duotone.torch.internals import compiler

# torch's compiler of what it captured
BACKEND = "inductor"


class Compilation:
    """What compiling a model has taken so far; without a model to compile, nothing.

    Args:
        model: compiled in place; None to leave everything as it is.
        device: where it is.

    Raises:
        TaskError: the compiler of that device is missing.
    """

    def __init__(self, model: nn.Module | None, device: torch.device) -> None:
        self._is_on = model is not None
        if model is not None:
            check_compiler(device)
            # a part that cannot be compiled is an error; it would run uncompiled in silence
            compiler.compile_in_place(model, backend=BACKEND, fullgraph=True)
        self._graphs_before, self._seconds_before = compiler.compiled_graphs(), compiler.compile_seconds()

    @property
    def graphs(self) -> int:
        """How many graphs were captured: one, and one more for each other shape or mode that did not fit it."""
        return compiler.compiled_graphs() - self._graphs_before if self._is_on else 0

    @property
    def seconds(self) -> float:
        """How long the process has compiled."""
        return compiler.compile_seconds() - self._seconds_before if self._is_on else 0.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the model as it is written, for the length of a block."""
        if not self._is_on:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


def check_compiler(device: torch.device) -> None:
    """Raise unless torch.compile has what it compiles with for a device.

    Raises:
        TaskError: it has not.
    """
    if BACKEND != "inductor":
        return
    if device.type == "cuda" and find_spec("triton") is None:
        raise TaskError(
            "compiling for a GPU needs Triton, which is not installed; run pip install triton, or do not compile"
        )
    if device.type == "cpu":
        try:
            compiler.check_cpp_compiler()
        except Exception as error:
            raise TaskError(
                "compiling for a CPU needs a C++ compiler, and torch finds none; install one, such as g++, or name it "
                "by CXX in the environment, or do not compile"
            ) from error
