"""A checkpoint's folder, written and read by several ranks together: each its own parts of DTensors.

Beside `tensors.safetensors`, which rank 0 writes with all that is no DTensor, lies one file of parts for each rank,
`tensors-00001-of-00003.safetensors`, made by torch.distributed.checkpoint in its layout for safetensors: nothing is
pickled. How they are written (one partial folder, flushed, renamed by rank 0 once all have succeeded) and checked (by
the SHA-256 in the manifest, before anything is read) is Duotone's; how parts fit together is torch's.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duotone.durable_files import flush
from duotone.errors import CheckpointError
from duotone.ranks import Ranks
from duotone.torch.checkpoints.atomic_folder import partial_folder, resolve
from duotone.torch.checkpoints.folder import (
    check_files,
    check_unchanged,
    complete_folder,
    file_digests,
    file_sha256,
    json_sha256,
    pack,
    read_manifest,
    reason_of,
    tensor_names,
    unpack,
    write_errors,
)
from duotone.torch.checkpoints.process_group import check_same
from duotone.torch.parameters.shards import is_shard

_SUFFIX = ".safetensors"


def write_folder(path: Path, contents: Mapping[str, Any], ranks: Ranks) -> None:
    """Write nested contents from all ranks, as `folder.write_folder` does from one.

    Args:
        path: the folder, the same one for every rank.
        contents: of this rank. Every rank's DTensors are written, of everything else what rank 0 has.
        ranks: all of those that hold parts.

    Raises:
        CheckpointError: something failed on a rank; on every rank, and what was at `path` is untouched.
    """
    check_same(ranks, str(path.absolute()), "path")
    shards = ranks.agree(lambda: _shards(contents))
    check_same(ranks, list(shards), "set of sharded tensors")
    with ExitStack() as stack:
        # rank 0 makes the folder, and removes it if any rank fails
        made = ranks.agree(lambda: _make_partial(path, stack) if ranks.rank == 0 else "")
        partial = Path(ranks.gather(made)[0])
        digests = _write_shards(partial, path, shards, ranks) if shards else {}
        ranks.agree(lambda: _complete(partial, path, contents, digests) if ranks.rank == 0 else None)


def read_folder(
    path: Path,
    ranks: Ranks,
    cut_like: Callable[[str, torch.Size], Tensor | None],
    left_out: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return what `write_folder` wrote, from any number of ranks, one process among them; tensors on the CPU.

    Args:
        path: the folder.
        ranks: all of those that read it. They share the work of checking the files.
        cut_like: returns the DTensor whose parts this rank is to hold of a tensor with some name and shape, or None
            if it is to have the whole.
        left_out: parts of the contents that are not read and come back as None.

    Raises:
        CheckpointError: a file is missing, cut short, changed, or replaced meanwhile; on every rank.
    """
    path = resolve(path)
    manifest = ranks.agree(lambda: read_manifest(path))
    digests = file_digests(manifest)
    check_same(ranks, json_sha256(manifest), f"checkpoint at {path}")
    own = dict(list(digests.items())[ranks.rank :: ranks.size])
    ranks.agree(lambda: check_files(path, own))
    packed = {name: None if name in left_out else value for name, value in manifest.items()}

    def read() -> dict[str, Tensor]:
        tensors = _read(path, tensor_names(packed), set(digests), cut_like)
        check_unchanged(path, manifest)
        return tensors

    return unpack(packed, ranks.agree(read))


def _shards(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    _, tensors = pack(contents)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items() if is_shard(tensor)}


def _make_partial(path: Path, stack: ExitStack) -> str:
    with write_errors(path):
        return str(stack.enter_context(partial_folder(path)))


def _complete(partial: Path, path: Path, contents: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    missing = [name for name in digests if not (partial / name).exists()]
    if missing:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: rank 0 does not see {', '.join(missing)}, which other ranks wrote; "
            "give a path on a file system that all ranks share"
        )
    with write_errors(path):
        complete_folder(partial, path, contents, digests)


def _write_shards(partial: Path, path: Path, shards: dict[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write this rank's parts; return the names of all ranks' files and their SHA-256."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # a folder for each rank, so that it knows its own file whatever torch calls it
    folder = partial / f"rank-{ranks.rank}"

    def write() -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(shards, storage_writer=writer, process_group=ranks.group)
        except CheckpointException as error:
            raise CheckpointError(f"cannot write the checkpoint {path}: {_reasons(error)}") from error

    def move_files() -> dict[str, str]:
        # a rank whose parts are copies of another's has no file
        digests = {}
        with write_errors(path):
            for file in folder.iterdir():
                moved = partial / f"tensors-{ranks.rank + 1:05d}-of-{ranks.size:05d}{_SUFFIX}"
                # torch flushes the file before Python has handed over all of its bytes
                flush(file)
                file.rename(moved)
                digests[moved.name] = file_sha256(moved)
            folder.rmdir()
        return digests

    ranks.agree(write)
    each = ranks.gather(ranks.agree(move_files))
    return {name: digest for digests in each for name, digest in digests.items()}


def _read(
    path: Path, names: set[str], files: set[str], cut_like: Callable[[str, torch.Size], Tensor | None]
) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    foreign = {file.name for file in path.glob(f"*{_SUFFIX}")} - files
    if foreign:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(foreign))}, which its manifest does not name; remove it, or use another "
            "checkpoint"
        )
    reader = HuggingFaceStorageReader(str(path))
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: _empty(saved[name], cut_like(name, saved[name].size)) for name in sorted(names)}
    with warnings.catch_warnings():
        # each rank reads by itself what it needs, and says by itself what went wrong
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{path} cannot be read: {_reasons(error)}; use another checkpoint") from error
    return tensors


def _empty(saved: Any, whole: Tensor | None) -> Tensor:
    dtype = saved.properties.dtype
    if whole is None:
        return torch.empty(saved.size, dtype=dtype)
    return torch.empty_like(whole, dtype=dtype, device="cpu", requires_grad=False)


def _reasons(error: Any) -> str:
    """Return what went wrong on which rank, from torch's exception, which knows that of all ranks."""
    reasons = []
    for rank, (failure, _) in sorted(error.failures.items()):
        reasons.append(f"{reason_of(failure)} (on rank {rank})")
    return "; ".join(reasons)
