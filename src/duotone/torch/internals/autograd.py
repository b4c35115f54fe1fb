"""Private names of torch's autograd: hooks on saved tensors, versions, backward passes, transforms of torch.func."""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from duotone.torch.internals.lookup import find, has_all


def _itself(tensor: Tensor) -> Tensor:
    return tensor


# hooks on saved tensors: FP16 on CPUs keeps operands in 16 bits by them, and torch.utils.checkpoint shows in them;
# where they cannot be seen, the former keeps FP32 copies, and what checkpoint runs again finds no region
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
top_saved_hooks: Callable[[bool], Any] = find(
    "torch._C._autograd:_top_saved_tensors_default_hooks", lambda ignore_tracing: None
)
push_saved_hooks: Callable[..., Any] = find(
    "torch._C._autograd:_push_saved_tensors_default_hooks",
    lambda pack, unpack: saved_tensors_hooks(pack, unpack).__enter__(),
)
pop_saved_hooks: Callable[[], Any] = find(
    "torch._C._autograd:_pop_saved_tensors_default_hooks", lambda: saved_tensors_hooks(_itself, _itself).__exit__()
)
_hooks_are_allowed: Callable[[], bool] = find("torch._C._autograd:_saved_tensors_hooks_is_enabled", lambda: False)
SEES_SAVED_HOOKS = has_all("_top_saved_tensors")
# whether torch.jit.trace records what runs; it would record the hooks of FP16 on CPUs
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/jit/_trace.py#L1261
is_jit_tracing: Callable[[], bool] = find("torch.jit:is_tracing", lambda: False)
# which backward pass runs on this thread, -1 for none; without it, a part of a cast model that is run again in one is
# taken for one that is called by itself, whose output is cast
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Module.cpp
_backward_pass: Callable[[], int] = find("torch._C:_current_graph_task_id", lambda: -1)
# what torch.no_grad calls, as modes see it; without it, checkpoint with reentrant autograd is not followed
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
set_grad_enabled: Any = find("torch._C:_set_grad_enabled", object())


def can_hook_saved() -> bool:
    """Return whether hooks on saved tensors may be pushed here; transforms of torch.func forbid them."""
    return SEES_SAVED_HOOKS and _hooks_are_allowed()


def in_backward() -> bool:
    """Return whether autograd's engine is running on this thread."""
    return _backward_pass() != -1


# how often a tensor was written to; without it, a change in place between forward and backward pass is not seen where
# Duotone itself keeps a tensor for the latter
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/python_variable.cpp
VERSION = "_version"


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for those made in inference mode, for which torch does not count."""
    return 0 if tensor.is_inference() else getattr(tensor, VERSION, 0)


def _write_nothing(tensors: Tensor | Iterable[Tensor]) -> None:
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        # writing into an empty part counts as writing
        tensor.detach()[None][:0].zero_()


# has autograd see what was written through addresses
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/graph.py#L245
increment_version: Callable[[Tensor | list[Tensor]], None] = find(
    "torch.autograd.graph:increment_version", _write_nothing
)

# sets how often tensors were written to; without it, a backward pass after average.applied, of a forward pass before
# it, is refused as one of changed weights
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
_set_versions: Callable[[tuple[Tensor, ...], tuple[int, ...]], None] = find(
    "torch._C._autograd:_unsafe_set_version_counter", lambda tensors, versions: None
)


def set_version(tensor: Tensor, version: int) -> None:
    """Have a tensor be one that was written to so often; nothing happens to those made in inference mode."""
    if not tensor.is_inference():
        _set_versions((tensor,), (version,))


# the level of the transform of torch.func that is under way, or None
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/functorch/init.cpp
_transform_level: Callable[[], int | None] | None = find("torch._C._functorch:maybe_current_level")
# whether one is; without either, one is taken to be, which is slower
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/python_dispatch.cpp
transforms_are_active: Callable[[], bool] = find(
    "torch._C:_are_functorch_transforms_active", lambda: _transform_level is None or _transform_level() is not None
)
# whether vmap stands for a batch by a tensor; without it, each is taken to be one inside of transforms
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/functorch/init.cpp
is_batched: Callable[[Tensor], bool] = find(
    "torch._C._functorch:is_batchedtensor", lambda tensor: transforms_are_active()
)


def in_transform() -> bool:
    """Return whether this is called inside of a transform of torch.func.

    >>> import torch
    >>> in_transform(), torch.func.vmap(lambda x: x + in_transform())(torch.zeros(1))
    (False, tensor([1.]))
    """
    return transforms_are_active() if _transform_level is None else _transform_level() is not None


# the level at which torch.autograd.forward_ad takes derivatives, -1 for none, which torch.func enters too; without it,
# they need a formula that functions with a gradient of Duotone's own have not
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/forward_ad.py
FORWARD_LEVEL = "_current_level"


def in_forward_mode() -> bool:
    """Return whether this is called where forward-mode derivatives may be taken.

    >>> import torch
    >>> in_forward_mode(), torch.func.jvp(lambda x: x + in_forward_mode(), (torch.zeros(1),), (torch.ones(1),))[0]
    (False, tensor([1.]))
    """
    return getattr(forward_ad, FORWARD_LEVEL, -1) >= 0


# the autograd function in which torch.distributions draws from a Dirichlet distribution; without it, samples whose
# concentrations are 16-bit have no gradient
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributions/dirichlet.py
_draw: Any = find("torch.distributions.dirichlet:_Dirichlet.forward")
# functions of modes and handlers between it and the kernel
_DEPTH = 12


def context_of_sample() -> Any:
    """Return the context of the function in which a Dirichlet distribution is drawn from, or None if none is."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None or _draw is None:
            return None
        if frame.f_code is _draw.__code__:
            return frame.f_locals.get("ctx")
        frame = frame.f_back
    return None
