"""The FP32 master of a parameter: its resident 16-bit weight and the tail in its record, read and written together.

The cast puts a tail into a parameter's record; an optimizer's state then names the same tensor, so nothing is stored
twice and neither can go stale. A parameter without a tail is its own master: FP32, or frozen, or 16-bit under a policy
without masters. Of a DTensor, each rank has the tail of its own part, as a DTensor cut alike.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from duotone.errors import OptimizerError, nearest_names
from duotone.torch.internals.autograd import increment_version
from duotone.torch.internals.training import is_flattened
from duotone.torch.kernels import SPLIT_DTYPES, Edits, decode, encode
from duotone.torch.parameters import shards
from duotone.torch.parameters.edits import read_tails, record
from duotone.torch.parameters.foreign_writes import say_if_written
from duotone.torch.parameters.storage import NO_STORAGE, Storage, set_tail, storage_of

# the smallest magnitude that rounds to Inf in FP16
_FP16_OVERFLOW = 65520.0


def check_in_place(param: Tensor) -> None:
    """Raise if updates of a parameter would not reach its model.

    Raises:
        OptimizerError: another parameter has taken its place in its model, or its model is in a `full_precision` block.
    """
    storage = storage_of(param)
    if storage.in_full_precision:
        raise OptimizerError(
            "the weights of this optimizer are FP32 inside of a full_precision block, which is for reading and editing "
            "them; leave the block, then step"
        )
    if storage.is_replaced:
        raise OptimizerError(
            "the optimizer was built from parameters that fully_shard has replaced since, so it would update nothing; "
            "build it after fully_shard, from the model's parameters"
        )


def check_not_flattened(param: Tensor) -> None:
    """Raise if a parameter is a piece of what torch's first FSDP has flattened.

    Raises:
        OptimizerError: it is: its tail is lost, and no other rank can be asked for the norm of the whole.
    """
    if is_flattened(param):
        raise OptimizerError(
            "the parameters were flattened by FullyShardedDataParallel, which cuts them without their masters and does "
            "not tell what was cut; shard a cast model with duotone.torch.fully_shard instead"
        )


def needs_tail(param: Tensor) -> bool:
    """Return whether a parameter must have a tail before it is updated: it is 16-bit, and has a master."""
    return param.dtype in SPLIT_DTYPES and storage_of(param).rounding is None


def keeps_tail(param: Tensor) -> bool:
    """Return whether a parameter is to have a tail even if nobody updates it now."""
    return needs_tail(param) and (param.requires_grad or storage_of(param).frozen == "tail")


def ensure_tail(param: Tensor, tail: Tensor | None = None) -> Tensor:
    """Return the tail of a parameter that needs one, on its device.

    It is the one in the parameter's record, else the given one if the record knows of no cast, else zeros: the weight
    is its own master so far.

    Raises:
        OptimizerError: a DTensor was made from a parameter without taking its tail along.
    """
    storage = storage_of(param)
    if storage.tail is not None or storage.param is not None:
        # of a cast parameter the record knows best: an optimizer may hold the tail of a weight that was there before
        tail = storage.tail
    if tail is None:
        check_not_lost(param)
    # a tail without memory belongs to a weight that had none either
    if tail is None or (tail.is_meta and not param.is_meta):
        tail = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    tail = tail.to(param.device)
    if tail is not storage.tail:
        set_tail(param, tail)
    return tail


def has_lost_tail(param: Tensor) -> bool:
    """Return whether a 16-bit DTensor was made from a parameter without its record."""
    return param.dtype in SPLIT_DTYPES and shards.is_shard(param) and storage_of(param) == NO_STORAGE


def check_not_lost(param: Tensor) -> None:
    """Raise if a parameter has lost its tail.

    Raises:
        OptimizerError: a DTensor was made from it without its record.
    """
    if has_lost_tail(param):
        raise OptimizerError(
            f"a sharded parameter in {param.dtype}, of shape {tuple(param.shape)}, has lost its tail, and with it the "
            "lower bits of its FP32 master; shard a cast model with duotone.torch.fully_shard instead of torch's, and "
            "move it to its device before"
        )


def read_master(param: Tensor) -> Tensor:
    """Return a parameter's FP32 master as a new tensor of the parameter's shape; of a DTensor, cut as it is.

    Where others have changed the weight since Duotone wrote it, that is its master (`edits`).

    >>> param = nn.Parameter(torch.tensor([0.0], dtype=torch.bfloat16))
    >>> tail = ensure_tail(param)
    >>> write_master(param, torch.tensor([0.1]))
    >>> param.item(), read_master(param).item()
    (0.10009765625, 0.10000000149011612)
    """
    return read_masters((param,))[0]


def read_masters(
    params: Collection[Tensor], edits: Callable[[torch.device], Edits | None] | None = None
) -> list[Tensor]:
    """Return the FP32 master of each of some parameters, as `read_master` does.

    Args:
        params: the parameters.
        edits: returns where to note, on a device, that others have changed weights.
    """
    with torch.no_grad():
        return [_joined(param, tail) for param, tail in zip(params, read_tails(params, edits), strict=True)]


def _joined(param: Tensor, tail: Tensor | None) -> Tensor:
    weight = shards.local(param.detach())
    if tail is None:
        return shards.like(weight.to(torch.float32, copy=True), param)
    return shards.like(decode(weight, tail.to(weight.device)), param)


def write_master(param: Tensor, master: Tensor) -> None:
    """Set a parameter's FP32 master in place: the nearest resident weight, and the tail where there is one.

    Args:
        param: a parameter in FP32, BF16 or FP16.
        master: FP32, the parameter's shape, any device. For a DTensor: one that is cut alike, or the whole.
    """
    with torch.no_grad():
        tail = storage_of(param).tail
        resident, master = shards.local(param), shards.local(shards.cut(master, param))
        if tail is None:
            resident.copy_(master)
        else:
            weight, new_tail = encode(master.to(resident.device, torch.float32), param.dtype)
            resident.copy_(weight)
            shards.local(tail).copy_(new_tail)
            record(param)
        if resident is not param:
            increment_version(param)


def store_master(param: Tensor, master: Tensor, storage: Storage) -> None:
    """Set a parameter's record, and its FP32 master in place, with a tail where one is needed to keep that master.

    A 16-bit weight gets a tail, or keeps the one in the record, if its policy gives it a master and it is trained; a
    frozen one that has none gets one only if it would lose bits without. Of a DTensor, all ranks call this.

    Args:
        param: a parameter.
        master: as `write_master` takes it.
        storage: the record, with the tail to write to, if there is one.
    """
    tail = storage.tail
    with torch.no_grad():
        resident, part = shards.local(param), shards.local(shards.cut(master, param))
        part = part.to(resident.device)
        if param.dtype not in SPLIT_DTYPES or storage.rounding is not None:
            tail = None
            resident.copy_(part)
        else:
            weight, new_tail = encode(part.to(torch.float32), param.dtype)
            resident.copy_(weight)
            if tail is not None and tail.shape == param.shape and tail.device == param.device:
                shards.local(tail).copy_(new_tail)
            elif tail is not None or keeps_tail(param) or shards.any_rank(bool(new_tail.any()), param):
                tail = shards.like(new_tail, param)
        if resident is not param:
            increment_version(param)
    set_tail(param, tail, storage)
    record(param)


def beyond_range(master: Tensor, dtype: torch.dtype | None) -> float | None:
    """Return the largest finite magnitude in `master` if it would become Inf as a weight in `dtype`, else None.

    Only FP16 counts: a BF16 weight that rounds to Inf still has its master. Of a DTensor, this rank's part is read.

    >>> beyond_range(torch.tensor([1.0, -70000.0]), torch.float16)
    70000.0
    """
    master = shards.local(master)
    if dtype != torch.float16 or master.is_meta or master.numel() == 0:
        return None
    largest = master.abs().nan_to_num(nan=0.0, posinf=0.0).amax().item()
    return largest if largest >= _FP16_OVERFLOW else None


def master_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Return the FP32 masters of all floating-point parameters by name, as new tensors.

    Args:
        model: a model, cast or not.
        optimizer: the model's optimizer, if there is one. It is only checked: that its tails are the model's own.

    Returns:
        Name to FP32 tensor, in the order of `model.state_dict()`. A tied parameter is there under each of its names, as
        in a state dict, each time as a tensor of its own; so `{**model.state_dict(), **master_weights(model)}` is the
        FP32 state dict. A 16-bit parameter without a tail (frozen, or without a master) gives its own value. A DTensor
        gives one that is cut as it is: each rank its part, and `.full_tensor()`, called by all ranks, the whole.

    Raises:
        OptimizerError: the optimizer holds the tails of another model, a deep copy for instance, or a parameter has
            lost its tail to torch's `fully_shard`.

    >>> import duotone.torch as dt
    >>> model = nn.Linear(2, 1, bias=False)
    >>> before = model.weight.detach().clone()
    >>> masters = master_weights(dt.cast(model, "bf16"))
    >>> torch.equal(masters["weight"], before)
    True
    """
    shards.reshard(model)
    say_if_written(model.parameters())
    masters = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not param.is_floating_point():
            continue
        tail = optimizer.state.get(param, {}).get("tail") if optimizer is not None else None
        recorded = storage_of(param).tail
        if tail is None:
            check_not_lost(param)
        # one that the optimizer holds of a weight that is no longer 16-bit goes at its next step
        elif tail is not recorded and (recorded is not None or param.dtype in SPLIT_DTYPES):
            raise OptimizerError(
                f'the optimizer holds a tail for "{name}" that is not the model\'s; '
                "build the optimizer from this model's parameters"
            )
        masters[name] = read_master(param)
    return masters


