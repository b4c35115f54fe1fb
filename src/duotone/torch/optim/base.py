"""What every optimizer that keeps FP32 masters has in common: the step that can be skipped, and the tails.

An optimizer reads `grad_multiplier` and `found_inf`, two device scalars, and knows nothing of loss scaling or clipping.
Without them it steps as any torch optimizer does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.internals.autograd import version_of
from duotone.torch.kernels import SPLIT_DTYPES, Backend
from duotone.torch.parameters.edits import is_edited, tail_to_save
from duotone.torch.parameters.masters import check_in_place, check_not_flattened, ensure_tail
from duotone.torch.parameters.scaled_losses import forget_zeroed, scaled_losses
from duotone.torch.parameters.storage import storage_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MasterOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that updates FP32 masters, whatever dtype the resident weights have.

    Attributes:
        backend: whose kernels run: `"auto"` for those of the device, or `"reference"`, `"cpu"`, `"cuda"`.
    """

    backend: Backend = "auto"
    # who watches the steps of all optimizers asks for it
    keeps_masters = True

    @abstractmethod
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_multiplier: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch; together with the others it may not
                change gradients.
            grad_multiplier: FP32, 0-d, on the device; what gradients are multiplied by. Default 1.
            found_inf: bool, 0-d, on the device; if true nothing at all is changed. Default false.

        Returns:
            What the closure returned, or None.

        Raises:
            OptimizerError: a gradient is sparse, a parameter has moved to another device, or a closure that comes
                together with one of the scalars changes gradients.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and take the tails that wait on its parameters.

        Raises:
            OptimizerError: a parameter is neither FP32, BF16 nor FP16, was replaced by `fully_shard`, has lost its tail
                to torch's, or was flattened by torch's first FSDP. The group is not added then.
        """
        self._append_group(param_group)
        try:
            self._take_up(self.param_groups[-1]["params"])
        except OptimizerError:
            del self.param_groups[-1]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients, or fill them with zeros, as torch's optimizers do."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            if scaled_losses:
                forget_zeroed(param for param, _ in self._parameters())
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def _append_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    def _take_up(self, params: list[Tensor]) -> None:
        check_parameters(params)
        for param in params:
            check_in_place(param)
            check_not_flattened(param)
            if param.requires_grad:
                self._take_tail(param)

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield every parameter with its group, in the order of their indices."""
        for group in self.param_groups:
            for param in group["params"]:
                yield param, group

    def _take_tail(self, param: Tensor) -> dict[str, Any]:
        """Return what is kept for a parameter's master, its tail in it if it needs one.

        Called at every step, since a parameter may have been unfrozen or cast anew since the last one.
        """
        state, storage = self._kept_for(param), storage_of(param)
        if param.dtype not in SPLIT_DTYPES or storage.param not in (None, param.dtype):
            check_weight(param)
        if param.dtype in SPLIT_DTYPES and storage.rounding is None:
            held = state.get("tail")
            if held is None or held is not storage.tail or held.device != param.device:
                state["tail"] = ensure_tail(param, held)
        else:
            state.pop("tail", None)
        return state

    def _kept_for(self, param: Tensor) -> dict[str, Any]:
        """Return where what belongs to a parameter's master is kept: in its state."""
        return self.state[param]

    def _take_tails(self) -> None:
        """Take the tails that a step would take: a cast since the last one may have made others.

        Raises:
            OptimizerError: the model is in a `full_precision` block.
        """
        for param, _ in self._parameters():
            if storage_of(param).in_full_precision:
                raise OptimizerError(
                    f"inside of a full_precision block, the state of {type(self).__name__} has no masters and fits no "
                    "model outside; leave the block, then save or load it"
                )
            if param.requires_grad or storage_of(param).tail is not None:
                self._take_tail(param)

    def _with_tails_to_save(self, states: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return packed states with tails that belong to the weights as they are now; the given ones stay."""
        saved = dict(states)
        for index, (param, _) in enumerate(self._parameters()):
            if "tail" in states.get(index, {}) and is_edited(param):
                saved[index] = {**states[index], "tail": tail_to_save(param)}
        return saved

    def _marks(self) -> dict[str, Any]:
        """Return what a state dict must be a state of to be loaded."""
        weights = [str(param.dtype).removeprefix("torch.") for param, _ in self._parameters()]
        return {"optimizer": type(self).__name__, "weights": weights}

    def _check_kind(self, state_dict: Mapping[str, Any]) -> None:
        """Raise unless a state dict is one of the same optimizer, groups and weights.

        Raises:
            OptimizerError: it is not.
        """
        name = type(self).__name__
        check_groups(self, state_dict)
        marks = state_dict.get("duotone")
        if marks is None:
            raise OptimizerError(
                f"the state is not one of Duotone's; {name} reads the state of a torch optimizer, or a portable one, "
                "with load_portable_state_dict; torch's get_optimizer_state_dict drops what tells: use save_checkpoint"
            )
        if marks["optimizer"] != name:
            raise OptimizerError(f"the state is one of {marks['optimizer']}, not of {name}")
        for index, (param, _) in enumerate(self._parameters()):
            if f"torch.{marks['weights'][index]}" != str(param.dtype):
                raise OptimizerError(
                    f"the state is of weights in {marks['weights'][index]}, but parameter {index} is in {param.dtype}; "
                    "cast the model to the policy that it was saved under, or go through a portable state"
                )


def run_closure(
    optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor] | None, *scalars: Tensor | None
) -> Tensor | None:
    """Return what a closure returns, with gradients enabled; None if there is none.

    Frameworks give every step a closure, Lightning in manual optimization one that does nothing.

    Raises:
        OptimizerError: the step was given scalars, and the closure changed the gradients that they belong to.
    """
    if closure is None:
        return None
    before = None if all(scalar is None for scalar in scalars) else _gradients(optimizer)
    with torch.enable_grad():
        loss = closure()
    if before is not None and not all(
        old is new and version == version_now
        for (old, version), (new, version_now) in zip(before, _gradients(optimizer), strict=True)
    ):
        raise OptimizerError(
            "the closure changed the gradients after the scaler had read them; call it before the step, or give it to "
            "the scaler: scaler.step(optimizer, closure=closure)"
        )
    return loss


def _gradients(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor | None, int]]:
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    return [(grad, 0 if grad is None else version_of(grad)) for grad in grads]


def check_parameters(params: Iterable[Tensor]) -> None:
    """Raise unless a `MasterOptimizer` can update every one of the parameters.

    Raises:
        OptimizerError: one is neither FP32, BF16 nor FP16, as after `model.double()`.
    """
    for param in params:
        if param.dtype not in _DTYPES:
            way_back = "" if param.is_complex() else "call model.float() after model.double(); "
            raise OptimizerError(
                f"a MasterOptimizer cannot update a parameter in {param.dtype}; allowed are float32, bfloat16 and "
                f"float16: {way_back}leave others out, give them to a torch optimizer of their own, and both to the "
                "scaler: scaler.step(optimizer, other)"
            )


def check_weight(param: Tensor) -> None:
    """Raise unless a `MasterOptimizer` can update a parameter in the dtype that it has now.

    Raises:
        OptimizerError: it is in another dtype than those, or was cast to one 16-bit dtype and converted to the other.
    """
    check_parameters((param,))
    storage = storage_of(param)
    if param.dtype in SPLIT_DTYPES and storage.param in SPLIT_DTYPES and storage.param != param.dtype:
        raise OptimizerError(
            f'parameter "{storage.name}" was cast to {storage.param} and converted to {param.dtype} since, which its '
            "model does not compute in; its master is as it was: cast the model again, to the old policy or to one "
            f"of {param.dtype}, then step"
        )


def check_settings(**settings: Tensor | float) -> None:
    """Raise if a setting is negative or NaN; one on an accelerator is not read.

    Raises:
        OptimizerError: one is.
    """
    for value in settings.values():
        is_readable = not isinstance(value, Tensor) or value.is_cpu
        if is_readable and not bool(value >= 0.0):
            listed_settings = ", ".join(f"{name} {setting}" for name, setting in settings.items())
            raise OptimizerError(f"the settings are {listed_settings}; none may be negative or NaN")


def check_gradient(optimizer: torch.optim.Optimizer, grad: Tensor) -> None:
    """Raise if a gradient is sparse, or in a dtype that is not read.

    Raises:
        OptimizerError: it is.
    """
    if grad.layout is not torch.strided:
        raise OptimizerError(f"{type(optimizer).__name__} takes no sparse gradients; use Embedding(sparse=False)")
    if grad.dtype not in _DTYPES:
        raise OptimizerError(
            f"{type(optimizer).__name__} takes gradients in float32, bfloat16 and float16, not {grad.dtype}; set the "
            "parameter's grad_dtype to one of them, or call model.float() after model.double()"
        )


def check_groups(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state dict, of whatever optimizer, is of parameter groups of the same sizes.

    Raises:
        OptimizerError: it is not, or it is no state dict at all.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise OptimizerError(
            f'a state dict holds "state" and "param_groups", this one {sorted(map(str, state_dict)) or "nothing"}; '
            "give what the state_dict of an optimizer returned"
        )
    saved, own = (
        [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    name = type(optimizer).__name__
    if saved != own:
        raise OptimizerError(f"the state is of parameter groups of {saved} parameters, this {name} has {own}")
    unknown = [index for index in state_dict["state"] if isinstance(index, int) and not 0 <= index < sum(own)]
    if unknown:
        raise OptimizerError(f"the state is of parameters {unknown}, this {name} has {sum(own)}")


def listed(state: Mapping[str, Any]) -> str:
    """Return names, dtypes and shapes of a parameter's state as text.

    >>> listed({"step": torch.tensor(1), "exp_avg": torch.zeros(2, 3), "tail": None})
    'exp_avg float32 (2, 3), step int64 (), tail NoneType'
    """
    tensors = {name: (value.dtype, value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    others = [f"{name} {type(value).__name__}" for name, value in state.items() if name not in tensors]
    return ", ".join(sorted([*_each(tensors), *others])) or "nothing"


def listed_layouts(layouts: Mapping[str, tuple[torch.dtype, torch.Size]]) -> str:
    """Return names, dtypes and shapes of tensors as text, as `listed` does."""
    return ", ".join(sorted(_each(layouts)))


def _each(layouts: Mapping[str, tuple[torch.dtype, torch.Size]]) -> list[str]:
    return [f"{name} {str(dtype).removeprefix('torch.')} {tuple(shape)}" for name, (dtype, shape) in layouts.items()]
