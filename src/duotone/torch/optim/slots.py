"""The slots of a parameter's state: those that an optimizer of ours declares, and guesses for a foreign one.

Whoever makes, checks, counts, cuts or converts states asks here, and looks at shapes only where nothing is declared.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.torch.kernels.slots import INT64, STATE_FORMATS, Slot, StateFormat
from duotone.torch.parameters.storage import storage_of

# what is kept because of the policy, beside what an optimizer's update needs: the bits that a weight lacks to be its
# master, and how often a weight without a master was rounded stochastically
TAIL = Slot("tail", StateFormat(torch.int16))
ROUNDING_STEP = Slot("rounding_step", INT64, shape=())
OF_POLICY = (TAIL.name, ROUNDING_STEP.name)


def slot_of(optimizer: torch.optim.Optimizer | None, name: str) -> Slot | None:
    """Return the slot that a tensor of a parameter's state is in, or is the scales of; None if none is declared.

    >>> import duotone.torch as dt
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> slot_of(dt.AdamW([weight]), "beta_products").shape, slot_of(torch.optim.AdamW([weight]), "exp_avg")
    ((2,), None)
    """
    for slot in getattr(optimizer, "slots", ()):
        if name in (slot.name, slot.scales_name):
            return slot
    return None


def is_moment(optimizer: torch.optim.Optimizer | None, name: str, value: Tensor, param: Tensor) -> bool:
    """Return whether a tensor of a parameter's state is kept for each weight: a moment, the scales of one, or a tail.

    Of a foreign optimizer that is what has the parameter's shape, the step count apart.
    """
    slot = slot_of(optimizer, name)
    return not slot.is_counter if slot is not None else name != "step" and value.shape == param.shape


def is_cut(optimizer: torch.optim.Optimizer | None, name: str, shape: torch.Size, param: Tensor) -> bool:
    """Return whether a tensor of a parameter's state is cut over ranks as the parameter is; scales are not.

    Args:
        optimizer: the parameter's; of a foreign one that is what has the parameter's shape, the step count apart.
        name: of the tensor.
        shape: of the whole tensor.
        param: the parameter.
    """
    slot = slot_of(optimizer, name)
    may_be = name != "step" if slot is None else not slot.is_counter and name == slot.name
    return may_be and shape == param.shape


def follows_policy(optimizer: torch.optim.Optimizer, name: str) -> bool:
    """Return whether the policy says in which format a tensor of a parameter's state is; never of a foreign one's."""
    slot = slot_of(optimizer, name)
    return slot is not None and slot.follows_policy and name == slot.name


def expected(slots: Iterable[Slot], param: Tensor) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return dtype and shape of each tensor of a parameter's state, by name."""
    state = _state_format(param)
    return {name: layout for slot in slots for name, layout in slot.tensors(param.shape, state).items()}


def new_state(slots: Iterable[Slot], param: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a parameter's state before its first update; moments lie, and are cut, as it is."""
    state = _state_format(param)
    made = {}
    for slot in slots:
        for name, (dtype, shape) in slot.tensors(param.shape, state).items():
            if name == slot.name and not slot.is_counter:
                made[name] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            else:
                # filled on the device: a copy from the host would wait for it
                made[name] = torch.zeros(shape, dtype=dtype, device=param.device)
            if name == slot.name and slot.start:
                made[name].fill_(slot.start)
    return made


def stored(state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dtype and shape of each tensor of a state, by name, to compare with `expected`."""
    return {name: (getattr(tensor, "dtype", None), getattr(tensor, "shape", None)) for name, tensor in state.items()}


def _state_format(param: Tensor) -> StateFormat:
    by_dtype = {each.dtype: each for each in STATE_FORMATS.values()}
    return by_dtype[storage_of(param).state]