def load_master_weights(model: nn.Module, masters: Mapping[str, Tensor]) -> None:
    """Write FP32 masters into a model, and buffers if there are some: the inverse of `master_weights`.

    A 16-bit weight gets its tail and loses nothing; one without a tail (frozen, or without a master) is rounded to
    nearest. NaN, Inf and -0 are kept.

    Args:
        model: a model, cast or not; its optimizer follows, moments stay as they are.
        masters: name to tensor for every floating-point parameter, in FP32, BF16 or FP16, on any device. A tied one may
            be there under one of its names or several: then as the same values, or rounded from those in FP32. For a
            DTensor either one that is cut alike, or, the same on every rank, the whole. Buffers and parameters of
            other dtypes may be there too, as in an FP32 state dict of the model; those that are not stay as they are.

    Raises:
        OptimizerError: a name is missing or unknown, a tensor has another shape or is in none of those dtypes or is cut
            otherwise, the names of a tied parameter have different values, or a value is too large for a weight in
            FP16. Nothing is written then, on this rank.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1, bias=False), "bf16")
    >>> load_master_weights(model, {"weight": torch.tensor([[0.1, 0.2]])})
    >>> model.weight.tolist(), dt.master_weights(model)["weight"]
    ([[0.10009765625, 0.2001953125]], tensor([[0.1000, 0.2000]]))
    """
    shards.reshard(model)
    names: dict[Tensor, list[str]] = {}
    others: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.is_floating_point():
            names.setdefault(param, []).append(name)
        else:
            others[name] = param
    known = [name for each in names.values() for name in each]
    for name in masters:
        if name not in known and name not in others:
            raise OptimizerError(f'there is no floating-point parameter "{name}"; {nearest_names(name, known)}')
    chosen = {param: _given(each, masters) for param, each in names.items()}
    for param, name in chosen.items():
        _check_master(name, masters[name], param)
    others = {name: tensor for name, tensor in others.items() if name in masters}
    for name, tensor in others.items():
        _check_other(name, masters[name], tensor)
    for param, name in chosen.items():
        if keeps_tail(param):
            ensure_tail(param)
        write_master(param, masters[name])
    with torch.no_grad():
        for name, tensor in others.items():
            shards.local(tensor).copy_(shards.local(shards.cut(masters[name], tensor)))


