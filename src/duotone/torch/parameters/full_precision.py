"""One parameter that is its FP32 master for a while, and encoded again afterwards, whatever was done to it.

The parameter stays the object that it is, and what is known by it: optimizer state, groups, ties. It exchanges all that
torch keeps beside the object, memory, gradient and hooks, with a parameter made for the time; so the 16-bit memory, the
gradient of before and the hooks of `DistributedDataParallel` are not touched, and come back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from duotone.call_site import warn
from duotone.errors import PolicyError
from duotone.torch.internals.tensors import exchange
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import beyond_range, read_master, store_master
from duotone.torch.parameters.storage import Storage, set_storage, storage_of


class Widened:
    """A parameter that is FP32 until it is narrowed.

    Args:
        param: a 16-bit parameter.

    Attributes:
        param: as above.
        storage: its record of before.
    """

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self.storage = storage_of(param)
        # has the 16-bit memory, the gradient and the hooks from here on
        self._before = nn.Parameter(read_master(param), requires_grad=param.requires_grad)
        exchange(param, self._before)
        set_storage(param, self.storage.without_tail().changed(in_full_precision=True))

    @property
    def largest_beyond_range(self) -> float | None:
        """The largest finite magnitude that the 16-bit weight could not hold; None if there is none."""
        return beyond_range(self._master(), self._before.dtype)

    def narrow(self) -> None:
        """Encode the parameter as it is now into its 16-bit weight and tail; of a DTensor, all ranks call this."""
        param, master, trains = self.param, self._master(), self.param.requires_grad
        exchange(param, self._before)
        if trains == param.requires_grad and self._is_as_before(master):
            # nothing is written: a backward pass that needs the weights may be still to come
            return
        if trains != param.requires_grad:
            param.requires_grad_(trains)
        if param.shape != master.shape:
            param.grad = None
        if param.shape != master.shape or param.device != master.device:
            grad, param.grad = param.grad, None
            param.data = torch.empty_like(master, dtype=param.dtype)
            param.grad = None if grad is None else grad.to(master.device)
        store_master(param, master, self.storage)

    def put_back(self) -> None:
        """Make the parameter what it was before, whatever it is now."""
        exchange(self.param, self._before)
        set_storage(self.param, self.storage)

    def when_late(self, hook: Callable[[Tensor], None]) -> None:
        """Have a hook called when a gradient comes to the FP32 weight of the block, after it was narrowed."""
        if self._before.requires_grad:
            self._before.register_hook(hook)

    def _is_as_before(self, master: Tensor) -> bool:
        """Return whether the 16-bit weight and its tail, which are back, decode to a master in every bit."""
        param = self.param
        if (param.shape, param.device) != (master.shape, master.device):
            return False
        if shards.is_shard(param) and self.storage.tail is None:
            # ranks may differ in that, and all of them decide on a tail
            return False
        set_storage(param, self.storage)
        before = shards.local(read_master(param)).contiguous()
        return torch.equal(before.view(torch.int32), shards.local(master).contiguous().view(torch.int32))

    def _master(self) -> Tensor:
        if self.param.dtype == torch.float32:
            return self.param.detach()
        return read_master(self.param)


def warn_of_late_gradients(widened: Sequence[Widened]) -> None:
    """Warn, once, if a loss that was computed with weights of a block goes backward after its end."""
    said: list[bool] = []

    def hook(grad: Tensor) -> None:
        if not said:
            said.append(True)
            warn(
                "a loss that was computed inside of a full_precision block went backward after it: the block's FP32 "
                "weights are gone, and their gradients with them; call backward inside, or compute the loss after the "
                "block to train on it"
            )

    for each in widened:
        each.when_late(hook)


def encode_new(param: nn.Parameter, storage: Storage) -> None:
    """Store a parameter that was put into a model as a record says; nothing of its FP32 master is lost.

    Args:
        param: in FP32, BF16 or FP16.
        storage: the record, whose tail is not looked at.
    """
    assert storage.param is not None
    grad, param.grad = param.grad, None
    master = read_master(param)
    if param.dtype != storage.param:
        param.data = torch.empty_like(master, dtype=storage.param)
    store_master(param, master, storage.without_tail())
    param.grad_dtype = storage.grad
    param.grad = None if grad is None else grad.to(storage.grad)


def check_ranges(widened: Sequence[Widened], new: Sequence[tuple[str, nn.Parameter, Storage]]) -> None:
    """Raise if a value would be lost in an FP16 weight, on any rank.

    Raises:
        PolicyError: one would.
    """
    beyond = [(each.storage.name or "?", each.largest_beyond_range) for each in widened]
    beyond += [(name, beyond_range(read_master(param), storage.param)) for name, param, storage in new]
    found = [(name, largest) for name, largest in beyond if largest is not None]
    cut = [each.param for each in widened if shards.is_shard(each.param)]
    elsewhere = bool(cut) and shards.any_rank(bool(found), cut[0])
    if found or elsewhere:
        name, largest = found[0] if found else ("a parameter", None)
        what = f'parameter "{name}" holds {largest:.6g}' if largest is not None else "a parameter on another rank is"
        raise PolicyError(
            f"{what}, beyond FP16's largest 65504, at the end of a full_precision block; the weights are what they "
            'were before the block: use policy "bf16", or keep the module in FP32 by a rule'
        )


def check_not_in_block(param: Tensor, verb: str) -> None:
    """Raise if a parameter is FP32 for the time of a `full_precision` block.

    Raises:
        PolicyError: it is.
    """
    if storage_of(param).in_full_precision:
        raise PolicyError(
            f"{verb} was called inside of a full_precision block, where weights are FP32 for that time alone; "
            "leave the block first"
        )
