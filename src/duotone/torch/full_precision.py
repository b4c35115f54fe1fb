"""A block of code in which a cast model's own parameters are their FP32 masters.

`model.float()`, `p.lerp_()`, pruning, merging, resizing, loading and saving are written for FP32 weights. In the block
the model has them; at its end they are encoded again, whatever was done. Copies of nothing but the weights are made: 4
bytes for each 16-bit parameter, while the 16-bit weights and their tails wait. Left out: training in the block.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from duotone.errors import PolicyError
from duotone.torch.casting.cast_forward import CastForward, cast_forward_of, check_module
from duotone.torch.casting.new_parts import Parts
from duotone.torch.internals.training import gather_anew, gathering_of
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters import shards
from duotone.torch.parameters.foreign_writes import say_if_written
from duotone.torch.parameters.full_precision import Widened, check_ranges, encode_new, warn_of_late_gradients
from duotone.torch.parameters.masters import check_in_place
from duotone.torch.parameters.storage import storage_of


class full_precision:
    """Have a model's own parameters be FP32, their masters, for a block of code; encode them again at its end.

    Inside, every 16-bit parameter is the same object with its FP32 master as its values. Whatever is done to it there,
    edits in place, `lerp_`, pruning, merging, resizing, `load_state_dict`, is kept at the end bit for bit: in BF16 at
    any value, in FP16 from 2^-16 on. Parameters and modules that were put into the model are stored and run as the
    policy says of their place. `state_dict` and `save_pretrained` inside are those of an FP32 model.

    Afterwards everything else is as before: optimizer state, hooks, a `.grad` of before in its format, what
    `fully_shard` gathers. Gradients that a backward pass in the block makes are let go of at its end. A weight without
    a master is rounded to nearest at the end; a frozen one gets a tail only if it would lose bits. If the block raises,
    the weights are encoded as they are then.

    Blocks nest. On several ranks all of them enter and leave together.

    Args:
        model: a module, cast or not, sharded by `duotone.torch.fully_shard` or not; one without 16-bit weights stays as
            it is.
        policy: `"own"` to have forward passes inside keep the rules of the model's policy, on FP32 weights; None to
            have them run as if the model had never been cast.

    Raises:
        PolicyError: a part of a sharded model is given that is not sharded by itself; at the end of the block: a value
            is too large for a weight in FP16, and all weights are what they were before the block.

    Optimizers, scalers, `cast`, `fully_shard` and the like refuse the parameters inside.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1, bias=False), "bf16")
    >>> with full_precision(model):
    ...     _ = nn.init.constant_(model.weight, 0.1)
    ...     model.weight.dtype, model.state_dict()["weight"].dtype
    (torch.float32, torch.float32)
    >>> model.weight.dtype, dt.master_weights(model)["weight"]
    (torch.bfloat16, tensor([[0.1000, 0.1000]]))
    """

    def __init__(self, model: nn.Module, policy: Literal["own"] | None = "own") -> None:
        check_module(model, "make FP32")
        if policy not in ("own", None):
            raise PolicyError(
                f'full_precision(policy={policy!r}) is not possible; allowed are "own", which keeps the rules of the '
                "model's policy, and None, which switches them off: cast the model to have others"
            )
        self._model = model
        self._policy = policy
        self._open: list[_Block] = []

    def __enter__(self) -> nn.Module:
        self._open.append(_Block(self._model, list(self._model.parameters()), self._policy))
        return self._model

    def __exit__(self, *error: Any) -> None:
        self._open.pop().close()

    def by_module(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module that has parameters of its own, with its path; those alone are FP32 until the next one.

        It costs the FP32 copy of one module in place of the model's. A tied parameter is FP32 with each module that has
        it. Modules are not to be exchanged inside.

        >>> import duotone.torch as dt
        >>> model = dt.cast(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "bf16")
        >>> for path, module in full_precision(model).by_module():
        ...     _ = module.weight.data.clamp_(-0.1, 0.1)
        ...     path, module.weight.dtype, model[1].weight.dtype
        ('0', torch.float32, torch.bfloat16)
        ('1', torch.float32, torch.float32)
        """
        for path, module in list(self._model.named_modules()):
            own = list(module.parameters(recurse=False))
            if own:
                block = _Block(self._model, own, self._policy)
                try:
                    yield path, module
                finally:
                    block.close()


