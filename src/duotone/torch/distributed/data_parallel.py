"""torch's `DistributedDataParallel` for a cast model: 16-bit gradients are averaged in the policy's `reduce`.

    gradient = round(sum over ranks of widened gradients / ranks)

A bucket is widened, summed, divided, and rounded once to its own dtype; so scaled FP16 gradients neither overflow in
the sum nor underflow in the quotient. Nothing is ever reduced in fewer bits than it has. Left out: gradients in another
dtype than their weights, for which torch's buckets have no place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from duotone.errors import PolicyError
from duotone.torch.casting.cast_forward import check_module
from duotone.torch.distributed.agreement import set_ranks
from duotone.torch.distributed.fitness import CAST_DTYPES, check_cast, check_one_dtype
from duotone.torch.parameters.edits import follow, record
from duotone.torch.parameters.shards import is_shard
from duotone.torch.parameters.storage import storage_of

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module, process_group: Any = None, **ddp_arguments: Any) -> "DistributedDataParallel":
    """Wrap a cast model in torch's `DistributedDataParallel`, with gradients averaged in the policy's `reduce`.

    Call it after `cast` and before the optimizer is built. Rank 0's weights and masters become those of all ranks,
    unless `init_sync=False`. Where no gradient is narrower than `reduce`, torch's own reduction is left as it is.

    Args:
        model: a cast model.
        process_group: the ranks; None for all.
        ddp_arguments: what else torch's class takes: `find_unused_parameters`, `static_graph` and so on.

    Returns:
        The wrapper; the model is its `module`.

    Raises:
        PolicyError: a parameter was never cast or is sharded, its gradient is to be in another dtype than itself, or
            rules give parts another `reduce`; DDP's own `mixed_precision` is given.

    >>> import duotone.torch as dt
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = data_parallel(dt.cast(nn.Linear(2, 1), "bf16"))
    >>> optimizer = dt.AdamW(model.parameters())
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> model.module.weight.grad.dtype
    torch.bfloat16
    >>> dist.destroy_process_group()

    >>> data_parallel(nn.Linear(2, 1))
    Traceback (most recent call last):
    ...
    duotone.errors.PolicyError: parameter "weight" was never cast; call duotone.torch.cast(model, policy) ...
    """
    from torch.nn.parallel import DistributedDataParallel

    check_module(model, "wrap")
    if ddp_arguments.get("mixed_precision") is not None:
        raise PolicyError(
            "mixed_precision of DistributedDataParallel casts weights in every pass; a cast model's are cast already: "
            "leave it out, and choose the policy's reduce"
        )
    wanted = _reduce_dtype(model)
    wrapped = DistributedDataParallel(model, process_group=process_group, **ddp_arguments)
    group = wrapped.process_group
    trained = [param for param in model.parameters() if param.requires_grad]
    if any(_wider(param.dtype, wanted) != param.dtype for param in trained):
        wrapped.register_comm_hook(None, _averaging(group, wanted))
    if ddp_arguments.get("init_sync", True):
        _send_tails(model, group)
    for param in model.parameters():
        set_ranks(param, group, wrapped)
    return wrapped


def _averaging(group: Any, reduce: torch.dtype) -> Callable[..., torch.futures.Future[Tensor]]:
    """Return what averages a bucket of gradients over the ranks: it returns a future of it, in its own dtype."""
    size = dist.get_world_size(group)

    # torch refuses a hook whose bucket is said to be anything else
    def average(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[reportPrivateImportUsage]
        own = bucket.buffer()
        wide = own.to(_wider(own.dtype, reduce))

        def rounded(_: Any) -> Tensor:
            wide.div_(size)
            return wide if wide is own else own.copy_(wide)

        work: Any = dist.all_reduce(wide, group=group, async_op=True)
        return work.get_future().then(rounded)

    return average


def _wider(dtype: torch.dtype, reduce: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, reduce) if dtype in CAST_DTYPES else dtype


def _reduce_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model's policy reduces in, once all its parameters are checked."""
    names: dict[torch.dtype, str] = {}
    for name, param in model.named_parameters():
        reduce = storage_of(param).reduce
        if is_shard(param):
            raise PolicyError(f'parameter "{name}" is sharded already; use fully_shard or data_parallel, not both')
        check_cast(name, param, "data_parallel")
        check_one_dtype(name, param, "DistributedDataParallel", "leave grad= out of the policy")
        if reduce is not None and param.requires_grad:
            names.setdefault(reduce, name)
    if len(names) > 1:
        (first, name), (second, other) = list(names.items())[:2]
        raise PolicyError(
            f'"{name}" is reduced in {first} and "{other}" in {second}; DistributedDataParallel mixes them in its '
            "buckets: give one reduce for the whole model"
        )
    return next(iter(names), torch.float32)


def _send_tails(model: nn.Module, group: Any) -> None:
    """Give every rank the tails of the first, as torch does with the weights that they belong to."""
    source = dist.get_global_rank(group, 0)
    for param in model.parameters():
        # of the first rank's weight as it is now
        follow(param)
        tail = storage_of(param).tail
        if tail is not None:
            # not every backend sends 16-bit integers
            sent = tail.contiguous()
            dist.broadcast(sent.view(torch.uint8), source, group=group)
            tail.copy_(sent)
            record(param)
