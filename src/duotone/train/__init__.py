"""Training runs: a `Task` says what, `RunSettings` say how, a `Trainer` does it."""

from duotone.train.metrics import Metrics, Summary, as_json
from duotone.train.run_folder import RunFolder, next_free_folder
from duotone.train.settings import RunSettings, find_device, read_config, resolve_settings
from duotone.train.task import Task
from duotone.train.tasks import BUILT_IN, built_in_task, find_task
from duotone.train.trainer import Trainer

__all__ = [
    "BUILT_IN",
    "Metrics",
    "RunFolder",
    "RunSettings",
    "Summary",
    "Task",
    "Trainer",
    "as_json",
    "built_in_task",
    "find_device",
    "find_task",
    "next_free_folder",
    "read_config",
    "resolve_settings",
]
