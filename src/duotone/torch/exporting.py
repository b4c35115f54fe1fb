"""The weights of a model for those who know nothing of masters: a plain state dict, a file, or a Hugging Face folder.

Weights are the FP32 masters, or those rounded to 16 bits as everywhere in Duotone: to BF16 to nearest with ties away
from zero, which is the resident weight, to FP16 to nearest even. NaN, Inf and -0 stay, and what FP16 cannot hold is
refused. Buffers, and parameters in FP64, integers and complex numbers, stay as they are.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from duotone.durable_files import make_folder, partial_path, replace_text, replacing
from duotone.errors import CheckpointError, FormatError
from duotone.torch.checkpoints.process_group import check_same, ranks_of
from duotone.torch.checkpoints.saved_weights import saved_weights
from duotone.torch.internals.compiler import original_of
from duotone.torch.kernels import SPLIT_DTYPES, encode
from duotone.torch.parameters.masters import beyond_range, check_not_lost, read_master
from duotone.torch.parameters.shards import is_shard, reshard
from duotone.torch.weight_files import check_suffix, write_state

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MASTERED = (torch.float32, *SPLIT_DTYPES)


@overload
def export(
    model: nn.Module, path: None = None, dtype: torch.dtype | str = ..., *, process_group: Any = None
) -> dict[str, Any]: ...


@overload
def export(
    model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | str = ..., *, process_group: Any = None
) -> Path: ...


def export(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    *,
    process_group: Any = None,
) -> dict[str, Any] | Path:
    """Return the weights of a model as a plain state dict, or write them: FP32 masters, or rounded to 16 bits.

    The model stays as it is. Names are those of `model.state_dict()`, without what `DistributedDataParallel` and
    `torch.compile` put in front. Parameters of `fully_shard` are gathered, which all ranks do together; rank 0 writes.

    Args:
        model: a model, cast or not.
        path: None for a state dict. A file, whose suffix says what it holds: `.safetensors`, or `.pt`, `.pth`, `.bin`,
            `.ckpt` for `torch.save`. For a model with `save_pretrained`, a path without suffix is a folder for
            `from_pretrained`, with the dtype in its `config.json`.
        dtype: of the weights: `torch.float32`, `bfloat16`, `float16`, or the name of one. Buffers keep theirs.
        process_group: the ranks that export together; default all of them.

    Returns:
        Without a path, name to tensor on the CPU, new ones; tied names have one and the same tensor. With a path, the
        path. A safetensors file holds a tied tensor once, under its first name, and the others in its metadata.

    Raises:
        FormatError: another dtype.
        CheckpointError: the path has another suffix or cannot be written, or a weight is too large for FP16.
        OptimizerError: a parameter has lost its tail to torch's `fully_shard`.

    >>> import duotone.torch as dt
    >>> plain = nn.Linear(2, 1)
    >>> model = dt.cast(nn.Linear(2, 1), "bf16")
    >>> plain.load_state_dict(export(model))
    <All keys matched successfully>
    >>> plain.weight.equal(dt.master_weights(model)["weight"]), export(model, dtype="bfloat16")["bias"].dtype
    (True, torch.bfloat16)
    """
    chosen = export_dtype(dtype)
    ranks = ranks_of(process_group)
    target = None if path is None else Path(path)
    model = _unwrapped(model)
    is_folder = target is not None and not target.suffix and hasattr(model, "save_pretrained")
    if target is not None:
        check_same(ranks, str(target.absolute()), "path")
        if not is_folder:
            check_suffix(target)
    masters = _gathered(model, keeps=target is None or ranks.rank == 0)
    if target is None:
        return _in_dtype(masters, chosen)
    ranks.first(lambda: _write(target, model, _in_dtype(masters, chosen), chosen, is_folder))
    return target


def export_checkpoint(checkpoint: Path, path: Path, dtype: torch.dtype | str = torch.float32) -> None:
    """Write the weights in a checkpoint to a file, as `export` writes those of the model that it would be loaded into.

    Neither the model nor the number of ranks that saved is needed.

    Raises:
        FormatError: another dtype.
        CheckpointError: the checkpoint is missing or damaged, the file cannot be written, or a weight is too large for
            FP16.
    """
    chosen = export_dtype(dtype)
    check_suffix(path)
    weights, others, tied = saved_weights(checkpoint)
    state = {name: _rounded(name, master, chosen) for name, master in weights.items()} | others
    _make_parent(path)
    write_state(path, state | {name: state[first] for name, first in tied.items()})


def export_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype that weights are to be exported in.

    Raises:
        FormatError: it is none of FP32, BF16 and FP16.

    >>> export_dtype("bfloat16")
    torch.bfloat16
    """
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise FormatError(f"weights are exported in {', '.join(_DTYPES)}, not in {dtype}; choose one of them")
    return chosen


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = original_of(model)
    inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    return model if inner is model else _unwrapped(inner)


