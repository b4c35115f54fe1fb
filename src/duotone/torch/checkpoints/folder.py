"""A folder of tensors and JSON that is written whole or not at all, and read only if nothing in it has changed.

`tensors.safetensors` holds the tensors, each once; `manifest.json` holds everything else, with `{"$tensor": name}`
for each tensor, the SHA-256 of the tensor file, and its own. Reading it executes nothing. Format version 2 also has
files of the parts that ranks hold of tensors, which `shard_files` writes and reads.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duotone.durable_files import flush, read_bounded
from duotone.errors import CheckpointError
from duotone.torch.checkpoints.atomic_folder import (
    MANIFEST,
    TENSORS,
    is_file_name,
    partial_folder,
    replace_folder,
    resolve,
)
from duotone.torch.parameters.shards import is_shard

FORMAT_VERSION = 1
# of a folder with parts of tensors, which readers of version 1 must not take for whole
SHARDED_VERSION = 2
_SHARDS = "shards_sha256"
# names, settings and random states: some hundred bytes for each parameter tensor
_MOST_MANIFEST_BYTES = 1 << 28
_TENSOR_KEY, _PAIRS_KEY = "$tensor", "$pairs"
_SYSTEM_MESSAGE = re.compile(r"([^:]+) \(os error \d+\)")


def write_folder(path: Path, contents: Mapping[str, Any]) -> None:
    """Write nested contents into a partial folder, flush it to the disk, and rename it to `path`.

    Wherever the process dies, `read_folder` finds the old checkpoint or the new one.

    Args:
        path: the folder. A checkpoint at this path is replaced last; anything else at it is refused.
        contents: dicts, lists and tuples (which come back as lists) of tensors and JSON values.

    Raises:
        CheckpointError: `contents` holds something else, something else than a checkpoint is at `path`, or writing
            failed; what was at `path` is untouched.
    """
    with write_errors(path), partial_folder(path) as partial:
        complete_folder(partial, path, contents, {})


def complete_folder(partial: Path, path: Path, contents: Mapping[str, Any], shards: Mapping[str, str]) -> None:
    """Write tensors and manifest into a partial folder, and rename it to `path`.

    Args:
        partial: of `atomic_folder.partial_folder`.
        path: where it belongs.
        contents: as in `write_folder`; DTensors are left to the files of their parts.
        shards: the names of those files, which are in `partial` and flushed, and their SHA-256.
    """
    packed, tensors = pack(contents)
    save_file(_separate({name: tensor for name, tensor in tensors.items() if not is_shard(tensor)}), partial / TENSORS)
    version = {"format_version": SHARDED_VERSION if shards else FORMAT_VERSION}
    digests = {"tensors_sha256": file_sha256(partial / TENSORS), **({_SHARDS: dict(shards)} if shards else {})}
    manifest = {**version, **digests, **packed}
    text = json.dumps({"manifest_sha256": json_sha256(manifest), "manifest": manifest}, indent=1)
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    flush(partial / TENSORS, partial / MANIFEST, partial)
    replace_folder(partial, path)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise errors of the disk and of safetensors as a CheckpointError about the checkpoint at `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return why a file could not be read or written: what the system says, if it is that.

    >>> reason_of(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    'No space left on device'
    >>> reason_of(SafetensorError("Error while deserializing header: header too small"))
    'Error while deserializing header: header too small'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # safetensors puts the system's message inside its own
    message = _SYSTEM_MESSAGE.search(str(error))
    return message[1].strip() if message else str(error)


def read_folder(path: Path) -> dict[str, Any]:
    """Return the contents that `write_folder` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or holds parts of tensors; or another process
            replaced the checkpoint meanwhile.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    if is_sharded(manifest):
        raise CheckpointError(f"{path} holds parts of tensors that several ranks saved; read it with load_checkpoint")
    check_files(path, file_digests(manifest))
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS} cannot be read: {reason_of(error)}; use another checkpoint") from error
    check_unchanged(path, manifest)
    return unpack(manifest, tensors)


