"""Bit-exact save and resume of everything that the next step depends on.

A checkpoint is a folder (`folder`) of weights, tails, buffers, optimizer, scaler, schedule, average, random states
and the policy. Loading checks all of it against the model before a single weight changes, and refuses another policy's
checkpoint unless asked to convert, which goes through the FP32 masters. Several ranks save and load together
(`shard_files`): of DTensors each its parts, on any number of ranks, everything else is rank 0's.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duotone.errors import CheckpointError, DuotoneError
from duotone.policy import Policy
from duotone.ranks import Ranks
from duotone.torch.averaging.applied import check_own_weights
from duotone.torch.averaging.average import Average
from duotone.torch.casting.cast import policy_of
from duotone.torch.checkpoints import shard_files
from duotone.torch.checkpoints.folder import is_sharded, read_folder, read_manifest, write_folder
from duotone.torch.checkpoints.process_group import check_same, ranks_of
from duotone.torch.checkpoints.random_states import random_states, restore_of_rank
from duotone.torch.checkpoints.well_formed import check_contents, check_like
from duotone.torch.kernels import decode
from duotone.torch.optim.slots import OF_POLICY, follows_policy, is_cut
from duotone.torch.parameters.edits import record, tail_to_save
from duotone.torch.parameters.full_precision import check_not_in_block
from duotone.torch.parameters.masters import beyond_range, ensure_tail, has_lost_tail, needs_tail, write_master
from duotone.torch.parameters.shards import is_shard, like, local, reshard
from duotone.torch.parameters.storage import storage_of
from duotone.torch.scaling.loss_scaler import LossScaler


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: LossScaler | None = None,
    *,
    scheduler: Any = None,
    average: Average | None = None,
    progress: Mapping[str, Any] | None = None,
    process_group: Any = None,
) -> Path:
    """Save everything that the next step depends on into a folder.

    Where torch.distributed runs several ranks, all of them call this, and return once the folder is in place.

    Args:
        path: the folder, the same one for every rank, on a disk that all of them can write to. A checkpoint at this
            path is replaced once the new one is complete.
        model: weights, tails and persistent buffers are saved; tied ones once. A model in `DistributedDataParallel` is
            saved as the model itself; of DTensors, as `fully_shard` makes them, every rank saves its parts.
        optimizer: its state, Duotone's or torch's.
        scaler: its settings and state.
        scheduler: anything with a `state_dict` of JSON values and tensors.
        average: its settings and averages.
        progress: the caller's own position, as JSON values and tensors: step, epoch, ...
        process_group: the ranks that save together; default all of them.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: a state holds what is neither a tensor nor JSON, a parameter has lost its tail to torch's
            `fully_shard`, something else than a checkpoint is at `path`, or writing failed, on this rank or another.
            What was at `path` before is untouched.
        AverageError: the model holds averages, not its own weights, and an optimizer or average is saved with it.

    >>> import tempfile, duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1), "bf16")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(Path(folder, "last"), model, progress={"step": 3})
    ...     load_checkpoint(path, model)
    {'step': 3}
    """
    path, model, ranks = Path(path), _unwrapped(model), ranks_of(process_group)
    contents = ranks.agree(lambda: _contents(model, optimizer, scaler, scheduler, average, progress))
    if ranks.size == 1 and not _has_shards(model):
        write_folder(path, contents)
        return path
    contents["random"], *contents["random_of_other_ranks"] = ranks.gather(contents["random"])
    shard_files.write_folder(path, contents, ranks)
    return path


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: LossScaler | None = None,
    *,
    scheduler: Any = None,
    average: Average | None = None,
    convert: bool = False,
    process_group: Any = None,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` saved, bit for bit, random states included.

    Where torch.distributed runs several ranks, all of them call this. Their number may differ from the number that
    saved, and the model may have been sharded then or be sharded now. Each rank gets its random states if the number
    is the same; otherwise rank 0 gets rank 0's, and every other rank is seeded from that state and its number.

    Args:
        path: the folder, the same one for every rank.
        model: the model, cast to the policy that the checkpoint was saved under; sharded or wrapped as it will be used.
        optimizer: to be restored, which needs it in the checkpoint; None to leave it. So are the next three.
        scaler: as `optimizer`.
        scheduler: as `optimizer`.
        average: as `optimizer`.
        convert: load a checkpoint of another policy: FP32 masters and moments are kept, weights and tails are made
            from them for the model's policy, and the scaler stays as it is.
        process_group: the ranks that load together; default all of them.

    Returns:
        The `progress` that was saved.

    Raises:
        CheckpointError: the folder is missing, damaged, of another policy, or does not fit the model, the optimizer
            or the scheduler, on this rank or another. Nothing is changed then, on any rank.
        AverageError: the model holds averages, which would be taken out again.
    """
    path, model, ranks = Path(path), _unwrapped(model), ranks_of(process_group)
    reshard(model)
    given = {"optimizer": optimizer, "scaler": scaler, "scheduler": scheduler, "average": average}
    check_same(ranks, [name for name, part in given.items() if part is not None], "choice of what to load")
    contents = _read(path, model, given, ranks)
    converting = ranks.agree(lambda: _check(path, contents, model, given, convert))
    _load_all(path, ranks.agree(lambda: _states(contents, given, converting)), ranks)
    _restore_model(contents, model, converting)
    restore_of_rank([contents["random"], *contents.get("random_of_other_ranks", [])], ranks.rank, ranks.size)
    return contents["progress"]


