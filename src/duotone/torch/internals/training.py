"""Private names of torch around a model in training: modules, optimizers, torch's own GradScaler, wrappers of ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duotone.call_site import warn
from duotone.torch.internals.lookup import find, find_or_refuse, refusal

# the base of batch and instance norms, other libraries' among them; without it, torch's own alone are known
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/batchnorm.py#L25
_TORCH_NORMS = tuple(
    getattr(nn, f"{lazy}{kind}Norm{dimensions}d")
    for lazy in ("", "Lazy")
    for kind in ("Batch", "Instance")
    for dimensions in (1, 2, 3)
)
_NormBase: Any = find("torch.nn.modules.batchnorm:_NormBase")
BATCH_NORMS = (*_TORCH_NORMS, nn.SyncBatchNorm) if _NormBase is None else (_NormBase,)
# a module's own parameters and buffers by name
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L456
PARAMETERS = "_parameters"
BUFFERS = "_buffers"
# what `float()`, `to()` and the like of a module go through; without it, they drop the lower bits of masters
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L928
CONVERT = "_apply"
# how a module takes its own part of a state dict; without it, FP32 values are rounded to 16-bit weights
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L2340
LOAD = "_load_from_state_dict"
# how a module writes its own part of a state dict; without it, nobody is told that `save_pretrained` rounds
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L2143
SAVE = "_save_to_state_dict"
# how DataParallel copies a module; without it, its replicas run the original's weights
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L2925
REPLICATE = "_replicate_for_data_parallel"
# hooks around an optimizer's step
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/optimizer.py#L360
PRE_HOOKS = "_optimizer_step_pre_hooks"
POST_HOOKS = "_optimizer_step_post_hooks"
# schedulers warn if their optimizer has not been stepped; without it, after `prepare` too
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/lr_scheduler.py#L267
STEPPED = "_opt_called"
# an optimizer whose step takes `grad_scale` and `found_inf`; without it, overflows are waited for
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/grad_scaler.py#L418
TAKES_SCALE = "_step_supports_amp_scaling"
# the model that DistributedDataParallel runs now; without it, nobody is told that ranks' masters drift apart under it
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/parallel/distributed.py#L814
ACTIVE_DDP = "_active_ddp_module"
# torch's Join around it; without it, nobody is told that ranks would wait for each other for ever
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/algorithms/join.py#L58
JOIN_CONFIG = "_join_config"
# the mark of what torch's first FSDP has flattened; without it, such a parameter is not refused
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_flat_param.py
FLATTENED = "_fsdp_flattened"
# what torch's GradScaler is made of, which ours inherits
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/grad_scaler.py
_SCALER = "on which duotone.torch.GradScaler stands"
SCALER_ATTRIBUTES = (
    "_backoff_factor",
    "_check_inf_per_device",
    "_check_scale_growth_tracker",
    "_enabled",
    "_growth_factor",
    "_growth_interval",
    "_lazy_init_scale_growth_tracker",
    "_maybe_opt_step",
    "_per_optimizer_states",
    "_scale",
    "_unscale_grads_",
)
update_scale: Callable[..., Tensor] = find_or_refuse("torch:_amp_update_scale_", _SCALER)
check_and_unscale: Callable[[list[Tensor], Tensor, Tensor], None] = find_or_refuse(
    "torch:_amp_foreach_non_finite_check_and_unscale_", _SCALER
)
OptState: Any = find("torch.amp.grad_scaler:OptState")
new_optimizer_state: Callable[[], dict[str, Any]] = find(
    "torch.amp.grad_scaler:_refresh_per_optimizer_state",
    lambda: {"stage": OptState.READY, "found_inf_per_device": {}},
)


def check_grad_scaler(scaler: torch.amp.GradScaler) -> None:
    """Raise unless torch's scaler, without what a subclass adds, is made of what ours uses.

    Raises:
        BackendError: it is not.
    """
    if OptState is None:
        refusal("torch.amp.grad_scaler.OptState", _SCALER)()
    # one that is switched off has only some of them
    for name in SCALER_ATTRIBUTES if scaler.is_enabled() else ():
        if not (hasattr(torch.amp.GradScaler, name) or name in vars(scaler)):
            refusal(f"torch.amp.GradScaler.{name}", _SCALER)()


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return where a module keeps its own parameters, by name; None among them."""
    return _store(module, PARAMETERS)


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return where a module keeps its own buffers, by name; None among them."""
    return _store(module, BUFFERS)


def _store(module: nn.Module, name: str) -> dict[str, Any]:
    store = getattr(module, name, None)
    if store is None:
        refusal(f"torch.nn.Module.{name}", "which checkpoint_activations, explain and fully_shard need")()
    return store


def move_step_hooks(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let an optimizer call another's hooks around its steps, too, and tell schedulers that the other was stepped."""
    for hooks in (PRE_HOOKS, POST_HOOKS):
        if hasattr(old, hooks):
            getattr(new, hooks).update(getattr(old, hooks))
        else:
            warn(
                f"torch {torch.__version__} keeps no {hooks}: what was registered on this {type(old).__name__} to run "
                "around its steps does not run any more; register it on the new optimizer",
            )
    setattr(old, STEPPED, True)


