"""A folder of tensors and JSON that is written whole or not at all, and read only if nothing in it has changed.

`tensors.safetensors` holds the tensors, each once; `manifest.json` holds everything else, with `{"$tensor": name}`
where a tensor stands, the SHA-256 of the tensor file, and its own. Reading it executes nothing.
"""

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duotone.errors import CheckpointError

FORMAT_VERSION = 1
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"
_TENSOR_KEY, _PAIRS_KEY = "$tensor", "$pairs"


def write_folder(path: Path, contents: Mapping[str, Any]) -> None:
    """Write nested contents beside their place, flush them to the disk, and rename them into place.

    Args:
        path: the folder; one that is there is replaced in the end.
        contents: dicts, lists and tuples (which come back as lists) of tensors and JSON values.

    Raises:
        CheckpointError: something in `contents` is neither, or writing failed; what was at `path` is untouched.
    """
    tensors: dict[str, Tensor] = {}
    packed = {name: _pack(name, value, tensors) for name, value in contents.items()}
    # on the same file system, so that the last move is a rename
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_apart(tensors), partial / _TENSORS)
        manifest = {"format_version": FORMAT_VERSION, "tensors_sha256": _file_sha256(partial / _TENSORS), **packed}
        text = json.dumps({"manifest_sha256": _json_sha256(manifest), "manifest": manifest}, indent=1)
        (partial / _MANIFEST).write_text(text, encoding="utf-8")
        _flush(partial / _TENSORS, partial / _MANIFEST, partial)
        _move_into_place(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error


def read_folder(path: Path) -> dict[str, Any]:
    """Return the contents that `write_folder` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    manifest = read_manifest(path)
    try:
        if _file_sha256(path / _TENSORS) != manifest["tensors_sha256"]:
            raise CheckpointError(
                f"{path / _TENSORS} is damaged: its SHA-256 is not the manifest's; use another checkpoint"
            )
        tensors = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / _TENSORS} cannot be read: {error}; use another checkpoint") from error
    return {name: _unpack(value, tensors) for name, value in manifest.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a folder's manifest without reading its tensors.

    Raises:
        CheckpointError: it is missing, cut short or changed, or of another format version.
    """
    try:
        content = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        manifest = content["manifest"]
        intact = content["manifest_sha256"] == _json_sha256(manifest)
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / _MANIFEST} is damaged ({error}); use another checkpoint") from error
    if not intact:
        raise CheckpointError(f"{path / _MANIFEST} is damaged: its SHA-256 is another; use another checkpoint")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']}, this Duotone reads {FORMAT_VERSION}"
        )
    return manifest


def _pack(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; each tensor goes into `tensors` under the first name it is met by."""
    if isinstance(value, Tensor):
        known = next((first for first, tensor in tensors.items() if tensor is value), name)
        tensors[known] = value
        return {_TENSOR_KEY: known}
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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous on the CPU, none sharing memory with another: safetensors refuses that."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in tensors.items():
        copied = tensor.detach().cpu().contiguous()
        address = copied.untyped_storage().data_ptr()
        copies[name] = copied.clone() if address in seen else copied
        seen.add(address)
    return copies


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _json_sha256(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_into_place(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    # a folder cannot be renamed over a full one, so the old one steps aside first
    aside = place.with_name(f".{place.name}.replaced-{os.getpid()}")
    place.rename(aside)
    new.rename(place)
    shutil.rmtree(aside)
