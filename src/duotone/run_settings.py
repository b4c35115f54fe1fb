"""A training run's settings, by name: types, defaults and limits.

A task's own settings take precedence over the defaults, a configuration file's over the task's, a flag over all.
The command line makes its flags from `RunSettings`, so this module loads no framework.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from reprlib import Repr
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from duotone.config_file import to_yaml
from duotone.errors import TaskError, nearest_names
from duotone.policy import Policy

_BF16 = Policy.parse("bf16")
# a run seeds the generator of each epoch's batches with seed * 2^32 + epoch, which has 64 bits
_MOST_SEED = 2**32 - 1
# the largest whole number below which JSON readers know all
_MOST = 2**53
# FP32's largest number, which rates and norms become on the device
_LARGEST = float.fromhex("0x1.fffffep+127")
# a task's own warm-up is at most one part in so many of a run that is shorter
_WARMUP_SHARE = 4
# of a value in a message, so much that it is recognised
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's result depends on besides its task, and how often it reports.

    The text of each attribute is also the help of its flag.

    Attributes:
        task: A built-in task (stdlib-text, digits), a variant of one (digits:convnet), or the path of a task file.
        policy: Dtype of every role: fp32, bf16, fp16, bf16-mixed, fp16-mixed, ...
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        backend: Kernels of the optimizer; auto takes the device's own. The bits are the same.
        compile: Compile the model by torch.compile, as one graph; its first step takes longer.
        parallel: How ranks share the model: ddp, a copy on each; fsdp, a part on each; auto, ddp if there are several.
        seed: Seed of the model, the batches and everything else random.
        steps: Optimizer steps in all.
        micro_batches: Batches accumulated into one step, on each rank.
        optimizer: Duotone's optimizer.
        learning_rate: Highest learning rate of the schedule.
        warmup_steps: Steps of linear warm-up before the cosine.
        final_lr_fraction: Where the cosine ends, as a fraction of the highest learning rate.
        betas: Decay rates of the moments, of AdamW and Lion.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of the optimizer.
        clip_norm: Largest norm of the true gradient; none for no clipping.
        log_every: Steps between lines of metrics.
        evaluate_every: Steps between evaluations; the last step always has one.
        checkpoint_every: Steps between checkpoints; the last step always has one.
        keep: How many checkpoints stay, the newest.

    Raises:
        TaskError: a value is out of range or of the wrong type.
        PolicyError: the policy cannot be read.

    >>> RunSettings(task="digits", steps=0)
    Traceback (most recent call last):
    duotone.errors.TaskError: steps is 0; it must be at least 1
    """

    task: str = "stdlib-text"
    policy: Policy = _BF16
    device: str = "auto"
    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    compile: bool = False
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
        for name in ("learning_rate", "weight_decay", "momentum"):
            self._require(name, getattr(self, name) <= _LARGEST, "finite in FP32")
        for name in ("steps", "micro_batches", "log_every", "evaluate_every", "checkpoint_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "learning_rate", "warmup_steps", "weight_decay", "momentum"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("seed", self.seed <= _MOST_SEED, f"at most {_MOST_SEED}")
        for name in (
            "steps",
            "micro_batches",
            "warmup_steps",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep",
        ):
            self._require(name, getattr(self, name) <= _MOST, f"at most {_MOST}")
        self._require("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "between 0 and 1")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        fits = self.clip_norm is None or 0 < self.clip_norm <= _LARGEST
        self._require("clip_norm", fits, "positive and finite in FP32, or none")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise TaskError(f"{name} is {_SHOWN.repr(getattr(self, name))}; it must be {allowed}")

    def to_values(self) -> dict[str, Any]:
        """Return the settings by name as values of YAML, the policy as its shortest text.

        >>> RunSettings(policy="float16").to_values()["policy"]
        'fp16'
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "policy": self.policy.name, "betas": list(self.betas)}

    def to_yaml(self) -> str:
        """Return the settings as a configuration file that `read_config` reads back."""
        return to_yaml(self.to_values())


def resolve_settings(*sources: Mapping[Any, Any]) -> RunSettings:
    """Merge mappings of settings; where two set the same one, the later mapping decides.

    Raises:
        TaskError: a name is unknown, or a value is out of range or of the wrong type.
        PolicyError: the policy cannot be read.

    >>> resolve_settings({"steps": 50, "seed": 1}, {"steps": 20}).steps
    20
    """
    known = [field.name for field in fields(RunSettings)]
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            if name not in known:
                raise TaskError(f"there is no setting {_quoted(name)}; {nearest_names(str(name), known)}")
            merged[name] = value
    return RunSettings(**merged)


def with_warmup(settings: RunSettings, own: Mapping[str, Any]) -> RunSettings:
    """Return settings whose warm-up ends within the run: a task's own warm-up is cut to a quarter of a shorter run.

    Args:
        settings: resolved.
        own: what the user set, whom a warm-up longer than the run is no wish of.

    Raises:
        TaskError: the user set a warm-up longer than the run.

    >>> with_warmup(RunSettings(steps=20, warmup_steps=100), {"steps": 20}).warmup_steps
    5
    """
    if settings.warmup_steps <= settings.steps:
        return settings
    if "warmup_steps" in own:
        raise TaskError(
            f"warmup_steps is {settings.warmup_steps}, and the run has {settings.steps} steps; the warm-up must end "
            "within the run, so give less of it or more steps"
        )
    return replace(settings, warmup_steps=settings.steps // _WARMUP_SHARE)


def value_of_text(text: str, kind: Any) -> Any:
    """Return what a flag's text means for a setting of a type: a number where it is one, else the text itself.

    >>> value_of_text("1e-3", float), value_of_text("none", float | None), value_of_text("many", int)
    (0.001, None, 'many')
    """
    if NoneType in get_args(kind):
        if text == "none":
            return None
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    if kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as a setting of type `kind`, read from a text, a whole number or a list where it may be."""
    if kind is Policy:
        return Policy.parse(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise TaskError(f"{name} is {_quoted(value)}; it must be true or false")
        return value
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in choices:
            raise TaskError(f"{name} is {_quoted(value)}; {nearest_names(str(value), choices)}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(choices):
            raise TaskError(f"{name} is {_SHOWN.repr(value)}; it must be {len(choices)} numbers, such as [0.9, 0.999]")
        return tuple(_typed(name, item, item_kind) for item, item_kind in zip(value, choices, strict=True))
    if NoneType in choices:
        if value is None:
            return None
        kind = next(choice for choice in choices if choice is not NoneType)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # whatever FP64 does not hold is no setting either
        value = float(value) if abs(value) < _LARGEST else math.inf * (1 if value > 0 else -1)
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise TaskError(f"{name} is {_quoted(value)}; it must be {words[kind]}")
    return value


def _quoted(value: Any) -> str:
    """Return a value as a message shows it: a text in quotes, and of anything long the ends.

    >>> _quoted("many"), _quoted(3)
    ('"many"', '3')
    """
    shown = _SHOWN.repr(value)
    return f'"{shown[1:-1]}"' if isinstance(value, str) else shown
