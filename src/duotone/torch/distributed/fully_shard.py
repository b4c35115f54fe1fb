"""torch's `fully_shard` for modules of a cast model: weights stay 16-bit, and masters keep every bit.

Torch replaces parameters by DTensors. These get the records of the parameters that they replace, with tails that torch
has cut too: as frozen parameters of a module of their own, so that mesh and placement are the same. No dtype changes:
16-bit weights are gathered, gradients are reduced in the policy's `reduce` and rounded once.

Torch gathers a group in one dtype. So parts of a module in another dtype than the rest, norms in FP32 for instance,
become groups of their own, one for each dtype. Left out: gradients in another dtype than their weights, and models on
the meta device, since a DTensor's record does not survive its materialisation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from duotone.errors import PolicyError
from duotone.torch.casting.cast_forward import check_module
from duotone.torch.distributed.fitness import check_cast, check_one_dtype
from duotone.torch.internals.training import parameters_of
from duotone.torch.parameters.edits import follow, record
from duotone.torch.parameters.shards import is_sharded, like, local
from duotone.torch.parameters.storage import set_storage, set_tail, storage_of

Modules = TypeVar("Modules", bound=nn.Module | Sequence[nn.Module])


class _Dtypes(NamedTuple):
    """The dtypes of one group: of weights and gradients, and of the reduction."""

    param: torch.dtype
    reduce: torch.dtype | None


class _Slot(NamedTuple):
    """A parameter and where it belongs: `owner.name`."""

    owner: nn.Module
    name: str
    param: nn.Parameter


def fully_shard(
    module: Modules, *, mesh: Any = None, reshard_after_forward: bool | int | None = None, **options: Any
) -> Modules:
    """Shard a module of a cast model over ranks, as `torch.distributed.fsdp.fully_shard` does, masters included.

    Call it as torch's, after `cast` and before the optimizer is built: first on parts, such as the blocks of a
    transformer, then on the model. All ranks must hold the same weights, as for torch's; nothing is sent. Weights are
    gathered in their own dtype. Gradients are averaged in the policy's `reduce`, never in fewer bits than
    they have, and rounded once to the weight's dtype; without synchronisation (`set_requires_gradient_sync(False)`)
    they accumulate in `reduce`. Several modules given as a list share one group.

    Args:
        module: a module of a cast model, or a list of some.
        mesh: of the ranks, as torch takes it: 1-d, or 2-d for copies of shards (HSDP); None for all ranks.
        reshard_after_forward: whether what was gathered is freed before the backward pass; as in torch.
        options: torch's others: `shard_placement_fn`, `offload_policy`, `ignored_params`, `dp_mesh_dims`.

    Returns:
        What was given, its parameters replaced by DTensors.

    Raises:
        PolicyError: a parameter was never cast, is on the meta device, or its gradient is to be in another dtype than
            itself; a module keeps parameters of its own otherwise than those of its parts; an `mp_policy` is given.
            Nothing is changed then.

    >>> import torch.distributed as dist, duotone.torch as dt
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "bf16")
    >>> model = fully_shard(model)
    >>> optimizer = dt.AdamW(model.parameters())
    >>> type(model[0].weight.data).__name__, model[0].weight.dtype, model[1].weight.dtype
    ('DTensor', torch.bfloat16, torch.float32)
    >>> dist.destroy_process_group()

    >>> fully_shard(nn.Linear(2, 1))
    Traceback (most recent call last):
    ...
    duotone.errors.PolicyError: parameter "weight" was never cast; call duotone.torch.cast(model, policy) ...
    """
    if "mp_policy" in options:
        raise PolicyError(
            "mp_policy is what the model's own policy says already: weights are gathered in param, gradients "
            'reduced in its reduce; leave mp_policy out, and cast to a policy such as "bf16,reduce=bfloat16"'
        )
    roots = [module] if isinstance(module, nn.Module) else list(module)
    for root in roots:
        check_module(root, "shard")
        if _has_no_forward(root):
            raise PolicyError(f"a {type(root).__name__} has no forward that could gather weights; shard its parts")
    ignored = options.get("ignored_params") or set()
    slots = [slot for slot in _slots(roots, set()) if slot.param not in ignored]
    for slot in slots:
        _check(slot)
    for slot in slots:
        # what is cut belongs to the weights as they are now
        follow(slot.param)
    rest, apart = _groups(roots, ignored)
    options = {**options, "mesh": mesh, "shard_placement_fn": _once(options.get("shard_placement_fn"))}
    for dtypes, parts in apart.items():
        _shard(parts, slots, dtypes, {**options, "reshard_after_forward": reshard_after_forward})
    _shard(module, slots, rest, {**options, "reshard_after_forward": reshard_after_forward})
    return module


def _shard(module: Any, slots: list[_Slot], dtypes: _Dtypes | None, options: dict[str, Any]) -> None:
    """Have torch shard one group, and give the records of its parameters to their successors."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard

    reduce = None if dtypes is None or dtypes.reduce is None else torch.promote_types(dtypes.param, dtypes.reduce)
    shard(module, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False), **options)
    replaced = {slot.param: parameters_of(slot.owner)[slot.name] for slot in slots}
    replaced = {param: new for param, new in replaced.items() if new is not param and not storage_of(param).is_replaced}
    tails = {param: tail for param in replaced if (tail := storage_of(param).tail) is not None}
    cut_tails = dict(zip(tails, _cut(tails, options), strict=True))
    for param, new in replaced.items():
        assert new is not None
        set_storage(new, storage_of(param))
        set_tail(new, cut_tails.get(param))
        # the successor has the tail
        set_tail(param, None)
        set_storage(param, storage_of(param).changed(is_replaced=True))
    # changes of theirs are noticed from here on
    record(*[new for new in replaced.values() if new is not None])


