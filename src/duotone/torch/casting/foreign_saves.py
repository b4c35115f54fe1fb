"""Notices that a `save_pretrained`, Hugging Face's and others', is writing 16-bit weights without their masters.

A state dict is what torch says it is, and many are for inference in 16 bits. But `save_pretrained` is meant to keep a
model, and its config then says a 16-bit dtype, to which FP32 weights are rounded too when it is loaded. Who asks for a
state dict is seen by the functions that are under way.
"""

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from duotone.call_site import warn
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters.edits import read_tail
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of

_SAVES = "save_pretrained"
# how many functions lie between that and the parameters that it asks for
_DEPTH = 3
# packages whose save_pretrained may call another's
_BETWEEN = ("transformers", "peft", "diffusers", "huggingface_hub", "safetensors", "accelerate")


def say_if_saved_rounded(module: nn.Module, params: Iterable[Tensor]) -> nn.Module | None:
    """Warn if a `save_pretrained` is asking for a state dict in which parameters are without their masters.

    Args:
        module: a module of a cast model whose state dict is being made.
        params: its own parameters.

    Returns:
        The model that is being saved, if there was a warning.
    """
    frame = _saving_frame()
    if frame is None:
        return None
    dtype = next((param.dtype for param in params if _is_more_than_weight(param)), None)
    if dtype is None:
        return None
    first = next((frame.f_locals.get(name) for name in frame.f_code.co_varnames[:1]), None)
    model = first if isinstance(first, nn.Module) else module
    warn(
        f"save_pretrained writes the weights of this {type(model).__name__} rounded to "
        f"{str(dtype).removeprefix('torch.')}, without their FP32 masters, and a Hugging Face config names that dtype, "
        'to which loading rounds FP32 weights too; write "with duotone.torch.full_precision(model): '
        'model.save_pretrained(folder)", or duotone.torch.export(model, folder); said once for each model',
        _BETWEEN,
    )
    return model


def given_to_save(params: Iterator[nn.Parameter], frame: FrameType) -> Iterator[Any]:
    """Return a cast model's parameters as a `save_pretrained` is to see them that was given FP32 weights: as masters.

    transformers asks them for the dtype that it writes into the config, to which whoever loads the model rounds.

    Args:
        params: those of the model.
        frame: what has asked the model for them.
    """
    # a property, and a generator in it
    caller: FrameType | None = frame
    for _ in range(_DEPTH):
        if caller is None:
            return params
        if caller.f_code.co_name == _SAVES:
            given = caller.f_locals.get("state_dict")
            dtypes = {each.dtype for each in given.values() if isinstance(each, Tensor)} if given else set()
            in_float32 = torch.float32 in dtypes and dtypes.isdisjoint(SPLIT_DTYPES)
            return (read_master(each) if in_float32 and each.dtype in SPLIT_DTYPES else each for each in params)
        caller = caller.f_back
    return params


def _saving_frame() -> FrameType | None:
    """Return the innermost `save_pretrained` that is under way; None if there is none, or it was given the weights."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _SAVES:
            return None if _is_given_weights(frame) else frame
        frame = frame.f_back
    return None


def _is_given_weights(frame: FrameType) -> bool:
    values: Any = frame.f_locals
    # peft takes them among its other keywords
    others = values.get("kwargs")
    given = others.get("state_dict") if isinstance(others, dict) else None
    return given is not None or values.get("state_dict") is not None


def _is_more_than_weight(param: Tensor) -> bool:
    """Return whether a 16-bit weight has a master that it is not itself; waits for the device."""
    tail = storage_of(param).tail
    if param.dtype not in SPLIT_DTYPES or tail is None or tail.is_meta:
        return False
    part = read_tail(param)
    return part is not None and bool(part.any())
