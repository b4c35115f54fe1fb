"""What a run trains: a model, its loss, its batches and its evaluation, as one value.

A `Task` has no precision, device or optimizer; the trainer decides those. It draws the model from torch's global
seed and its batches from the generator it is given, so the same two seeds give the same run. Left out: worker
processes and prefetching, which a task's `batches` may do by itself.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from duotone.errors import TaskError

# a tensor, or a tuple, list or dict of batches; Any, so that a task may name the very shape of its own
Batch: TypeAlias = Any

TASK_FILE_MODULE = "_duotone_task_file"


def samples_in(batch: Batch) -> int:
    """Return the length of the first tensor in a batch.

    Raises:
        TaskError: if there is no tensor of at least one dimension in it.

    >>> samples_in({"image": (torch.zeros(8, 3), torch.zeros(5))})
    8
    """
    parts = [batch]
    while parts:
        part = parts.pop(0)
        if isinstance(part, torch.Tensor) and part.ndim:
            return len(part)
        if isinstance(part, Mapping):
            parts = [*part.values(), *parts]
        elif isinstance(part, list | tuple):
            parts = [*part, *parts]
    raise TaskError("a batch holds no tensor whose length could be counted; give the task `units_in`")


@dataclass(frozen=True)
class Task:
    """Everything a run needs to know about what it trains.

    Attributes:
        name: what people call it.
        model: freshly initialised in FP32, from torch's global seed.
        loss: maps the model and a batch on the model's device to a scalar.
        batches: maps a CPU generator to one epoch's batches; the same state must give the same batches. Several ranks
            all draw all of them, and each trains on its share.
        evaluate: maps the model to its figures on held-out data; deterministic. See `evaluating`.
        quality: name of the figure that the run is judged by.
        lower_is_better: which way `quality` improves.
        unit: what throughput counts.
        units_in: how many units a batch holds; by default the length of its first tensor.
        settings: run settings that suit the task (`steps`, `learning_rate`, ...); a user's own take precedence.
        baselines: `quality` of reference methods on the same held-out data.
        facts: about the data, a line each.

    Raises:
        TaskError: if a field has the wrong type, or the model is not in FP32.

    >>> task = Task(
    ...     name="zero",
    ...     model=nn.Linear(1, 1),
    ...     loss=lambda model, x: model(x).square().mean(),
    ...     batches=lambda generator: (torch.rand(4, 1, generator=generator) for _ in range(3)),
    ...     evaluate=lambda model: {"loss": 0.0},
    ... )
    >>> [task.units_in(batch) for batch in task.batches(torch.Generator())]
    [4, 4, 4]
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    batches: Callable[[torch.Generator], Iterable[Batch]]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    quality: str = "loss"
    lower_is_better: bool = True
    unit: str = "samples"
    units_in: Callable[[Batch], int] = samples_in
    settings: Mapping[str, object] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "quality", "unit"):
            value = getattr(self, name)
            self._require(isinstance(value, str) and value, name, "a non-empty string")
        for name in ("loss", "batches", "evaluate", "units_in"):
            self._require(callable(getattr(self, name)), name, "a function")
        self._require(isinstance(self.lower_is_better, bool), "lower_is_better", "True or False")
        for name, kind, kinds in (
            ("settings", object, "values"),
            ("baselines", (int, float), "numbers"),
            ("facts", str, "strings"),
        ):
            value = getattr(self, name)
            fits = isinstance(value, Mapping) and all(
                isinstance(key, str) and isinstance(item, kind) for key, item in value.items()
            )
            self._require(fits, name, f"a mapping from strings to {kinds}")
        self._require(isinstance(self.model, nn.Module), "model", "a torch.nn.Module")
        self._require(
            any(each.requires_grad for each in self.model.parameters()), "model", "a model with a parameter to train"
        )
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise TaskError(
                    f"task {self.name!r}: its model's {name} is on the meta device; hand over one with weights"
                )
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise TaskError(
                    f"task {self.name!r}: its model's {name} is {dtype}; "
                    "hand the model over in float32, the policy casts it"
                )

    def _require(self, holds: object, name: str, allowed: str) -> None:
        if not holds:
            got = getattr(self, name)
            raise TaskError(f"task {self.name!r}: {name} is {got!r:.60}; it must be {allowed}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients, and every module of it back as it was at the end.

    >>> model = nn.Dropout().train()
    >>> with evaluating(model):
    ...     model.training, torch.is_inference_mode_enabled()
    (False, True)
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with all its tensors on a device.

    >>> on_device({"x": [torch.ones(2), "a name"]}, torch.device("meta"))["x"][0].device
    device(type='meta')
    """
    return map_batch(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_batch(change: Callable[..., torch.Tensor], *batches: Batch) -> Batch:
    """Return a batch like the first, made of what `change` returns for the tensors that all have in one place.

    >>> map_batch(torch.add, {"x": [torch.tensor(1), "a name"]}, {"x": [torch.tensor(2), "another"]})
    {'x': [tensor(3), 'a name']}
    """
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return change(*batches)
    if isinstance(first, Mapping):
        return {key: map_batch(change, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, list | tuple):
        items = [map_batch(change, *parts) for parts in zip(*batches, strict=True)]
        # a named tuple takes its items one by one, unless it is told to take them all
        return getattr(first, "_make", type(first))(items)
    return first


def check_loss(task: Task, loss: object) -> None:
    """Raise unless what a task's `loss` returned can be trained on.

    Raises:
        TaskError: it is no tensor of one number, or has no gradient.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"the loss of task {task.name!r} is {got}; it must be a tensor of one element")
    if not loss.is_floating_point():
        dtype = str(loss.dtype).removeprefix("torch.")
        raise TaskError(f"the loss of task {task.name!r} is {dtype}; it must be a floating-point number")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TaskError(
            f"the loss of task {task.name!r} has no gradient: it depends on no parameter that is trained; return what "
            "the model computed, without detach(), item() or no_grad()"
        )


