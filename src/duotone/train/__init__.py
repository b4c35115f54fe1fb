"""Training runs: a `Task` says what, `RunSettings` say how, a `Trainer` does it."""

from duotone.run_settings import RunSettings, read_config, resolve_settings
from duotone.train.device import find_device
from duotone.train.group import Group, open_ranks
from duotone.train.interruption import Interruption, print_at_once, stop_on_signal
from duotone.train.metrics import Metrics, Summary, as_json
from duotone.train.optimizer import optimizer_arguments, optimizer_of
from duotone.train.run_folder import RunFolder, next_free_folder
from duotone.train.schedule import cosine_schedule
from duotone.train.task import Task
from duotone.train.tasks import BUILT_IN, built_in_task, find_task
from duotone.train.trainer import Trainer

__all__ = [
    "BUILT_IN",
    "Group",
    "Interruption",
    "Metrics",
    "RunFolder",
    "RunSettings",
    "Summary",
    "Task",
    "Trainer",
    "as_json",
    "built_in_task",
    "cosine_schedule",
    "find_device",
    "find_task",
    "next_free_folder",
    "open_ranks",
    "optimizer_arguments",
    "optimizer_of",
    "print_at_once",
    "read_config",
    "resolve_settings",
    "stop_on_signal",
]
