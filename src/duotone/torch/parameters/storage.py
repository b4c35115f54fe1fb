"""How a parameter is stored: one frozen record for each, found by `storage_of` and replaced by `set_storage`.

The record is one attribute of the tensor. It holds what stays the same from step to step; what a step changes, such as
moments and step counts, stands in the optimizer's state. A new fact about parameters is one new field: copies, pickles,
`fully_shard` and `data_parallel` take the record as it is.

Anybody may write `param.data = ...`. A tail belongs to a weight of one dtype and shape; `storage_of` lets go of it once
the weight has others, so that the new values are the master for whoever asks.
"""

import copy
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any

import torch
from torch import Tensor

from duotone.torch.kernels import SPLIT_DTYPES, Rounding

_ATTRIBUTE = "duotone_storage"
# on a tail: checksums of the weight that it belongs to (`edits`)
CHECKSUMS = "duotone_checksums"
# counts calls of `set_storage`, so that asking thousands of parameters for their records can be spared
_counter = count(1)
_changes: deque[int] = deque([0], maxlen=1)


@dataclass(frozen=True)
class Storage:
    """How one parameter is stored. Two records are equal if they are but for their tails.

    Attributes:
        param: dtype that the policy keeps the weight in; None if it was never cast. After `model.float()`, and inside
            of `full_precision`, the weight itself is in another one.
        grad: dtype that the gradient accumulates in; None if the parameter was never cast.
        reduce: dtype that ranks reduce the gradient in; None if the parameter was never cast.
        state: dtype of the optimizer's moments.
        rounding: how updates are rounded in a 16-bit weight without a master; None if it is to have a master.
        frozen: how the policy keeps a weight that does not train: "rounded", "float32", or "tail", which is what it
            keeps small tables in by default.
        tail: int16, shaped like the weight: the bits that it lacks to be its FP32 master; None if there are none.
        weight_dtype: dtype of the weight that `tail` was made for; None without a tail.
        weight_shape: shape of that weight, of a DTensor the whole; None without a tail.
        loss_scale: of the policy: "none", "dynamic" or a number; None if the parameter was never cast.
        name: the parameter's name in the model that was cast.
        order: how many parameters of that model come before it.
        ranks: the ranks that `data_parallel` keeps copies of the parameter on, as `distributed.agreement.SharedBy`.
            They are those of this process: copies and pickles have None.
        is_replaced: whether another parameter has taken this one's place in its model.
        in_full_precision: whether the weight is FP32 for the time of a `full_precision` block. Copies and pickles made
            there are on their own: it is false in theirs.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> set_storage(weight, storage_of(weight).changed(name="weight"))
    >>> storage_of(weight).name, storage_of(weight).state
    ('weight', torch.float32)
    """

    param: torch.dtype | None = None
    grad: torch.dtype | None = None
    reduce: torch.dtype | None = None
    state: torch.dtype = torch.float32
    rounding: Rounding | None = None
    frozen: str = "rounded"
    tail: Tensor | None = field(default=None, compare=False)
    weight_dtype: torch.dtype | None = None
    weight_shape: torch.Size | None = None
    loss_scale: float | str | None = None
    name: str | None = None
    order: int = 0
    ranks: Any = None
    is_replaced: bool = False
    in_full_precision: bool = False

    def without_tail(self) -> "Storage":
        """Return the record of the same parameter without a tail."""
        return self.changed(tail=None, weight_dtype=None, weight_shape=None)

    def changed(self, **values: Any) -> "Storage":
        """Return the record with other values in some fields: `dataclasses.replace` at a tenth of its calls."""
        changed = object.__new__(Storage)
        changed.__dict__.update(self.__dict__, **values)
        assert len(changed.__dict__) == len(self.__dict__), values
        return changed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Storage":
        # nothing of the rest can change
        if self.tail is None and self.ranks is None and not self.in_full_precision:
            return self
        return self.changed(tail=copy.deepcopy(self.tail, memo), ranks=None, in_full_precision=False)

    def __reduce__(self) -> Any:
        # plain values: a saved parameter loads with weights_only=True, where Duotone is not installed, and in a
        # version that knows more fields. `storage_of` makes them a record again.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rounding = None if self.rounding is None else self.rounding.value
        process_own = {"ranks": None, "in_full_precision": False}
        return OrderedDict, (list({**values, "rounding": rounding, **process_own}.items()),)


# the record of every parameter that has none of its own
NO_STORAGE = Storage()


def storage_of(param: Tensor) -> Storage:
    """Return how a parameter is stored; `NO_STORAGE` if nobody has set it.

    If the weight has another dtype or shape than the one that its tail was made for, it is its own master from now on:
    a 16-bit one gets a tail of zeros, any other none.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> set_tail(weight, torch.ones(2, dtype=torch.int16))
    >>> weight.data = torch.ones(3, dtype=torch.bfloat16)
    >>> storage_of(weight).tail
    tensor([0, 0, 0], dtype=torch.int16)
    """
    storage: Any = getattr(param, _ATTRIBUTE, NO_STORAGE)
    if type(storage) is not Storage:
        known = {field.name for field in fields(Storage)}
        values = {name: value for name, value in storage.items() if name in known}
        rounding = values.get("rounding")
        storage = Storage(**{**values, "rounding": None if rounding is None else Rounding(rounding)})
        setattr(param, _ATTRIBUTE, storage)
    if (
        storage.tail is not None
        # records of earlier versions do not know
        and storage.weight_dtype is not None
        and (storage.weight_dtype != param.dtype or storage.weight_shape != param.shape)
    ):
        is_split = param.dtype in SPLIT_DTYPES
        set_tail(param, torch.zeros_like(param, dtype=torch.int16, requires_grad=False) if is_split else None, storage)
        return getattr(param, _ATTRIBUTE)
    return storage


def set_storage(param: Tensor, storage: Storage) -> None:
    """Replace the record of how a parameter is stored."""
    _changes.append(next(_counter))
    setattr(param, _ATTRIBUTE, storage)


def set_tail(param: Tensor, tail: Tensor | None, storage: Storage | None = None) -> None:
    """Replace the tail in a parameter's record; it belongs to the weight as it is now.

    Args:
        param: a parameter.
        tail: int16, shaped like the weight, or None.
        storage: the rest of the record; None for the one that it has.
    """
    if tail is not None:
        vars(tail).pop(CHECKSUMS, None)
    dtype, shape = (None, None) if tail is None else (param.dtype, param.shape)
    storage = storage_of(param) if storage is None else storage
    set_storage(param, storage.changed(tail=tail, weight_dtype=dtype, weight_shape=shape))


def storage_changes() -> int:
    """Return a number that is another one once `set_storage` has been called for any parameter."""
    return _changes[-1]


def other_attributes(param: Tensor) -> dict[str, Any]:
    """Return what others than Duotone have set on a parameter, by name."""
    return {name: value for name, value in vars(param).items() if name != _ATTRIBUTE}