class _Block:
    """Some parameters of a model that are FP32 until it is closed."""

    def __init__(self, model: nn.Module, params: list[nn.Parameter], policy: str | None) -> None:
        self._model = model
        self._forwards: list[CastForward] = []
        self._regathered: list[Callable[[], None]] = []
        self._widened: list[Widened] = []
        self._grads: list[tuple[nn.Parameter, Tensor | None]] = []
        shards.reshard(model)
        narrow = [param for param in dict.fromkeys(params) if _is_narrow(param)]
        say_if_written(narrow)
        gathered = _gathered(model, narrow)
        self._parts = Parts(model)
        self._hook = register_optimizer_step_pre_hook(_refuse_step)
        try:
            for param in narrow:
                self._widened.append(Widened(param))
            self._regathered = [gather_anew(*each) for each in gathered]
            if narrow:
                self._take_gradients(params)
        except BaseException:
            self._hook.remove()
            self._put_back()
            raise
        if policy is None:
            self._forwards = [each for module in model.modules() if (each := cast_forward_of(module)) is not None]
            for forward in self._forwards:
                forward.remove()

    def close(self) -> None:
        """Encode the parameters, and what came into the model since."""
        self._hook.remove()
        for forward in self._forwards:
            forward.reinstall()
        shards.reshard(self._model)
        try:
            new = self._parts.new_parameters()
            check_ranges(self._widened, new)
        except BaseException:
            self._put_back()
            raise
        # a tail made in inference mode could never be written to by a step
        with torch.inference_mode(False), torch.no_grad():
            for each in self._widened:
                each.narrow()
            for _, param, storage in new:
                encode_new(param, storage)
        warn_of_late_gradients(self._widened)
        self._give_gradients()
        self._gather_as_before()
        self._parts.cast_new_modules()

    def _take_gradients(self, params: list[nn.Parameter]) -> None:
        # those of weights that are FP32 anyway: what a backward pass inside makes is no part of a step outside
        widened = {each.param for each in self._widened}
        for param in params:
            if param not in widened and param.is_leaf and not storage_of(param).in_full_precision:
                self._grads.append((param, param.grad))
                param.grad = None

    def _give_gradients(self) -> None:
        for param, grad in self._grads:
            is_same = grad is not None and (grad.shape, grad.device) == (param.shape, param.device)
            param.grad = grad if is_same else None

    def _put_back(self) -> None:
        for each in self._widened:
            each.put_back()
        self._give_gradients()
        self._gather_as_before()

    def _gather_as_before(self) -> None:
        for undo in reversed(self._regathered):
            undo()


def _is_narrow(param: nn.Parameter) -> bool:
    has_values = not (isinstance(param, UninitializedParameter) or param.is_meta)
    return has_values and param.dtype in SPLIT_DTYPES and not storage_of(param).in_full_precision


def _gathered(model: nn.Module, params: list[nn.Parameter]) -> list[tuple[Any, Any]]:
    """Return what FSDP2 knows of sharded parameters, each with its group."""
    cut = {param for param in params if shards.is_shard(param)}
    if not cut:
        return []
    found = {}
    for module in model.modules():
        if shards.is_sharded(module):
            for group, of_group in gathering_of(module):
                found.update({each.sharded_param: (group, each) for each in of_group if each.sharded_param in cut})
    if len(found) < len(cut):
        names = sorted(storage_of(param).name or "?" for param in cut.difference(found))
        raise PolicyError(
            f'parameter "{names[0]}" is sharded together with modules outside of this {type(model).__name__}; give '
            "full_precision the module that fully_shard was called for, or the whole model"
        )
    return list(found.values())


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            check_in_place(param)