def takes_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's step divides by its `grad_scale`, and does nothing if its `found_inf` is 1."""
    return getattr(optimizer, TAKES_SCALE, False)


def active_ddp() -> Any:
    """Return the DistributedDataParallel that is running its module, or None."""
    return getattr(nn.parallel.DistributedDataParallel, ACTIVE_DDP, None)


# FSDP2 notes once what a parameter is gathered in, and gathers from memory that it has noted, too
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py
_GATHERING = (
    "_sharded_param_data",
    "all_gather_outputs",
    "_unsharded_param",
    "orig_dtype",
    "param_dtype",
    "reduce_dtype",
)
_ORIGINAL = "_orig_dtype"


def gathering_of(module: Any) -> list[tuple[Any, list[Any]]]:
    """Return the groups that a module of `fully_shard` gathers its parameters in, each with what it knows of those."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups
    return [(group, list(group.fsdp_params)) for group in groups if group is not None]


def is_gathered_otherwise(gathered: Any) -> bool:
    """Return whether FSDP2 has noted another dtype of a sharded parameter than it has now."""
    return getattr(gathered, "orig_dtype", gathered.sharded_param.dtype) != gathered.sharded_param.dtype


def gather_anew(group: Any, gathered: Any) -> Callable[[], None]:
    """Have FSDP2 gather what a sharded parameter of a group is now, in its dtype of now.

    Returns:
        What has it gather again what it gathered before; to be called when the parameter is that again.
    """
    noted = {name: vars(gathered)[name] for name in _GATHERING if name in vars(gathered)}
    of_group = getattr(group, _ORIGINAL, None)
    vars(gathered).pop("_unsharded_param", None)
    gathered.all_gather_outputs = []
    gathered.reset_sharded_param()
    if hasattr(gathered, "orig_dtype"):
        gathered.init_dtype_attrs(gathered.mp_policy)
        setattr(group, _ORIGINAL, gathered.sharded_param.dtype)

    def undo() -> None:
        for name in _GATHERING:
            vars(gathered).pop(name, None)
        vars(gathered).update(noted)
        if "orig_dtype" not in noted and hasattr(group, _ORIGINAL):
            # a forward pass in between was the first
            gathered.init_dtype_attrs(gathered.mp_policy)
            setattr(group, _ORIGINAL, gathered.sharded_param.dtype)
        elif hasattr(group, _ORIGINAL):
            setattr(group, _ORIGINAL, of_group)

    return undo


def join_of(wrapper: Any) -> Any:
    """Return how torch's Join is around a wrapper of a model, or None."""
    return getattr(wrapper, JOIN_CONFIG, None)


def is_flattened(param: Tensor) -> bool:
    """Return whether torch's first FSDP has made flat memory of parameters, and this is it."""
    return getattr(param, FLATTENED, False)
