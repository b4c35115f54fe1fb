"""Checkpoints on the disk: `verify` one, `list_all` in a folder, `remove` one, `remove_leftovers` of dead writers.

Made and read by `duotone.torch.save_checkpoint` and `load_checkpoint`, by one process or several ranks.

>>> import duotone.torch as dt
>>> dt.checkpoints.list_all("no/such/folder")
[]
"""

from duotone.torch.checkpoints.atomic_folder import list_all, remove, remove_leftovers
from duotone.torch.checkpoints.folder import verify

__all__ = ["list_all", "remove", "remove_leftovers", "verify"]
