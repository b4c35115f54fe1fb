"""The folder under a checkpoint: written whole or not at all, read only if untouched."""

import json

import pytest
import safetensors.torch
import torch

from duotone.errors import CheckpointError
from duotone.torch.checkpoints import folder as checkpoint_folder
from duotone.torch.checkpoints.folder import read_folder, verify, write_folder

SHARED = torch.arange(6, dtype=torch.int16)
CONTENTS = {
    "tensors": {"a": torch.randn(3, 2).to(torch.bfloat16), "same": SHARED, "again": SHARED},
    "view": SHARED[2:4],
    "transposed": torch.randn(3, 2).T,
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "state": {0: {"step": 3}, 7: [1, 2.5, None, "x", True]},
    "tuple": (0.9, 0.999),
    "huge": 2**80,
}


def assert_same(got: object, want: object) -> None:
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_same(got[key], value)
    elif isinstance(want, list | tuple):
        assert isinstance(got, list)
        for got_item, want_item in zip(got, want, strict=True):
            assert_same(got_item, want_item)
    else:
        assert got == want
        assert type(got) is type(want)


def test_contents_come_back(tmp_path):
    write_folder(tmp_path / "folder", CONTENTS)
    got = read_folder(tmp_path / "folder")
    assert_same({name: got[name] for name in CONTENTS}, CONTENTS)


def test_one_tensor_is_stored_once(tmp_path):
    write_folder(tmp_path / "folder", {"a": SHARED, "b": [SHARED]})
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())["manifest"]
    assert manifest["b"] == [{"$tensor": "a"}]


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_every_changed_byte_is_noticed(tmp_path, name):
    write_folder(tmp_path / "folder", {"a": torch.arange(4.0), "step": 123})
    path = tmp_path / "folder" / name
    intact = path.read_bytes()
    for position in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        # white space between JSON values means nothing, and may change
        if name == "manifest.json" and json_or_none(bytes(damaged)) == json.loads(intact):
            continue
        path.write_bytes(damaged)
        for look in (read_folder, verify):
            with pytest.raises(CheckpointError, match="use another checkpoint"):
                look(tmp_path / "folder")
    path.write_bytes(intact)
    verify(tmp_path / "folder")
    assert read_folder(tmp_path / "folder")["step"] == 123


def json_or_none(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_file_cut_short_is_noticed(tmp_path, name, keep):
    write_folder(tmp_path / "folder", {"a": torch.arange(4.0)})
    path = tmp_path / "folder" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="use another checkpoint"):
        read_folder(tmp_path / "folder")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path / 'absent'}"):
        read_folder(tmp_path / "absent")
    write_folder(tmp_path / "folder", {"a": torch.ones(1)})
    (tmp_path / "folder" / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors cannot be read") as caught:
        read_folder(tmp_path / "folder")
    assert caught.value.damage == "no tensors.safetensors"
    (tmp_path / "folder" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"folder: the folder has no manifest\.json; use another") as caught:
        read_folder(tmp_path / "folder")
    assert caught.value.damage == "no manifest.json"


@pytest.mark.parametrize("meanwhile", ["replaced", "removed", "removed while it is opened"])
def test_tensors_are_never_those_of_another_checkpoint_than_the_rest(tmp_path, monkeypatch, meanwhile):
    path = tmp_path / "folder"
    write_folder(path, {"a": torch.ones(1), "best": float("nan")})
    assert read_folder(path)["a"] == 1
    load_file = safetensors.torch.load_file

    def load_after(file):
        if meanwhile == "replaced":
            write_folder(path, {"a": torch.zeros(1), "best": 0.0})
        elif meanwhile == "removed":
            file.unlink()
        else:
            # what torch raises then
            raise RuntimeError(f"unable to open file <{file}> in read-only mode: No such file or directory (2)")
        return load_file(file)

    monkeypatch.setattr(checkpoint_folder, "load_file", load_after)
    replaced = "replaced by another checkpoint while it was read; load it again"
    with pytest.raises(CheckpointError, match=replaced if meanwhile == "replaced" else "cannot be read"):
        read_folder(path)


def test_another_format_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "FORMAT_VERSION", 3)
    write_folder(tmp_path / "folder", {"a": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format version 3, this Duotone reads 1 and 2"):
        read_folder(tmp_path / "folder")


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", 1j])
def test_what_it_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(CheckpointError, match=r'"a.0" is a \w+; leave it out'):
        write_folder(tmp_path / "folder", {"a": [value]})
    assert not any(tmp_path.iterdir())
