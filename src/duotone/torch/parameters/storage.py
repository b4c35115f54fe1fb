"""How a parameter is stored: one frozen record for each, found by `storage_of` and replaced by `set_storage`.

The record is one attribute of the tensor. It holds what stays the same from step to step; what a step changes, such as
moments and step counts, stands in the optimizer's state. A new fact about parameters is one new field: copies, pickles,
`fully_shard` and `data_parallel` take the record as it is.
"""

import copy
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from duotone.torch.kernels import Rounding

_ATTRIBUTE = "duotone_storage"
# counts calls of `set_storage`, so that asking thousands of parameters for their records can be spared
_counter = count(1)
_changes: deque[int] = deque([0], maxlen=1)


@dataclass(frozen=True)
class Storage:
    """How one parameter is stored. Two records are equal if they are but for their tails.

    Attributes:
        param: dtype of the resident weight; None if it was never cast.
        grad: dtype that the gradient accumulates in; None if the parameter was never cast.
        reduce: dtype that ranks reduce the gradient in; None if the parameter was never cast.
        state: dtype of the optimizer's moments.
        rounding: how updates are rounded in a 16-bit weight without a master; None if it is to have a master.
        tail: int16, shaped like the weight: the bits that it lacks to be its FP32 master; None if there are none.
        weight_dtype: dtype of the weight that `tail` was made for; None without a tail.
        weight_shape: shape of that weight, of a DTensor the whole; None without a tail.
        name: the parameter's name in the model that was cast.
        order: how many parameters of that model come before it.
        ranks: the ranks that `data_parallel` keeps copies of the parameter on, as `distributed.agreement.SharedBy`.
            They are those of this process: copies and pickles have None.
        is_replaced: whether another parameter has taken this one's place in its model.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> set_storage(weight, replace(storage_of(weight), name="weight"))
    >>> storage_of(weight).name, storage_of(weight).state
    ('weight', torch.float32)
    """

    param: torch.dtype | None = None
    grad: torch.dtype | None = None
    reduce: torch.dtype | None = None
    state: torch.dtype = torch.float32
    rounding: Rounding | None = None
    tail: Tensor | None = field(default=None, compare=False)
    weight_dtype: torch.dtype | None = None
    weight_shape: torch.Size | None = None
    name: str | None = None
    order: int = 0
    ranks: Any = None
    is_replaced: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Storage":
        # nothing of the rest can change
        if self.tail is None and self.ranks is None:
            return self
        return replace(self, tail=copy.deepcopy(self.tail, memo), ranks=None)

    def __reduce__(self) -> Any:
        # plain values: a saved parameter loads with weights_only=True, where Duotone is not installed, and in a
        # version that knows more fields. `storage_of` makes them a record again.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rounding = None if self.rounding is None else self.rounding.value
        return OrderedDict, (list({**values, "rounding": rounding, "ranks": None}.items()),)


# the record of every parameter that has none of its own
NO_STORAGE = Storage()


def storage_of(param: Tensor) -> Storage:
    """Return how a parameter is stored; `NO_STORAGE` if nobody has set it."""
    storage = getattr(param, _ATTRIBUTE, NO_STORAGE)
    if not isinstance(storage, Storage):
        known = {field.name for field in fields(Storage)}
        values = {name: value for name, value in storage.items() if name in known}
        rounding = values.get("rounding")
        storage = Storage(**{**values, "rounding": None if rounding is None else Rounding(rounding)})
        setattr(param, _ATTRIBUTE, storage)
    return storage


def set_storage(param: Tensor, storage: Storage) -> None:
    """Replace the record of how a parameter is stored."""
    _changes.append(next(_counter))
    setattr(param, _ATTRIBUTE, storage)


def set_tail(param: Tensor, tail: Tensor | None) -> None:
    """Replace the tail in a parameter's record; it belongs to the weight as it is now."""
    dtype, shape = (None, None) if tail is None else (param.dtype, param.shape)
    set_storage(param, replace(storage_of(param), tail=tail, weight_dtype=dtype, weight_shape=shape))


def storage_changes() -> int:
    """Return a number that is another one once `set_storage` has been called for any parameter."""
    return _changes[-1]


def other_attributes(param: Tensor) -> dict[str, Any]:
    """Return what others than Duotone have set on a parameter, by name."""
    return {name: value for name, value in vars(param).items() if name != _ATTRIBUTE}