def _contents(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scaler: LossScaler | None,
    scheduler: Any,
    average: Average | None,
    progress: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what a checkpoint holds: of this rank, where there are several."""
    for param in model.parameters():
        check_not_in_block(param, "save_checkpoint")
    policy = policy_of(model)
    _check_tails(model)
    if optimizer is not None:
        check_own_weights([*model.parameters()], "save a checkpoint to resume from")
    # first, for it lets schedulers advance, which changes an optimizer's learning rates
    scaler_state = None if scaler is None else scaler.state_dict()
    return {
        "policy": None if policy is None else policy.to_json(),
        "model": _model_tensors(model),
        "tails": _tails(model),
        # for those who read weights without a model
        "buffers": [name for name, value in _model_tensors(model).items() if not isinstance(value, nn.Parameter)],
        "tied": _tied_names(model),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "optimizer_parameters": None if optimizer is None else _parameter_names(model, optimizer),
        "scaler": scaler_state,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "average": None if average is None else average.state_dict(),
        "random": random_states(),
        "progress": dict(progress or {}),
    }


def _read(path: Path, model: nn.Module, given: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return a checkpoint's contents, of DTensors this rank's parts; of other ranks only what is asked for."""
    if ranks.size == 1 and not _has_shards(model) and not is_sharded(read_manifest(path)):
        return read_folder(path)
    return shard_files.read_folder(path, ranks, _cut_like(model, given["optimizer"]), _left_out(given))


def _left_out(given: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, part in given.items() if part is None)


def _cut_like(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Callable[[str, torch.Size], Tensor | None]:
    """Return a function of a tensor's name in a checkpoint and its shape that returns the DTensor it is cut like."""
    values = _model_tensors(model)
    groups = [] if optimizer is None else optimizer.param_groups
    params = dict(enumerate(param for group in groups for param in group["params"]))

    def cut_like(name: str, shape: torch.Size) -> Tensor | None:
        part, _, rest = name.partition(".")
        if part == "average":
            _, _, rest = rest.partition(".")
        whole = values.get(rest) if part in ("model", "tails", "average") else None
        if name.startswith("optimizer.state."):
            param = params.get(int(name.split(".")[2]))
            if param is not None and is_cut(optimizer, name.rpartition(".")[2], shape, param):
                whole = param
        return whole if whole is not None and is_shard(whole) and whole.shape == shape else None

    return cut_like


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model in `DistributedDataParallel`, so that its names are those of one process."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _has_shards(model: nn.Module) -> bool:
    return any(is_shard(value) for value in (*model.parameters(), *model.buffers()))


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, tied ones under their first name only."""
    seen: set[int] = set()
    unique = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f'"{name}" in the model\'s state is a {type(value).__name__}; only tensors are saved')
        if id(value) not in seen:
            seen.add(id(value))
            unique[name] = value
    return unique


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of each tensor that has several, by the others."""
    first = {id(value): name for name, value in _model_tensors(model).items()}
    return {
        name: first[id(value)] for name, value in model.state_dict(keep_vars=True).items() if first[id(value)] != name
    }


def _tails(model: nn.Module) -> dict[str, Tensor]:
    tails = {name: tail_to_save(param) for name, param in model.named_parameters()}
    return {name: tail for name, tail in tails.items() if tail is not None}


def _check_tails(model: nn.Module) -> None:
    lost = [name for name, param in model.named_parameters() if has_lost_tail(param)]
    if lost and policy_of(model) is not None:
        raise CheckpointError(
            f'"{lost[0]}" has lost its tail, and with it the lower bits of its FP32 master; shard a cast model with '
            "duotone.torch.fully_shard instead of torch's"
        )


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {param: name for name, param in model.named_parameters()}
    return [[names.get(param, "?") for param in group["params"]] for group in optimizer.param_groups]


def _check(path: Path, contents: Mapping[str, Any], model: nn.Module, given: Mapping[str, Any], convert: bool) -> bool:
    """Raise unless a checkpoint fits what it is to be loaded into; return whether it has to be converted."""
    check_contents(path, contents, _left_out(given))
    for param in model.parameters():
        check_not_in_block(param, "load_checkpoint")
    check_own_weights([*model.parameters()], "load a checkpoint")
    converting = _check_policy(path, contents, model, convert)
    converting |= convert and _have_other_dtypes(contents["model"], model)
    _check_model(path, contents["model"], model, converting)
    _check_tails(model)
    if converting:
        _check_range(path, contents, model)
    for name, part in given.items():
        # folders of earlier versions know of no averages
        if part is not None and contents.get(name) is None:
            raise CheckpointError(f"{path} holds no {name}; load it without one")
    optimizer = given["optimizer"]
    if optimizer is not None and _parameter_names(model, optimizer) != contents["optimizer_parameters"]:
        raise CheckpointError(f"{path} was saved with other parameters in its optimizer, or in another order")
    return converting


def _states(
    contents: Mapping[str, Any], given: Mapping[str, Any], converting: bool
) -> list[tuple[Any, dict[str, Any]]]:
    """Return what is to be loaded besides the model, each with its state."""
    states = {name: contents[name] for name, part in given.items() if part is not None}
    if converting:
        states.pop("scaler", None)
        if "optimizer" in states:
            states["optimizer"] = _converted(states["optimizer"], given["optimizer"])
    return [(given[name], states[name]) for name in ("optimizer", "scheduler", "scaler", "average") if name in states]


def _check_policy(path: Path, contents: Mapping[str, Any], model: nn.Module, convert: bool) -> bool:
    current = policy_of(model)
    saved = None if contents["policy"] is None else Policy.from_json(contents["policy"])
    if saved == current:
        return False
    if not convert:
        names = [f'policy "{policy.name}"' if policy else "no policy" for policy in (saved, current)]
        raise CheckpointError(
            f"{path} was saved under {names[0]}, the model is under {names[1]}; "
            "cast the model to the checkpoint's policy, or pass convert=True"
        )
    return True


def _check_model(path: Path, saved: Mapping[str, Tensor], model: nn.Module, converting: bool) -> None:
    expected = _model_tensors(model)
    for name in sorted(expected.keys() ^ saved.keys()):
        where = "the checkpoint" if name in expected else "the model"
        raise CheckpointError(f'{path} does not fit the model: {where} has no "{name}"')
    for name, want in expected.items():
        got = saved[name]
        if got.shape != want.shape or (got.dtype != want.dtype and not converting):
            raise CheckpointError(
                f'{path} does not fit the model: "{name}" is {got.dtype} {tuple(got.shape)} there '
                f"and {want.dtype} {tuple(want.shape)} here{'; pass convert=True' if got.shape == want.shape else ''}"
            )


def _have_other_dtypes(saved: Mapping[str, Tensor], model: nn.Module) -> bool:
    return any(value.dtype != saved[name].dtype for name, value in _model_tensors(model).items() if name in saved)


def _check_range(path: Path, contents: Mapping[str, Any], model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if name in contents["model"] and param.dtype == torch.float16:
            largest = beyond_range(local(_saved_master(contents, name)), param.dtype)
            if largest is not None:
                raise CheckpointError(
                    f'{path} cannot be converted: "{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; '
                    "keep its module in FP32 by a rule"
                )


def _saved_master(contents: Mapping[str, Any], name: str) -> Tensor:
    weight, tail = contents["model"][name], contents["tails"].get(name)
    return weight.float() if tail is None else like(decode(local(weight), local(tail)), weight)


def _load_all(path: Path, parts: list[tuple[Any, dict[str, Any]]], ranks: Ranks) -> None:
    """Load every part's state, or none: what was loaded is put back if another part or rank fails."""
    undo = []

    def load() -> None:
        try:
            for part, state in parts:
                # tensors of these are replaced on loading, another part's may be written in place
                old, is_replaced = part.state_dict(), isinstance(part, torch.optim.Optimizer | Average)
                undo.append((part, old if is_replaced else copy.deepcopy(old)))
                part.load_state_dict(state)
                if isinstance(part, torch.optim.Optimizer | LossScaler):
                    check_like(path, state, old)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            kind = "" if isinstance(error, DuotoneError) else f"{type(error).__name__}: "
            raise CheckpointError(f"{path} does not fit: {kind}{error}") from error

    try:
        ranks.agree(load)
    except Exception:
        for part, old in reversed(undo):
            part.load_state_dict(old)
        raise


def _converted(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state under the current policy: moments in its dtype, tails to fill from the masters."""
    own = optimizer.state_dict()
    if "duotone" not in state_dict or "duotone" not in own:
        return state_dict
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {}
    for index, param in enumerate(params):
        kept = {key: value for key, value in state_dict["state"].get(index, {}).items() if key not in OF_POLICY}
        kept = {
            key: value.to(storage_of(param).state) if follows_policy(optimizer, key) else value
            for key, value in kept.items()
        }
        if kept and needs_tail(param):
            kept["tail"] = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
        states[index] = kept | {key: value for key, value in own["state"].get(index, {}).items() if key in OF_POLICY}
    marks = {**state_dict["duotone"], "weights": own["duotone"]["weights"]}
    return {**state_dict, "state": {index: state for index, state in states.items() if state}, "duotone": marks}


def _restore_model(contents: Mapping[str, Any], model: nn.Module, converting: bool) -> None:
    with torch.no_grad():
        for name, target in _model_tensors(model).items():
            value, tail = contents["model"][name], contents["tails"].get(name)
            if converting and isinstance(target, nn.Parameter) and target.dtype != value.dtype:
                write_master(target, _saved_master(contents, name))
                continue
            target.copy_(value)
            own_tail = storage_of(target).tail
            if own_tail is None and tail is not None and needs_tail(target):
                # a frozen weight that was edited in full precision has one
                own_tail = ensure_tail(target)
            if own_tail is not None:
                own_tail.zero_() if tail is None else own_tail.copy_(tail)
                record(target)
