"""What a run is told: every setting by name, its default, and where each value came from.

A task's own settings go before the defaults, a configuration file's before the task's, a flag before them all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
import yaml

from duotone.errors import TaskError, nearest_names
from duotone.policy import Policy


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's result depends on besides its task, and how it is watched.

    Attributes:
        task: a built-in task's name or the path of a task file.
        policy: a policy's text.
        device: `"auto"` (a GPU if there is one), `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        backend: of the optimizer's kernels: `"auto"` (the device's own), `"reference"`, `"cpu"` or `"cuda"`; the
            result is the same bits.
        parallel: what several ranks do: `"ddp"` (a copy of the model on each), `"fsdp"` (a part on each), or `"auto"`,
            which is ddp if there are several.
        seed: of the model, the batches and anything else random.
        steps: optimizer steps in all.
        micro_batches: batches whose gradients are accumulated into one step, on each rank.
        optimizer: `"adamw"`, `"sgd"` or `"lion"`.
        learning_rate: the highest of the schedule.
        warmup_steps: steps of linear warm-up.
        final_lr_fraction: where the cosine ends, as a fraction of `learning_rate`.
        betas: AdamW's or Lion's.
        momentum: SGD's.
        weight_decay: the optimizer's.
        clip_norm: the largest gradient norm; None for no clipping.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two evaluations; there is always one at the end.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        keep: how many checkpoints stay, the newest ones.

    Raises:
        TaskError: a value is out of range or of the wrong type.
        PolicyError: the policy cannot be read.

    >>> RunSettings(task="digits", steps=0)
    Traceback (most recent call last):
    duotone.errors.TaskError: steps is 0; it must be at least 1
    """

    task: str = "stdlib-text"
    policy: str = "bf16"
    device: str = "auto"
    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    seed: int = 0
    steps: int = 1000
    micro_batches: int = 1
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))
        for name in ("steps", "micro_batches", "log_every", "evaluate_every", "checkpoint_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "learning_rate", "warmup_steps", "weight_decay", "momentum"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "between 0 and 1")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive, or none")
        Policy.parse(self.policy)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise TaskError(f"{name} is {getattr(self, name)}; it must be {allowed}")

    def to_yaml(self) -> str:
        """Return the settings as a configuration file that `read_config` reads back."""
        return yaml.safe_dump(asdict(self) | {"betas": list(self.betas)}, sort_keys=False)


def resolve_settings(*sources: Mapping[str, Any]) -> RunSettings:
    """Merge mappings of settings, later ones before earlier ones.

    Raises:
        TaskError: a name is unknown, or a value cannot be.

    >>> resolve_settings({"steps": 50, "seed": 1}, {"steps": 20}).steps
    20
    """
    known = [field.name for field in fields(RunSettings)]
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            if name not in known:
                raise TaskError(f'there is no setting "{name}"; {nearest_names(name, known)}')
            merged[name] = value
    return RunSettings(**merged)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings by name; an empty one gives none.

    Raises:
        TaskError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise TaskError(f"{path} is not YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TaskError(f"{path} holds a {type(content).__name__}; it must map setting names to values")
    return content


def find_device(name: str) -> torch.device:
    """Return the device that a setting names.

    Raises:
        TaskError: there is no such device on this machine.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise TaskError(f'device "{name}" is not there; this machine has {here}') from error
    return device


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as a setting of type `kind`; whole numbers serve as floats, and lists as pairs."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in choices:
            raise TaskError(f'{name} is "{value}"; {nearest_names(str(value), choices)}')
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(choices):
            raise TaskError(f"{name} is {value!r}; it must be {len(choices)} numbers")
        return tuple(_typed(name, item, item_kind) for item, item_kind in zip(value, choices, strict=True))
    if NoneType in choices:
        if value is None:
            return None
        kind = next(choice for choice in choices if choice is not NoneType)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise TaskError(f"{name} is {value!r}; it must be {words[kind]}")
    return value
