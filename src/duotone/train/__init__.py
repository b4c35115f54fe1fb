"""Training runs: a `Task` says what, `RunSettings` say how, a `Trainer` does it."""

from duotone.train.interruption import Interruption, print_at_once, stop_on_signal
from duotone.train.metrics import Metrics, Summary, as_json
from duotone.train.optimizer import optimizer_of
from duotone.train.ranks import Alone, Group, Ranks, open_ranks
from duotone.train.run_folder import RunFolder, next_free_folder
from duotone.train.settings import RunSettings, find_device, read_config, resolve_settings
from duotone.train.task import Task
from duotone.train.tasks import BUILT_IN, built_in_task, find_task
from duotone.train.trainer import Trainer

__all__ = [
    "BUILT_IN",
    "Alone",
    "Group",
    "Interruption",
    "Metrics",
    "Ranks",
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
    "open_ranks",
    "optimizer_of",
    "print_at_once",
    "read_config",
    "resolve_settings",
    "stop_on_signal",
]