def _gathered(model: nn.Module, *, keeps: bool) -> dict[str, Any]:
    """Return the state dict with FP32 masters, whole, on the CPU; all ranks take part, and some may keep nothing."""
    reshard(model)
    seen: dict[int, Any] = {}
    state: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen[id(value)] = _whole(value, keeps=keeps)
        if keeps:
            state[name] = seen[id(value)]
    return state


def _whole(value: Any, *, keeps: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    is_weight = isinstance(value, nn.Parameter) and value.dtype in _MASTERED
    if is_weight:
        check_not_lost(value)
    whole: Any = read_master(value) if is_weight else value.detach()
    if is_shard(whole):
        whole = whole.full_tensor()
    # a copy, for a state dict's own tensors change with the training
    whole = whole.to("cpu", copy=not is_weight).contiguous() if keeps else torch.empty(0)
    return nn.Parameter(whole, requires_grad=False) if is_weight else whole


def _in_dtype(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a state dict with its parameters rounded; tied names keep one tensor."""
    seen: dict[int, Any] = {}
    for name, value in state.items():
        if id(value) not in seen:
            seen[id(value)] = _rounded(name, value.data, dtype) if isinstance(value, nn.Parameter) else value
    return {name: seen[id(value)] for name, value in state.items()}


def _rounded(name: str, master: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return master
    largest = beyond_range(master, dtype)
    if largest is not None:
        raise CheckpointError(
            f'"{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; export in bfloat16 or float32'
        )
    return encode(master, dtype)[0]


def _make_parent(path: Path) -> None:
    try:
        make_folder(path.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"cannot write the weights to {path}: {error.strerror}") from error


def _write(path: Path, model: nn.Module, state: Mapping[str, Any], dtype: torch.dtype, is_folder: bool) -> None:
    _make_parent(path)
    if is_folder:
        _save_pretrained(path, model, state, dtype)
    else:
        write_state(path, state)


def _save_pretrained(path: Path, model: Any, state: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Have a Hugging Face model write its folder, and move the files into place one by one, the weights first."""
    partial = partial_path(path.absolute())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with _same_config(model):
            model.save_pretrained(partial, state_dict=dict(state))
        config = partial / "config.json"
        if config.exists():
            # it names the dtype of the parameters that are resident, and loading rounds to that
            content = _with_dtype(json.loads(config.read_text(encoding="utf-8")), str(dtype).removeprefix("torch."))
            replace_text(config, json.dumps(content, indent=2, sort_keys=True) + "\n")
        path.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), key=lambda each: each == config):
            with replacing(path / file.name) as place:
                shutil.rmtree(place, ignore_errors=True)
                file.rename(place)
    except OSError as error:
        raise CheckpointError(f"cannot write the weights to {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _same_config(model: Any) -> Iterator[None]:
    """Put back what `save_pretrained` writes into a model's own config."""
    config = getattr(model, "config", None)
    kept = {name: getattr(config, name) for name in ("dtype", "torch_dtype") if name in vars(config or object)}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _with_dtype(config: Any, dtype: str) -> Any:
    """Return a model's config, and those of its parts, with another dtype.

    >>> _with_dtype({"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "layers": 2}}, "float32")
    {'dtype': 'float32', 'text_config': {'torch_dtype': 'float32', 'layers': 2}}
    """
    if not isinstance(config, dict):
        return config
    names = ("dtype", "torch_dtype")
    return {
        key: dtype if key in names and value in _DTYPES else value if "quant" in key else _with_dtype(value, dtype)
        for key, value in config.items()
    }
