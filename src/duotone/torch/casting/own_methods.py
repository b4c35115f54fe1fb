"""Methods of torch's modules that a cast module has its own of, so that whoever converts it finds its masters.

`model.float()`, `.double()`, `.half()`, `.to(...)` and `.type(...)` go through one method of every module, which sets
`weight.data` to the converted weight; a tail would belong to nothing afterwards. Here the converted weight is its
master: bit for bit in FP32 and FP64, and in another 16-bit dtype with a tail of that dtype. `load_state_dict` rounds
FP32 values to 16-bit weights; here they are the new masters. A state dict has 16-bit weights; where that is for
`save_pretrained`, it is warned of. `copy.copy` and `DataParallel` give a copy whatever stands on the original, a
forward that runs the original's weights among it; here the copy gets its own. Nothing of torch is changed: the methods
stand on the instance. Left out: `weight.data = ...` written by others, which `storage_of` notices.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from duotone.errors import PolicyError
from duotone.torch.casting.activation_checkpointing import CheckpointedForward
from duotone.torch.casting.cast_forward import CastForward, cast_forward_of
from duotone.torch.casting.foreign_saves import given_to_save, say_if_saved_rounded
from duotone.torch.casting.storage_plan import set_grad_dtype
from duotone.torch.internals.training import (
    CONVERT,
    LOAD,
    REPLICATE,
    SAVE,
    gather_anew,
    gathering_of,
    is_gathered_otherwise,
    parameters_of,
)
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters.edits import carry, note_versions, recorded
from duotone.torch.parameters.foreign_averages import given_to_average
from duotone.torch.parameters.foreign_writes import say_if_written
from duotone.torch.parameters.full_precision import encode_new
from duotone.torch.parameters.masters import (
    beyond_range,
    ensure_tail,
    keeps_tail,
    read_master,
    store_master,
    write_master,
)
from duotone.torch.parameters.shards import is_cut_like
from duotone.torch.parameters.storage import NO_STORAGE, set_storage, storage_of

_WIDE = (torch.float32, torch.float64)
_FLOATING = (torch.float32, *SPLIT_DTYPES)
_REDUCE = "__reduce_ex__"
_NAMES = (CONVERT, REPLICATE, LOAD, SAVE, _REDUCE)
# of the whole model alone
_OF_ROOT = "parameters"


class OwnMethods:
    """The methods of one module that stand on the instance, in front of those of its class.

    Args:
        module: a module of a cast model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # whether it was said that `save_pretrained` rounds
        self._has_warned = False

    def install(self, *, is_root: bool = False) -> None:
        """Put the methods on the module."""
        vars(self._module).update(self.by_name())
        if is_root and type(self._module).parameters is nn.Module.parameters:
            vars(self._module)[_OF_ROOT] = self.parameters

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Return the methods by the names that they stand under."""
        return dict(zip(_NAMES, (self.convert, self.replicate, self.load, self.save, self.reduce), strict=True))

    def convert(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Convert the module as torch does, and have masters follow.

        Raises:
            PolicyError: a master is too large for a weight in FP16. It keeps its old weight then. Or it is to another
                dtype than FP32, inside of a `full_precision` block; nothing is converted then.
        """
        module = self._module
        _check_stays_float32(module, *args, **kwargs)
        before = [_Weight(name, param) for name, param in _shaped(module)]
        was_in_float64 = _is_in_float64(module)
        of_class: Any = getattr(type(module), CONVERT)
        result = of_class(module, *args, **kwargs)
        for weight in before:
            weight.follow(parameters_of(module)[weight.name])
        for group, every in gathering_of(module):
            for each in every:
                if is_gathered_otherwise(each):
                    gather_anew(group, each)
        if not was_in_float64 and _is_in_float64(module):
            # no policy computes in FP64: it is as after `uncast`
            remove_forward(module)
        return result

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the module's parameters one by one; their masters to who averages or writes those."""
        params: Any = nn.Module.parameters(self._module, recurse)
        if torch.compiler.is_compiling():
            return params
        frame = sys._getframe(1)
        return given_to_average(given_to_save(params, frame), frame)

    def load(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load the module's own part of a state dict as torch does; FP32 values are the new masters.

        Whatever a 16-bit weight is given in 16 bits leaves its tail as it is, for an optimizer's state may hold that.
        """
        module = self._module
        before = {name: (param, storage_of(param)) for name, param in _shaped(module)}
        of_class: Any = getattr(type(module), LOAD)
        of_class(module, state_dict, prefix, *args)
        for name, (old, storage) in before.items():
            param, value = parameters_of(module).get(name), state_dict.get(prefix + name)
            if storage.param is None or storage.in_full_precision or not isinstance(param, nn.Parameter):
                continue
            if param is not old and param.dtype in _FLOATING:
                # loaded with assign=True
                encode_new(param, storage)
            elif isinstance(value, Tensor) and _is_master_of(value, param):
                if keeps_tail(param):
                    ensure_tail(param)
                write_master(param, value)
            elif isinstance(value, Tensor):
                # a change that we know of, and no small one
                note_versions(param)
                recorded[0] += 1

    def save(self, *args: Any) -> None:
        """Write the module's own part of a state dict as torch does; warn if it is for `save_pretrained`."""
        module = self._module
        if not self._has_warned:
            model = say_if_saved_rounded(module, (param for _, param in _shaped(module)))
            for each in () if model is None else model.modules():
                own = vars(each).get(SAVE)
                if own is not None:
                    own.__self__._has_warned = True
        say_if_written(param for _, param in _shaped(module))
        of_class: Any = getattr(type(module), SAVE)
        of_class(module, *args)

    def replicate(self) -> nn.Module:
        """Return a replica as `DataParallel` makes them, which runs its own weights."""
        of_class: Any = getattr(type(self._module), REPLICATE)
        replica = of_class(self._module)
        vars(replica).update(_rebound(vars(replica), replica))
        return replica

    def reduce(self, protocol: Any) -> Any:
        """Return what copies and pickles are made of; a shallow copy runs its own weights."""
        of_class: Any = type(self._module).__reduce_ex__
        make, arguments, state, *rest = of_class(self._module, protocol)
        # deep copies and pickles make another of everything, bound to the other module
        if sys._getframe(1).f_code is not copy.copy.__code__ or not isinstance(state, dict):
            return make, arguments, state, *rest
        copied = make(*arguments)
        return _itself, (copied,), {**state, **_rebound(state, copied)}, *rest


def _shaped(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a module's own parameters, by name, that have a shape."""
    return [
        (name, param)
        for name, param in parameters_of(module).items()
        if param is not None and not isinstance(param, UninitializedParameter)
    ]


def _is_master_of(value: Tensor, param: Tensor) -> bool:
    """Return whether a value of a state dict says more than a 16-bit weight can."""
    fits = value.shape == param.shape and not param.is_meta and is_cut_like(value, param)
    return fits and value.dtype in _WIDE and param.dtype in SPLIT_DTYPES


def _check_stays_float32(module: nn.Module, convert: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> None:
    """Raise if a conversion takes a module's weights away from FP32, which they are for the time of a block alone."""
    held = next((param for param in module.parameters() if storage_of(param).in_full_precision), None)
    if held is None or held.dtype != torch.float32:
        return
    dtype = convert(torch.empty(1, device=held.device)).dtype
    if dtype != torch.float32:
        raise PolicyError(
            f"a {type(module).__name__} was to be converted to {dtype} inside of a full_precision block, at whose end "
            "its weights are encoded as the policy says; convert it after the block, or a copy.deepcopy of it"
        )


class _Weight:
    """A parameter as it is before torch converts its module."""

    def __init__(self, name: str, param: nn.Parameter) -> None:
        self.name = name
        self._param = param
        self._storage = storage_of(param)
        self._grad_dtype = param.grad_dtype
        # with the memory that it has now
        self._before = param.detach()
        if self._storage.tail is not None:
            set_storage(self._before, self._storage)

    def follow(self, param: Any) -> None:
        """Give the converted parameter its master and its record."""
        before, storage = self._before, self._storage
        if storage_of(param) == NO_STORAGE and storage != NO_STORAGE:
            # torch has made another parameter, or exchanged all that this one is
            set_storage(param, storage)
        if param.is_meta and not before.is_meta:
            # its values are gone, and what comes later has nothing to do with them
            set_storage(param, storage.without_tail())
        if param.dtype == before.dtype:
            carry(before, param)
        if param.dtype == before.dtype or storage.param is None or not before.is_floating_point():
            self._restore_grad(param)
            return
        if not (before.is_meta or param.is_meta) and not _holds_all(param, before):
            master = read_master(before)
            largest = beyond_range(master, param.dtype) if storage.rounding is None else None
            if largest is not None:
                param.data = before
                set_storage(param, storage)
                self._restore_grad(param)
                raise PolicyError(
                    f'parameter "{storage.name or self.name}" holds {largest:.6g}, beyond FP16\'s largest 65504; '
                    "keep it in bfloat16, or call float()"
                )
            store_master(param, master, storage)
        self._restore_grad(param)

    def _restore_grad(self, param: nn.Parameter) -> None:
        if not param.is_floating_point() or self._storage.param is None:
            return
        own = self._grad_dtype
        wanted = param.dtype if own is None or own == self._before.dtype else own
        if param.grad_dtype != wanted or (param.grad is not None and param.grad.dtype != wanted):
            set_grad_dtype(param, wanted)


def _is_in_float64(module: nn.Module) -> bool:
    """Return whether all floating-point parameters of a module and its parts are FP64."""
    dtypes = (param.dtype for param in module.parameters() if param.is_floating_point())
    first = next(dtypes, None)
    return first == torch.float64 and all(dtype == torch.float64 for dtype in dtypes)


def _holds_all(param: Tensor, before: Tensor) -> bool:
    """Return whether torch's own conversion is that of the master: from FP32 and FP64 to one of them."""
    return before.dtype not in SPLIT_DTYPES and param.dtype not in SPLIT_DTYPES


def _rebound(attributes: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a shallow copy's attributes of Duotone's, bound to itself."""
    forward = attributes.get("forward")
    methods = OwnMethods(module)
    own: dict[str, Any] = methods.by_name()
    if isinstance(getattr(attributes.get(_OF_ROOT), "__self__", None), OwnMethods):
        own[_OF_ROOT] = methods.parameters
    if isinstance(forward, CastForward | CheckpointedForward):
        own["forward"] = forward.of_copy(module)
    return own


def _itself(copied: nn.Module) -> nn.Module:
    return copied


def remove_forward(module: nn.Module) -> None:
    """Give a module the forward and the methods back that it had before it was cast."""
    for name in (*_NAMES, _OF_ROOT):
        vars(module).pop(name, None)
    forward = cast_forward_of(module)
    if forward is not None:
        forward.remove()
