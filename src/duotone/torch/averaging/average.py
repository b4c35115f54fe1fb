"""An average of a model's FP32 masters, 4 bytes per parameter, moved by one kernel that reads weights and tails.

    average += (master - average) * share

`schedule` says what the share is, `steps` whether there is anything new to average, `applied` puts averages into the
model for a while. A 16-bit copy of a model cannot be averaged into: its small steps are rounded away.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from duotone.errors import AverageError, DuotoneWarning
from duotone.torch import kernels
from duotone.torch.averaging.applied import check_own_weights, holding
from duotone.torch.averaging.schedule import Schedule
from duotone.torch.averaging.steps import Steps
from duotone.torch.averaging.store import Store
from duotone.torch.parameters import shards


class Average:
    """An average of a model's FP32 masters, exponential or equal, for evaluation and for export.

    Call `update` after every optimizer step. A step that was skipped is not averaged, and nobody has to be told: the
    average sees the steps of the model's optimizers, and the flag of a skip stays on the device. The first update takes
    the masters as they are; to begin later, begin to call it later. Frozen parameters are not kept; one that
    is unfrozen is taken up by the next update.

    It costs 4 bytes per parameter, and an update moves 12: weight 2, tail 2 and average 4 are read, the average is
    written. NaN and Inf in a master stay in the average.

    Args:
        model: the model, cast or not, after `fully_shard` or `data_parallel`. Of a sharded one each rank averages its
            part.
        decay: what stays of the average in an update; None for an average in which every update counts alike (SWA).
        warmup_power: of a warm-up: the decay of update `n`, from 0 on, is at most
            `1 - (1 + n / warmup_gamma)^-warmup_power`. 2/3 suits a million updates, 3/4 less. None for none.
        warmup_gamma: see above.
        average_buffers: whether floating-point buffers, such as running statistics of batch norms, are averaged too, in
            FP32. Otherwise the model's own are used.
        backend: whose kernels run, as for optimizers.

    Raises:
        AverageError: a setting is out of range.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1), "bf16")
    >>> optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("bf16")
    >>> average = Average(model, decay=0.99)
    >>> for _ in range(3):
    ...     scaler.backward(model(torch.ones(1, 2)).sum())
    ...     report = scaler.step(optimizer)
    ...     average.update()
    >>> with average.applied(model):
    ...     evaluated = model(torch.ones(1, 2))
    >>> average.updates.item(), average.model_state_dict()["weight"].dtype
    (3, torch.float32)
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | None = 0.999,
        *,
        warmup_power: float | None = None,
        warmup_gamma: float = 1.0,
        average_buffers: bool = False,
        backend: kernels.Backend = "auto",
    ) -> None:
        self._schedule = Schedule(decay, warmup_power, warmup_gamma)
        self._store = Store(_unwrapped(model), with_buffers=average_buffers)
        self._backend: kernels.Backend = backend
        self._has_updated = self._has_warned = False
        devices = [param.device for param in self._store.params.values()]
        kernels.check_backend(backend, devices)
        self._updates = torch.zeros((), dtype=torch.int64, device=devices[0] if devices else "cpu")
        self._steps = Steps(self._store.params.values())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(self._schedule).items())
        return f"Average({type(self._store.model).__name__}, {settings}, updates={self._updates.item()})"

    @property
    def updates(self) -> Tensor:
        """How often the average was updated, int64, 0-d, on the device; skipped steps are not among them."""
        return self._updates

    @property
    def size_bytes(self) -> int:
        """How many bytes the averages take, of buffers too; of sharded parameters, those of this rank's parts."""
        return self._store.size_bytes

    @kernels.uncompiled
    @torch.no_grad()
    def update(self) -> None:
        """Average what the last step made of the masters; do nothing if it was skipped, or if there was none.

        The device is not waited for.

        Raises:
            AverageError: the model holds averages, or a parameter was replaced or has another shape.
        """
        self._check_own_weights("update an average")
        skipped = self._steps.take()
        if skipped is True:
            return
        known = len(self._store.params)
        batches = self._store.batches()
        if len(self._store.params) != known:
            self._steps.follow(self._store.params.values())
        if skipped is False:
            skipped = torch.zeros((), dtype=torch.bool, device=self._updates.device)
        skipped = skipped.to(self._updates.device)
        share = self._schedule.share(self._updates)
        for device, batch in batches.items():
            kernels.average(batch, share.to(device), skipped.to(device), self._backend)
        for value, kept in self._store.others():
            moved = torch.where(share == 1.0, value, kept + (value - kept) * share)
            kept.copy_(torch.where(skipped, kept, moved))
        self._updates += ~skipped
        self._has_updated = True

    @contextmanager
    def applied(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Put the averages into a model for the time of a block, and its own weights back exactly.

        A cast model computes with the averages rounded to its 16-bit weights. Their other bits are in the tails, so
        that whatever reads masters inside gets the averages. Buffers are after the block what they were before.

        Args:
            model: the model that is averaged, or another one of the same names and shapes; default the former.

        Returns:
            A context manager that gives the model.

        Raises:
            AverageError: the model holds averages already, or is stepped inside, or is another kind of model.
        """
        target = self._store.model if model is None else _unwrapped(model)
        shards.reshard(target)
        named = dict(target.named_parameters())
        params = {name: named.get(name) for name in self._store.params}
        if not {id(param) for param in self._store.params.values()}.isdisjoint(map(id, named.values())):
            # the model that is averaged, whatever is around it
            params = self._store.params
        averages = {}
        for name, average in self._store.averages.items():
            param = params[name]
            if param is None or param.shape != average.shape:
                got = "none" if param is None else f"one of shape {tuple(param.shape)}"
                raise AverageError(
                    f'the average is of a parameter "{name}" of shape {tuple(average.shape)}, the model has {got}; '
                    "give the model that is averaged, or one built alike"
                )
            averages[param] = average
        check_own_weights(list(averages), "apply an average")
        self._warn_if_never_updated(stacklevel=4)
        buffers = dict(target.named_buffers())
        averages_of_buffers = {buffers[name]: kept for name, kept in self._store.buffers.items() if name in buffers}
        with holding(target, averages, averages_of_buffers):
            yield target if model is None else model

    def model_state_dict(self) -> dict[str, Any]:
        """Return a state dict for an uncast model: averages in FP32, tied ones under each name, buffers.

        Frozen parameters give their masters, and buffers are averaged or the model's own. Tensors are new; of DTensors
        each rank has its part. `duotone.torch.export`, inside of `applied`, writes files.

        >>> import duotone.torch as dt
        >>> model = dt.cast(nn.Linear(2, 1), "bf16")
        >>> nn.Linear(2, 1).load_state_dict(Average(model).model_state_dict())
        <All keys matched successfully>
        """
        self._warn_if_never_updated(stacklevel=3)
        return self._store.model_state()

    def state_dict(self) -> dict[str, Any]:
        """Return settings, number of updates and averages, as `load_state_dict` takes them; waits for the device.

        Raises:
            AverageError: the model holds averages, so that a checkpoint would hold them as its weights.
        """
        self._check_own_weights("save an average")
        return {
            "settings": {**asdict(self._schedule), "average_buffers": self._store.with_buffers},
            "updates": self._updates.item(),
            "averages": dict(self._store.averages),
            "buffers": dict(self._store.buffers),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, settings included.

        Raises:
            AverageError: it is not the state of an average of such a model, or the model holds averages. Nothing is
                loaded then.
        """
        self._check_own_weights("load an average")
        try:
            settings = dict(state_dict["settings"])
            with_buffers = bool(settings.pop("average_buffers"))
            schedule, updates = Schedule(**settings), int(state_dict["updates"])
            averages, buffers = dict(state_dict["averages"]), dict(state_dict["buffers"])
        except (KeyError, TypeError, ValueError) as error:
            raise AverageError(f"this is not the state of an Average: {error}") from error
        self._store.load(averages, buffers)
        self._store.with_buffers = with_buffers
        self._schedule = schedule
        self._updates.fill_(updates)
        self._has_updated = updates > 0
        self._steps.follow(self._store.params.values())

    def _check_own_weights(self, action: str) -> None:
        check_own_weights(self._store.params.values(), action)

    def _warn_if_never_updated(self, stacklevel: int) -> None:
        if not self._has_updated and not self._has_warned and self._store.have_moved():
            self._has_warned = True
            warnings.warn(
                "this Average was never updated, but the model was trained since it was built, so it holds the "
                "weights of then; call average.update() after every step",
                DuotoneWarning,
                stacklevel=stacklevel,
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model in `DistributedDataParallel`, so that names are those of one process."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
