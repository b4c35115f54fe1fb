"""Where the bytes of a model in training are, by role."""

import torch
from torch import Tensor, nn

from duotone.torch.averaging.average import Average
from duotone.torch.internals.tensors import wrapped_in
from duotone.torch.optim.slots import TAIL, is_moment
from duotone.torch.parameters.shards import local, reshard
from duotone.torch.parameters.storage import storage_of
from duotone.wording.memory import Memory


def memory(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, average: Average | None = None) -> Memory:
    """Count the bytes of weights, tails, gradients, optimizer state and average; exact, since it adds up tensors.

    A tensor that wraps others, such as a quantized one, counts as those do, whatever dtype it passes for; what several
    of them share counts once.

    Gradients are counted as they are after a backward pass, whether they are there now or not; moments exist from
    the optimizer's first step on. What `fully_shard` has gathered for a forward pass is freed, and not counted.

    Args:
        model: a model, cast or not; tied parameters count once.
        optimizer: its optimizer, Duotone's, torch's or another's.
        average: an average of its weights.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(8, 8), "bf16")
    >>> optimizer = dt.AdamW(model.parameters())
    >>> model(torch.ones(1, 8)).sum().backward()
    >>> optimizer.step()
    >>> memory(model, optimizer).bytes_per_parameter
    14.0
    >>> memory(model, optimizer, dt.Average(model)).bytes_per_parameter
    18.0
    """
    reshard(model)
    counted = dict.fromkeys(("weights", "tails", "gradients", "moments", "other"), 0)
    seen: dict[int, Tensor] = {}
    parameters = 0
    for param in model.parameters():
        tail = storage_of(param).tail
        if not param.requires_grad:
            counted["other"] += _size(param, seen) + (0 if tail is None else _size(tail, seen))
            continue
        parameters += local(param).numel()
        counted["weights"] += _size(param, seen)
        counted["gradients"] += _size(param.grad, seen) if param.grad is not None else _gradient_size(param)
        counted["tails"] += 0 if tail is None else _size(tail, seen)
        for name, value in (optimizer.state.get(param, {}) if optimizer else {}).items():
            if not isinstance(value, Tensor) or name == TAIL.name:
                continue
            counted["moments" if is_moment(optimizer, name, value, param) else "other"] += _size(value, seen)
    counted["other"] += sum(_size(buffer, seen) for buffer in model.buffers())
    averages = 0 if average is None else average.size_bytes
    by_role = {f"{role}_bytes": size for role, size in counted.items()}
    return Memory(parameters=parameters, **by_role, averages_bytes=averages)


def _size(tensor: Tensor, seen: dict[int, Tensor]) -> int:
    """Return the bytes of a tensor; those of wrapped tensors, noted in `seen` by identity, only the first time."""
    tensor = local(tensor)
    parts = wrapped_in(tensor)
    if parts is None:
        return tensor.numel() * tensor.element_size()
    size = 0
    for inner in parts:
        if id(inner) not in seen:
            # held, so that nothing else gets its identity
            seen[id(inner)] = inner
            size += _size(inner, seen)
    return size


def _gradient_size(param: Tensor) -> int:
    return local(param).numel() * (param.grad_dtype or param.dtype).itemsize