def figures_of(task: Task, evaluation: object) -> dict[str, float]:
    """Return what a task's `evaluate` returned, as plain numbers by name.

    Raises:
        TaskError: it is no mapping from names to numbers, or its quality is not among them.

    >>> task = Task("mine", nn.Linear(1, 1), lambda *_: torch.ones(()), lambda _: [], lambda _: {})
    >>> figures_of(task, {"loss": torch.tensor(0.5)})
    {'loss': 0.5}
    """
    if not isinstance(evaluation, Mapping):
        got = f"{evaluation!r:.60}"
        raise TaskError(
            f"evaluate of task {task.name!r} returned {got}; it must return a mapping from names to numbers"
        )
    figures = {str(name): _number(task, name, value) for name, value in evaluation.items()}
    if task.quality not in figures:
        raise TaskError(
            f"task {task.name!r} evaluates {', '.join(figures) or 'nothing'}, but its quality is {task.quality!r}; "
            "return that figure too, or name another as `quality`"
        )
    return figures


def _number(task: Task, name: object, value: Any) -> float:
    try:
        # a text may be read as a number, and is none
        return float("" if isinstance(value, str | bytes) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TaskError(
            f"evaluate of task {task.name!r} returned {value!r:.60} as {name!r:.60}; it must be a number"
        ) from None


def load_task_file(path: str | Path) -> Task:
    """Run a Python file that defines `task()`, and return what `task()` returns.

    Modules beside the file are importable while it runs, as under `python path`; the file itself never is.

    Raises:
        TaskError: if the file is missing or raises, or `task` is missing or returns anything but a `Task`.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise TaskError(f"there is no file {path}; give a file that defines task(), or a built-in task")
    spec = importlib.util.spec_from_file_location(TASK_FILE_MODULE, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    # dataclasses and typing look their module up by name while it runs
    sys.modules[TASK_FILE_MODULE] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        define_task = getattr(module, "task", None)
        task = define_task() if callable(define_task) else None
    except KeyboardInterrupt:
        raise
    # sys.exit too
    except BaseException as error:
        raise TaskError(f"{location_of(error, path)}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
        sys.modules.pop(TASK_FILE_MODULE, None)
    if not callable(define_task):
        raise TaskError(f"{path} defines no task(); define one that takes nothing and returns a Task")
    if not isinstance(task, Task):
        raise TaskError(f"task() of {path} returned a {type(task).__name__}; it must return a Task")
    return task


def location_of(error: BaseException, path: Path) -> str:
    """Name `path` and the last of its lines that the error passed through, or the one that does not parse."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == path.resolve():
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else str(path)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or nothing if it has none."""
    try:
        return next(iter(str(error).splitlines()), "")
    except Exception:
        # an error of a user's class may not even have a message
        return ""