def _cut(tails: dict[nn.Parameter, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Return tails as torch cuts the parameters that they belong to."""
    from torch.distributed.fsdp import fully_shard as shard

    if not tails:
        return []
    holder = nn.Module()
    # torch 2.11 lets the parts require a gradient first, which integers cannot
    owners = {nn.Parameter(tail.view(torch.bfloat16), requires_grad=False): param for param, tail in tails.items()}
    for number, tail in enumerate(owners):
        holder.register_parameter(str(number), tail)
    placement_of = options["shard_placement_fn"]
    of_tail = None if placement_of is None else lambda tail: placement_of(owners[tail])
    same = {name: value for name, value in options.items() if name not in ("ignored_params", "reshard_after_forward")}
    shard(holder, **{**same, "shard_placement_fn": of_tail})
    return [like(local(tail).detach().view(torch.int16), tail.detach()) for tail in holder.parameters()]


def _once(shard_placement_fn: Callable[[nn.Parameter], Any] | None) -> Callable[[nn.Parameter], Any] | None:
    """Return a function that asks the user's once for each parameter: a tail must be placed as its weight is."""
    return None if shard_placement_fn is None else cache(shard_placement_fn)


def _groups(
    roots: list[nn.Module], ignored: set[nn.Parameter]
) -> tuple[_Dtypes | None, dict[_Dtypes, list[nn.Module]]]:
    """Return the dtypes of most elements, and by dtypes the largest parts whose own are others."""

    def sizes_in(modules: list[nn.Module]) -> dict[_Dtypes, int]:
        sizes: dict[_Dtypes, int] = {}
        for param in {slot.param: None for slot in _slots(modules, set())}:
            if param.is_floating_point() and param not in ignored:
                dtypes = _Dtypes(param.dtype, storage_of(param).reduce)
                sizes[dtypes] = sizes.get(dtypes, 0) + param.numel()
        return sizes

    def own(module: nn.Module) -> set[_Dtypes]:
        params = [param for param in module.parameters(recurse=False) if param not in ignored]
        return {_Dtypes(param.dtype, storage_of(param).reduce) for param in params if param.is_floating_point()}

    sizes = sizes_in(roots)
    of_roots = set().union(*map(own, roots))
    rest = max(of_roots or sizes, key=lambda dtypes: sizes[dtypes], default=None)
    apart: dict[_Dtypes, list[nn.Module]] = {}
    seen: set[nn.Module] = set()

    def divide(module: nn.Module, is_root: bool) -> None:
        if module in seen or (not is_root and is_sharded(module)):
            return
        seen.add(module)
        inside = set(sizes_in([module]))
        others = own(module) - {rest}
        if len(inside) == 1 and rest not in inside and not (is_root or _has_no_forward(module)):
            apart.setdefault(inside.pop(), []).append(module)
            return
        if others:
            rests = ", ".join(sorted(str(each.param) for each in {*inside, rest} if each is not None))
            raise PolicyError(
                f"a {type(module).__name__} keeps parameters of its own in {others.pop().param}, and those around it "
                f"or in its parts in {rests}, or reduces them otherwise; torch gathers one dtype at a time: shard its "
                "parts first, or write the policy's rule for all of it"
            )
        for child in module.children():
            divide(child, False)

    for root in roots:
        divide(root, True)
    return rest, apart


def _slots(modules: list[nn.Module], seen: set[nn.Module]) -> Iterator[_Slot]:
    """Yield every parameter of some modules and their parts, but for the parts that are sharded already."""
    for module in modules:
        if module in seen:
            continue
        seen.add(module)
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Slot(module, name, param)
        yield from _slots([child for child in module.children() if not is_sharded(child)], seen)


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _check(slot: _Slot) -> None:
    owner, name, param = slot
    name = storage_of(param).name or name
    if storage_of(param).is_replaced:
        raise PolicyError(
            f'parameter "{name}" of a {type(owner).__name__} is tied to one that is sharded already; shard both '
            "modules together: fully_shard([first, second])"
        )
    check_cast(name, param, "fully_shard")
    if param.is_meta:
        raise PolicyError(
            f'parameter "{name}" is on the meta device, and its record, with its tail, would not '
            "survive its materialisation; call model.to_empty(device=...) and set the weights before fully_shard"
        )
    instead = (
        "leave grad= out of the policy, and accumulate without synchronisation (set_requires_gradient_sync(False)), "
        "which adds up in the policy's reduce"
    )
    check_one_dtype(name, param, "fully_shard", instead)
