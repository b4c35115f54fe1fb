"""A state dict in one file, written whole or not at all: safetensors or `torch.save`, as the file's suffix says.

safetensors holds no two names for one tensor. A tied one is written once, under its first name, and the metadata maps
every other name to that, as `safetensors.torch.save_model` does it; `safetensors.torch.load_model` ties them again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from duotone.durable_files import replacing
from duotone.errors import CheckpointError
from duotone.torch.checkpoints.folder import reason_of

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def check_suffix(path: Path) -> None:
    """Raise unless a file's suffix says how it is to be written.

    Raises:
        CheckpointError: it does not.

    >>> check_suffix(Path("net.onnx"))
    Traceback (most recent call last):
    ...
    duotone.errors.CheckpointError: net.onnx says by its suffix what it is to hold: .safetensors, .pt, .pth, ...
    """
    if path.suffix not in (SAFETENSORS, *PICKLES):
        allowed = ", ".join((SAFETENSORS, *PICKLES[:-1]))
        raise CheckpointError(
            f"{path} says by its suffix what it is to hold: {allowed} or {PICKLES[-1]}; name the file so"
        )


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict to a file; what was there before stays until the new one is on the disk.

    Args:
        path: with one of the suffixes; its folder exists.
        state: tensors on the CPU by name. Tied names have one and the same tensor. `torch.save` takes anything else
            beside.

    Raises:
        CheckpointError: it cannot be written, or holds what safetensors cannot.
    """
    check_suffix(path)
    try:
        with replacing(path) as partial:
            if path.suffix == SAFETENSORS:
                tensors, other_names = _once(state)
                save_file(tensors, partial, metadata={"format": "pt", **other_names})
            else:
                with partial.open("wb") as file:
                    torch.save(dict(state), file)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot write the weights to {path}: {reason_of(error)}") from error


def _once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, under its first name, and that first name for every other."""
    first_names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    other_names: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f'safetensors holds tensors alone, but "{name}" is a {type(value).__name__}; write a .pt file'
            )
        first = first_names.setdefault(id(value), name)
        if first == name:
            tensors[name] = value.contiguous()
        else:
            other_names[name] = first
    return tensors, other_names