def _given(names: list[str], masters: Mapping[str, Tensor]) -> str:
    """Return under which of a parameter's names its master is given: one in FP32, if there are several."""
    given = [name for name in names if name in masters]
    if not given:
        raise OptimizerError(f'the master of "{names[0]}" is missing; give all of them, as master_weights returns them')
    best = next((name for name in given if masters[name].dtype == torch.float32), given[0])
    for name in given:
        if not _is_rounded_from(masters[best], masters[name]):
            raise OptimizerError(
                f'"{best}" and "{name}" are one tied parameter, but are given different values; give the value under '
                "one of the names, or under both"
            )
    return best


def _is_rounded_from(master: Tensor, other: Tensor) -> bool:
    """Return whether a tensor is another one, rounded to nearest if it has fewer bits; shapes are looked at later."""
    if master is other or master.shape != other.shape or shards.is_shard(master) != shards.is_shard(other):
        return True
    master, other = shards.local(master), shards.local(other)
    if master.dtype == torch.float32 and other.dtype in SPLIT_DTYPES:
        master = encode(master, other.dtype)[0]
    master = master.to(other.device)
    return bool(((master == other) | (master.isnan() & other.isnan())).all())


def _check_other(name: str, given: Tensor, own: Tensor) -> None:
    both_float = given.is_floating_point() and own.is_floating_point()
    if given.shape != own.shape or not (both_float or given.dtype == own.dtype):
        raise OptimizerError(
            f'the buffer or parameter "{name}" is {given.dtype} {tuple(given.shape)}; allowed is {own.dtype} '
            f"{tuple(own.shape)}: give what the same model's state_dict returned"
        )


def _check_master(name: str, master: Tensor, param: Tensor) -> None:
    if master.shape != param.shape or master.dtype not in (torch.float32, *SPLIT_DTYPES):
        raise OptimizerError(
            f'the master of "{name}" is {master.dtype} {tuple(master.shape)}; allowed is torch.float32 '
            f"{tuple(param.shape)}: give what master_weights of the same model returned"
        )
    if not shards.is_cut_like(master, param):
        raise OptimizerError(
            f'the master of "{name}" is {shards.cut_of(master)}, its parameter {shards.cut_of(param)}; give what '
            "master_weights of the same model on the same ranks returned, or whole tensors (full_tensor())"
        )
    largest = beyond_range(master, param.dtype)
    if largest is not None:
        raise OptimizerError(
            f'the master of "{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; use policy "bf16", or keep its '
            "module in FP32 by a rule: param=float32,compute=float32"
        )
