"""Training runs: a `Task` says what, `RunSettings` say how, a `Trainer` does it."""

from duotone.config_file import read_config
from duotone.run_settings import RunSettings, resolve_settings, with_warmup
from duotone.train.compilation import Compilation
from duotone.train.device import find_device
from duotone.train.group import Group, open_ranks
from duotone.train.guarded_task import guarded
from duotone.train.interruption import Interruption, print_at_once, stop_on_signal
from duotone.train.metrics import Metrics, Summary, as_json
from duotone.train.optimizer import optimizer_arguments, optimizer_of
from duotone.train.run_folder import RunFolder, held_folder, next_free_folder
from duotone.train.schedule import cosine_schedule
from duotone.train.task import Task
from duotone.train.tasks import BUILT_IN, built_in_task, find_task
from duotone.train.trainer import Trainer

__all__ = [
    "BUILT_IN",
    "Compilation",
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
    "guarded",
    "held_folder",
    "next_free_folder",
    "open_ranks",
    "optimizer_arguments",
    "optimizer_of",
    "print_at_once",
    "read_config",
    "resolve_settings",
    "stop_on_signal",
    "with_warmup",
]
