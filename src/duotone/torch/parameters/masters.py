"""The FP32 master of a parameter: its resident 16-bit weight and the tail in its record, read and written together.

The cast puts a tail into a parameter's record; an optimizer's state then names the same tensor, so nothing is stored
twice and neither can go stale. A parameter without a tail is its own master: FP32, or frozen, or 16-bit under a policy
without masters. Of a DTensor, each rank has the tail of its own part, as a DTensor cut alike.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from duotone.errors import OptimizerError, nearest_names
from duotone.torch.internals.autograd import increment_version
from duotone.torch.internals.training import is_flattened
from duotone.torch.kernels import SPLIT_DTYPES, decode, encode
from duotone.torch.parameters import shards
from duotone.torch.parameters.storage import NO_STORAGE, set_tail, storage_of

# the smallest magnitude that rounds to Inf in FP16
_FP16_OVERFLOW = 65520.0


def check_in_place(param: Tensor) -> None:
    """Raise if another parameter has taken this one's place in its model.

    Raises:
        OptimizerError: it has, so that updates of this one would reach no model.
    """
    if storage_of(param).is_replaced:
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


def ensure_tail(param: Tensor, tail: Tensor | None = None) -> Tensor:
    """Return the tail of a parameter that needs one, on its device.

    It is the one in the parameter's record, else the given one, else zeros: the weight is its own master so far.

    Raises:
        OptimizerError: a DTensor was made from a parameter without taking its tail along.
    """
    recorded = storage_of(param).tail
    tail = tail if recorded is None else recorded
    if tail is None:
        _check_not_lost(param)
    # a tail without memory belongs to a weight that had none either
    if tail is None or (tail.is_meta and not param.is_meta):
        tail = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    tail = tail.to(param.device)
    set_tail(param, tail)
    return tail


def has_lost_tail(param: Tensor) -> bool:
    """Return whether a 16-bit DTensor was made from a parameter without its record."""
    return param.dtype in SPLIT_DTYPES and shards.is_shard(param) and storage_of(param) == NO_STORAGE


def _check_not_lost(param: Tensor) -> None:
    if has_lost_tail(param):
        raise OptimizerError(
            f"a sharded parameter in {param.dtype}, of shape {tuple(param.shape)}, has lost its tail, and with it the "
            "lower bits of its FP32 master; shard a cast model with duotone.torch.fully_shard instead of torch's, and "
            "move it to its device before"
        )


def read_master(param: Tensor) -> Tensor:
    """Return a parameter's FP32 master as a new tensor of the parameter's shape; of a DTensor, cut as it is.

    >>> param = nn.Parameter(torch.tensor([0.0], dtype=torch.bfloat16))
    >>> tail = ensure_tail(param)
    >>> write_master(param, torch.tensor([0.1]))
    >>> param.item(), read_master(param).item()
    (0.10009765625, 0.10000000149011612)
    """
    with torch.no_grad():
        tail = storage_of(param).tail
        weight = shards.local(param.detach())
        if tail is None:
            return shards.like(weight.to(torch.float32, copy=True), param)
        return shards.like(decode(weight, shards.local(tail).to(weight.device)), param)


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
        if resident is not param:
            increment_version(param)


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
        Name to FP32 tensor, in the order of `model.named_parameters()`; tied parameters once. A 16-bit parameter
        without a tail (frozen, or without a master) gives its own value. A DTensor gives one that is cut as it is:
        each rank its part, and `.full_tensor()`, called by all ranks, the whole.

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
    masters = {}
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            continue
        tail = optimizer.state.get(param, {}).get("tail") if optimizer is not None else None
        if tail is None:
            _check_not_lost(param)
        elif tail is not storage_of(param).tail:
            raise OptimizerError(
                f'the optimizer holds a tail for "{name}" that is not the model\'s; '
                "build the optimizer from this model's parameters"
            )
        masters[name] = read_master(param)
    return masters


def load_master_weights(model: nn.Module, masters: Mapping[str, Tensor]) -> None:
    """Write FP32 masters into a model: the inverse of `master_weights`.

    A 16-bit weight gets its tail and loses nothing; one without a tail (frozen, or without a master) is rounded to
    nearest. NaN, Inf and -0 are kept.

    Args:
        model: a model, cast or not; its optimizer follows, moments stay as they are.
        masters: name to tensor for every floating-point parameter, tied ones once; in FP32, BF16 or FP16, any device.
            For a DTensor either one that is cut alike, or, the same on every rank, the whole.

    Raises:
        OptimizerError: a name is missing or unknown, a tensor has another shape or is in none of those dtypes or is cut
            otherwise, or a value is too large for a weight in FP16. Nothing is written then, on this rank.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1, bias=False), "bf16")
    >>> load_master_weights(model, {"weight": torch.tensor([[0.1, 0.2]])})
    >>> model.weight.tolist(), dt.master_weights(model)["weight"]
    ([[0.10009765625, 0.2001953125]], tensor([[0.1000, 0.2000]]))
    """
    shards.reshard(model)
    params = {name: param for name, param in model.named_parameters() if param.is_floating_point()}
    for name in masters:
        if name not in params:
            raise OptimizerError(f'there is no floating-point parameter "{name}"; {nearest_names(name, params)}')
    for name, param in params.items():
        if name not in masters:
            raise OptimizerError(f'the master of "{name}" is missing; give all of them, as master_weights returns them')
        _check_master(name, masters[name], param)
    for name, param in params.items():
        if needs_tail(param) and param.requires_grad:
            ensure_tail(param)
        write_master(param, masters[name])


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
