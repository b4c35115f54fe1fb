"""The weights in a checkpoint, read without the model that they are of."""

from pathlib import Path

import torch
from torch import Tensor

from duotone.errors import CheckpointError
from duotone.ranks import Ranks
from duotone.torch.checkpoints.folder import is_sharded, read_folder, read_manifest
from duotone.torch.checkpoints.shard_files import read_folder as read_parts
from duotone.torch.checkpoints.well_formed import check_contents
from duotone.torch.kernels import SPLIT_DTYPES, decode

# of what `save_checkpoint` writes, all that is not read where several ranks have saved
_LEFT_OUT = ("optimizer", "scaler", "scheduler", "random", "random_of_other_ranks", "progress")


def saved_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Return FP32 masters by name, all other tensors of the model by name, and the first name of each tied one.

    Args:
        path: a checkpoint's folder, of any number of ranks.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    manifest = read_manifest(path)
    left_out = tuple(name for name in _LEFT_OUT if name in manifest)
    if is_sharded(manifest):
        contents = read_parts(path, Ranks(error=CheckpointError), lambda name, shape: None, left_out)
    else:
        contents = read_folder(path)
    check_contents(path, contents, left_out)
    model, tails = contents["model"], contents["tails"]
    buffers = contents.get("buffers")
    if buffers is None:
        # of an earlier version: what was trained is a weight, and of the rest nothing is known
        trained = {name for names in contents["optimizer_parameters"] or [] for name in names}
        buffers = model.keys() - tails.keys() - trained
    weights = {}
    for name in model.keys() - set(buffers):
        value, tail = model[name], tails.get(name)
        if value.dtype in (torch.float32, *SPLIT_DTYPES):
            weights[name] = value.float() if tail is None else decode(value, tail)
    # in the model's order
    masters = {name: weights[name] for name in model if name in weights}
    others = {name: value for name, value in model.items() if name not in weights}
    return masters, others, contents.get("tied", {})
