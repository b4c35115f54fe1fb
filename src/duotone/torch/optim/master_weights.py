"""FP32 masters for any torch optimizer.

Between steps a master is a 16-bit weight and its tail, as everywhere in Duotone. For the time of a step a parameter is
represented in the wrapped optimizer by a stand-in, an FP32 parameter that holds the master and the true gradient,
`grad * grad_multiplier`; afterwards the stand-in is encoded into the old weight and tail. So the optimizer computes in
FP32 and keeps FP32 state, and the model's own parameters, with what autograd or DDP attached to them, are never
exchanged: giving one another dtype, for a moment only, would detach the hooks that reduce its gradient.

The stand-ins cost 8 bytes per 16-bit parameter, and 4 per FP32 one, during the step. Left out: optimizers that keep
weights outside of their groups, where no stand-in takes their place; they are refused.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duotone.errors import OptimizerError
from duotone.torch.internals.autograd import increment_version
from duotone.torch.kernels import SPLIT_DTYPES, Rounding, encode
from duotone.torch.kernels.philox import random_16_bits
from duotone.torch.kernels.round_stochastically import round_stochastically
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.optim.base import MasterOptimizer, check_gradient, check_groups, listed, listed_layouts, run_closure
from duotone.torch.optim.edit_watch import EditWatch
from duotone.torch.optim.foreign import fused_step, skips_on_device
from duotone.torch.optim.gathering import numbered
from duotone.torch.optim.portable import check_same_kind, check_same_state, keep_implementation
from duotone.torch.optim.slots import OF_POLICY, ROUNDING_STEP, TAIL, expected
from duotone.torch.optim.stand_ins import stand_ins_for
from duotone.torch.optim.state_tensors import copy_state, in_float32
from duotone.torch.optim.wrappable import check_moments, check_wrappable
from duotone.torch.parameters import shards
from duotone.torch.parameters.edits import record
from duotone.torch.parameters.masters import check_in_place, needs_tail
from duotone.torch.parameters.plain_steps import ignore_plain_steps
from duotone.torch.parameters.storage import set_tail, storage_of

# schedule-free optimizers train at one point and are evaluated at another: these go from one to the other
_EXCHANGES = ("train", "eval")


class MasterWeights(MasterOptimizer):
    """Any torch optimizer, updating FP32 masters of 16-bit weights.

    It shares groups, state and defaults with the wrapped optimizer, so a scheduler may be built on either; only this
    one steps, loads and saves. A skipped step leaves everything as it was: a fused torch optimizer skips on the device,
    for any other, and in a first step, `found_inf` is waited for. If the optimizer raises, 16-bit weights and all
    gradients are as before.

    Args:
        optimizer: a torch optimizer, or one written like them. State that it already has in a weight's 16-bit dtype
            becomes FP32.
        seed: of the random bits where weights without a master are rounded stochastically; without meaning elsewhere.

    Attributes:
        optimizer: the wrapped one.
        seed: as above.

    Raises:
        OptimizerError: it cannot be wrapped: `LBFGS`, `SparseAdam`, one with masters of its own or with references to
            weights outside of its groups; or a parameter is neither FP32, BF16 nor FP16, or its policy asks for
            moments in another dtype than FP32.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1, bias=False), "bf16")
    >>> optimizer = MasterWeights(torch.optim.NAdam(model.parameters(), lr=1e-4))
    >>> before = dt.master_weights(model)["weight"]
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> change = before - dt.master_weights(model)["weight"]
    >>> change.abs().max() > 0, optimizer.state[model.weight]["exp_avg"].dtype
    (tensor(True), torch.float32)
    """

    # beside the wrapped optimizer's state
    slots = (TAIL, ROUNDING_STEP)

    def __init__(self, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
        check_wrappable(optimizer)
        check_moments(optimizer, [param for group in optimizer.param_groups for param in group["params"]])
        # not torch's constructor, which would add the groups a second time
        self.__setstate__({"optimizer": optimizer, "seed": seed, "_kept": defaultdict(dict)})
        self._take_up([param for param, _ in self._parameters()])

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "seed", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer: torch.optim.Optimizer = state["optimizer"]
        self.seed: int = state["seed"]
        self._kept: defaultdict[Tensor, dict[str, Tensor]] = state["_kept"]
        self._begun: set[Tensor] = set()
        self._is_inside = False
        self._edits = EditWatch()
        super().__setstate__({})
        # torch copies and pickles optimizers without their hooks
        ignore_plain_steps(self.optimizer)
        self.optimizer.register_step_pre_hook(self._refuse_outside)
        self.optimizer.register_load_state_dict_pre_hook(self._refuse_outside)
        for name in _EXCHANGES:
            if callable(getattr(type(self.optimizer), name, None)):
                # whoever calls it, and on which of the two
                exchange = partial(self._exchange_weights, name)
                vars(self.optimizer)[name] = vars(self)[name] = exchange

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state, in which there are no tails."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @uncompiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_multiplier: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Let the wrapped optimizer update the masters; arguments are those of `AdamW.step`.

        A closure is called once, before the step: the wrapped optimizer does not get to see it.
        """
        loss = run_closure(self, closure, grad_multiplier, found_inf)
        params = {}
        for index, (param, _) in enumerate(self._parameters()):
            if param.grad is not None:
                check_gradient(self, param.grad)
                params[param] = index
            else:
                check_in_place(param)
        check_moments(self.optimizer, params)
        # a skip on the device in a first step would leave states behind that were made for it
        waits = not (skips_on_device(self.optimizer) and self._begun.issuperset(params))
        if found_inf is not None and waits:
            if found_inf:
                return loss
            found_inf = None
        self._edits.before_step()
        stand_ins = self._stand_ins(params, grad_multiplier)
        with self._represented_by(stand_ins):
            if found_inf is None:
                self.optimizer.step()
            else:
                # the stand-ins' gradients carry no scale any more
                fused_step(self.optimizer, None, found_inf)
        self._edits.after_step(self._write(params, stand_ins, found_inf))
        self._begun.update(params)
        return loss

    @torch.no_grad()
    def _exchange_weights(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the wrapped optimizer that writes weights outside of a step, on FP32 masters."""
        params = {param: index for index, (param, _) in enumerate(self._parameters()) if param.requires_grad}
        stand_ins = self._stand_ins(params, None)
        with self._represented_by(stand_ins):
            result = getattr(type(self.optimizer), name)(self.optimizer, *args, **kwargs)
        self._write(params, stand_ins, None)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, the tails among its states, and what they are states of."""
        self._take_tails()
        packed = self.optimizer.state_dict()
        states = dict(packed["state"])
        for index, (param, _) in enumerate(self._parameters()):
            if self._kept.get(param):
                states[index] = {**states.get(index, {}), **self._kept[param]}
        return {**packed, "state": self._with_tails_to_save(states), "duotone": self._marks()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load a state dict of the same optimizer, wrapped, bit for bit; no tensor changes its dtype.

        Raises:
            OptimizerError: it is the state of another kind of optimizer, or of other weights, or a tail is missing or
                of another shape or dtype. Nothing is loaded then.
        """
        self._check_kind(state_dict)
        states = state_dict["state"]
        for index, (param, _) in enumerate(self._parameters()):
            self._check_kept(param, states.get(index, {}), index)
        self._replace(state_dict, states)
        self.seed = state_dict["duotone"]["seed"]
        for index, (param, _) in enumerate(self._parameters()):
            loaded = states.get(index, {})
            self._kept[param] = {
                name: copy_state(loaded[name], param.device, param) for name in OF_POLICY if name in loaded
            }
            if "tail" in loaded:
                set_tail(param, self._kept[param]["tail"])

    def portable_state_dict(self) -> dict[str, Any]:
        """Return a copy of the wrapped optimizer's own state dict, which it loads unwrapped, for FP32 weights.

        Masters are not part of it: give that optimizer weights from `master_weights`.
        """
        return copy.deepcopy(self.optimizer.state_dict())

    def load_portable_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what the wrapped kind of optimizer, or `portable_state_dict`, returned as its state.

        State in a 16-bit dtype becomes FP32. Masters and weights stay as they are; `load_master_weights` sets them.

        Raises:
            OptimizerError: it is the state of another kind of optimizer or model. Nothing is loaded then.
        """
        if "duotone" in state_dict:
            raise OptimizerError("the state is one of Duotone's own; load it with load_state_dict")
        check_groups(self, state_dict)
        groups = []
        for own, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            check_same_kind(self.optimizer, own, loaded)
            groups.append(keep_implementation(own, loaded))
        states = {key: in_float32(state, *SPLIT_DTYPES) for key, state in state_dict["state"].items()}
        for index, (param, _) in enumerate(self._parameters()):
            if states.get(index):
                check_same_state(self.optimizer, param, states[index], index)
        self._take_tails()
        self._replace({**state_dict, "param_groups": groups}, states)

    def _append_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def _take_up(self, params: list[Tensor]) -> None:
        check_moments(self.optimizer, params)
        super()._take_up(params)
        for param in params:
            # an optimizer that makes its state at once made it for the 16-bit weight
            if param.dtype in SPLIT_DTYPES and self.state.get(param):
                self.state[param] = in_float32(self.state[param], param.dtype)

    def _take_tail(self, param: Tensor) -> dict[str, Any]:
        kept = super()._take_tail(param)
        if "tail" not in kept and param.dtype in SPLIT_DTYPES and storage_of(param).rounding == Rounding.STOCHASTIC:
            step = kept.get("rounding_step", torch.zeros((), dtype=torch.int64))
            kept["rounding_step"] = step.to(param.device)
        else:
            kept.pop("rounding_step", None)
        return kept

    def _kept_for(self, param: Tensor) -> dict[str, Any]:
        # many optimizers begin with a parameter when its state is empty
        return self._kept[param]

    def _refuse_outside(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_inside:
            raise OptimizerError(
                f"this {type(optimizer).__name__} is wrapped in MasterWeights, and would lose small updates without; "
                "step, save and load the MasterWeights instead"
            )

    def _stand_ins(self, params: Collection[Tensor], grad_multiplier: Tensor | None) -> dict[Tensor, nn.Parameter]:
        for param in params:
            self._take_tail(param)
        return stand_ins_for(params, grad_multiplier, self._edits.on)

    @contextmanager
    def _represented_by(self, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
        self._exchange(stand_ins)
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False
            self._exchange({stand_in: param for param, stand_in in stand_ins.items()})

    def _exchange(self, new: Mapping[Tensor, Tensor]) -> None:
        # a tensor's hash is a call of a function in Python
        by_id = dict(zip(map(id, new), new.values(), strict=True))

        def exchanged(params: Collection[Tensor]) -> list[Tensor]:
            return list(map(by_id.get, map(id, params), params))

        for group in self.param_groups:
            # in place, for whoever holds the list
            group["params"][:] = exchanged(group["params"])
        items = list(zip(exchanged(self.state), self.state.values(), strict=True))
        self.state.clear()
        self.state.update(items)

    def _write(
        self, params: Mapping[Tensor, int], stand_ins: Mapping[Tensor, Tensor], found_inf: Tensor | None
    ) -> list[Tensor]:
        """Encode stand-ins, which stand in the order of what they stand for, and return the parameters with a tail."""
        split = []
        for (param, index), stand_in in zip(params.items(), stand_ins.values(), strict=True):
            tail = storage_of(param).tail
            self._write_one(param, stand_in.detach(), tail, index, found_inf)
            if tail is not None:
                split.append(param)
        record(*split, unless=found_inf)
        return split

    def _write_one(
        self, param: Tensor, master: Tensor, tail: Tensor | None, index: int, found_inf: Tensor | None
    ) -> None:
        resident, master = shards.local(param), shards.local(master)
        if param.dtype == torch.float32:
            # it was not dense, or the optimizer put a new tensor in its place
            if master.data_ptr() != resident.data_ptr():
                resident.copy_(master)
            increment_version(param)
            return
        if tail is not None:
            weight, new_tail = encode(master, param.dtype)
            _write_unless(found_inf, shards.local(tail), new_tail)
        elif storage_of(param).rounding == Rounding.STOCHASTIC:
            weight = self._rounded(param, master, index, found_inf)
        else:
            weight = master.to(param.dtype)
        _write_unless(found_inf, resident, weight)
        if resident is not param:
            increment_version(param)

    def _rounded(self, param: Tensor, master: Tensor, index: int, found_inf: Tensor | None) -> Tensor:
        step = self._kept[param]["rounding_step"]
        number = numbered(index, sum(len(group["params"]) for group in self.param_groups), param)
        bits = random_16_bits(master.numel(), seed=self.seed, step=step, parameter=number)
        # random bits go by the order of memory
        bits = bits.as_strided(master.size(), master.stride())
        self._kept[param]["rounding_step"] = step + 1 if found_inf is None else step + ~found_inf.to(step.device)
        return round_stochastically(master, param.dtype, bits)

    def _marks(self) -> dict[str, Any]:
        shapes = [list(param.shape) for param, _ in self._parameters()]
        return {**super()._marks(), "wrapped": type(self.optimizer).__name__, "shapes": shapes, "seed": self.seed}

    def _check_kind(self, state_dict: Mapping[str, Any]) -> None:
        super()._check_kind(state_dict)
        marks, own = state_dict["duotone"], self._marks()
        if marks["wrapped"] != own["wrapped"]:
            raise OptimizerError(f"the state is one of a wrapped {marks['wrapped']}, not of {own['wrapped']}")
        for index, (saved, shape) in enumerate(zip(marks["shapes"], own["shapes"], strict=True)):
            if saved != shape:
                raise OptimizerError(
                    f"the state is of a weight of shape {tuple(saved)}, but parameter {index} has {tuple(shape)}; load "
                    "it into the optimizer of the same model"
                )

    def _check_kept(self, param: Tensor, loaded: Mapping[str, Any], index: int) -> None:
        held = {name: loaded[name] for name in OF_POLICY if name in loaded}
        slots = []
        if needs_tail(param) and (param.requires_grad or loaded):
            slots.append(TAIL)
        if (
            param.dtype in SPLIT_DTYPES
            and storage_of(param).rounding == Rounding.STOCHASTIC
            and (param.requires_grad or loaded)
        ):
            slots.append(ROUNDING_STEP)
        needed = listed_layouts(expected(slots, param))
        if (listed(held) if held else "") != needed:
            raise OptimizerError(
                f"the state of parameter {index} holds {listed(held)} beside that of {type(self.optimizer).__name__}, "
                f"needed is {needed or 'nothing'}; load a state dict that was made under the same policy"
            )

    def _replace(self, state_dict: Mapping[str, Any], states: Mapping[Any, Any]) -> None:
        # torch would cast every state to the weight's dtype, so it is given the groups only
        rest = {key: value for key, value in state_dict.items() if key not in ("state", "duotone")}
        self._is_inside = True
        try:
            self.optimizer.load_state_dict({**rest, "state": {}})
        finally:
            self._is_inside = False
        self._begun.clear()
        params = list(self._parameters())
        for key, loaded in states.items():
            if not isinstance(key, int):
                self.state[key] = copy.deepcopy(loaded)
                continue
            param, group = params[key]
            own = {name: value for name, value in loaded.items() if name not in OF_POLICY}
            # as torch does: step counts stay on the host unless a kernel reads them
            step_device = param.device if group.get("fused") or group.get("capturable") else None
            if own:
                self.state[param] = {
                    name: copy_state(value, step_device if name == "step" else param.device, param)
                    for name, value in own.items()
                }


def _write_unless(found_inf: Tensor | None, target: Tensor, value: Tensor) -> None:
    target.copy_(value if found_inf is None else torch.where(found_inf.to(target.device), target, value))