def verify(path: str | os.PathLike[str]) -> None:
    """Raise unless a checkpoint is as it was written. Every byte is read, nothing is loaded.

    Raises:
        CheckpointError: a file is missing, cut short or changed; its `damage` says which.

    >>> verify("no/such/folder")
    Traceback (most recent call last):
    duotone.errors.CheckpointError: no checkpoint at no/such/folder: No such file or directory
    """
    path = resolve(Path(path))
    check_files(path, file_digests(read_manifest(path)))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a folder's manifest without reading its tensors.

    Raises:
        CheckpointError: it is missing, cut short or changed, or of another format version.
    """
    path = resolve(path)
    try:
        content = json.loads(read_bounded(path / MANIFEST, _MOST_MANIFEST_BYTES))
        manifest = content["manifest"]
        intact = content["manifest_sha256"] == json_sha256(manifest) and _has_digests(manifest)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_dir():
            message = f"no checkpoint at {path}: the folder has no {MANIFEST}; use another checkpoint"
            raise CheckpointError(message, damage=f"no {MANIFEST}") from error
        raise CheckpointError(
            f"no checkpoint at {path}: {error.strerror}", damage=f"{MANIFEST}: {error.strerror}"
        ) from error
    # a manifest of thousands of levels too
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"{path / MANIFEST} is damaged ({error}); use another checkpoint"
        raise CheckpointError(message, damage=f"{MANIFEST} is damaged") from error
    if not intact:
        message = f"{path / MANIFEST} is damaged: its SHA-256 is another; use another checkpoint"
        raise CheckpointError(message, damage=f"{MANIFEST} is damaged")
    if manifest["format_version"] not in (FORMAT_VERSION, SHARDED_VERSION):
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']}, this Duotone reads {FORMAT_VERSION} and "
            f"{SHARDED_VERSION}",
            damage=f"format version {manifest['format_version']}",
        )
    return manifest


def _has_digests(manifest: Any) -> bool:
    """Return whether a manifest says which format it has, and names files of a checkpoint alone."""
    shards = manifest.get(_SHARDS, {})
    digests = [manifest["tensors_sha256"], *shards.values()]
    return (
        isinstance(manifest["format_version"], int)
        and all(isinstance(digest, str) for digest in digests)
        and all(map(is_file_name, shards))
    )


def is_sharded(manifest: Mapping[str, Any]) -> bool:
    """Return whether a folder holds parts of tensors."""
    return _SHARDS in manifest


def file_digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of all files beside the manifest, and their SHA-256."""
    return {TENSORS: manifest["tensors_sha256"], **manifest.get(_SHARDS, {})}


def check_files(path: Path, digests: Mapping[str, str]) -> None:
    """Raise unless files of a folder have these SHA-256.

    Raises:
        CheckpointError: one has another, or cannot be read.
    """
    for name, digest in digests.items():
        file = path / name
        try:
            # a device would have no end
            intact = (not file.exists() or file.is_file()) and file_sha256(file) == digest
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            raise CheckpointError(
                f"{file} cannot be read: {error.strerror}; use another checkpoint",
                damage=f"no {name}" if is_missing else f"{name}: {error.strerror}",
            ) from error
        if not intact:
            message = f"{file} is damaged: its SHA-256 is not the manifest's; use another checkpoint"
            raise CheckpointError(message, damage=f"{name} is damaged")


def check_unchanged(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless a folder still has the manifest that was read from it; else the tensors may be of two checkpoints.

    Raises:
        CheckpointError: it has another, or none.
    """
    if json_sha256(read_manifest(path)) != json_sha256(manifest):
        raise CheckpointError(f"{path} was replaced by another checkpoint while it was read; load it again")


def pack(contents: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return nested contents as JSON, and their tensors by name.

    Raises:
        CheckpointError: something is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    return {name: _pack(name, value, tensors) for name, value in contents.items()}, tensors


def unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the contents of which `pack` returned these; lists where tuples were.

    Raises:
        CheckpointError: `pack` did not make them: they name a tensor that is not there, or pairs that are none.

    >>> unpack(*pack({"state": {0: (Tensor([2.0]), "x")}}))
    {'state': {0: [tensor([2.]), 'x']}}
    """
    try:
        return {name: _unpack(value, tensors) for name, value in packed.items()}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a manifest does not fit its tensors ({type(error).__name__}: {error}); use another checkpoint"
        ) from error


def tensor_names(packed: Any) -> set[str]:
    """Return the names of the tensors that something packed refers to."""
    if isinstance(packed, Mapping):
        name = packed.get(_TENSOR_KEY)
        return {name} if isinstance(name, str) else tensor_names(list(packed.values()))
    if isinstance(packed, list):
        return set().union(*map(tensor_names, packed))
    return set()


def _pack(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; each tensor goes into `tensors` once, under its first name."""
    if isinstance(value, Tensor):
        first = next((known for known, tensor in tensors.items() if tensor is value), name)
        tensors[first] = value
        return {_TENSOR_KEY: first}
    if isinstance(value, Mapping):
        items = {key: _pack(f"{name}.{key}", item, tensors) for key, item in value.items()}
        # JSON would turn the whole numbers that optimizers use as keys into text
        return items if all(isinstance(key, str) for key in items) else {_PAIRS_KEY: list(items.items())}
    if isinstance(value, list | tuple):
        return [_pack(f"{name}.{index}", item, tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f'a checkpoint holds tensors and JSON values, but "{name}" is a {type(value).__name__}; leave it out'
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR_KEY in value:
            return tensors[value[_TENSOR_KEY]]
        pairs = value.get(_PAIRS_KEY, value.items())
        return {key: _unpack(item, tensors) for key, item in pairs}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous on the CPU, none sharing memory with another: safetensors refuses that."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in tensors.items():
        copied = tensor.detach().cpu().contiguous()
        address = copied.untyped_storage().data_ptr()
        copies[name] = copied.clone() if address in seen else copied
        seen.add(address)
    return copies


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """Return the SHA-256 of a JSON value, the same whatever the order of keys."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
