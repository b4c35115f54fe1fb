"""A checkpoint whose digests are right, and that is none: refused in a sentence, and nothing is changed."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError
from duotone.torch.checkpoints.folder import json_sha256


def parts() -> tuple[nn.Module, torch.optim.Optimizer, dt.LossScaler]:
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(2, 1), "bf16")
    return model, dt.AdamW(model.parameters(), backend="reference"), dt.LossScaler("bf16")


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Save a checkpoint, change its manifest, and give that the digest that it has now."""
    model, optimizer, scaler = parts()
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    path = dt.save_checkpoint(folder / "last", model, optimizer, scaler, progress={"step": 1})
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    change(manifest)
    content = {"manifest_sha256": json_sha256(manifest), "manifest": manifest}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def setting(*keys: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = to

    return change


def without(*keys: Any) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return change


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


GROUP = ("optimizer", "param_groups", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tails"), 'has no "tails", so save_checkpoint did not write it'),
        (without("random"), 'has no "random", so save_checkpoint did not write it'),
        (setting("policy", to=3), '"policy" of .* is not what save_checkpoint writes there'),
        (setting("policy", to='{"rules": []}'), '"policy" of .* is not what save_checkpoint writes there'),
        (setting("policy", to="[" * 100000), '"policy" of .* is not what save_checkpoint writes there'),
        (setting("model", "weight", to=3), '"model" of .* is not what save_checkpoint writes there'),
        (setting("model", "weight", to={"$tensor": "nothing"}), "does not fit its tensors .*KeyError: 'nothing'"),
        (setting("optimizer", "state", to={"$pairs": 3}), "does not fit its tensors .*TypeError"),
        (setting("tails", "weight", to={"$tensor": "model.weight"}), 'the tail of "weight" .* does not fit its weight'),
        (setting("random", "python", to=[3, [1, 2], None]), '"random" of .* is not what save_checkpoint writes there'),
        (setting("random", "numpy", 1, to=["x"]), '"random" of .* is not what save_checkpoint writes there'),
        (setting(*GROUP, to={"params": [0, 1]}), "does not fit: .* is None there"),
        (setting(*GROUP, "lr", to="fast"), "does not fit: lr is 'fast' there and 0.001 here"),
        (setting(*GROUP, "lr", to=10**30), "does not fit: lr is 10+ there and 0.001 here"),
        (setting(*GROUP, "betas", to=[0.9, None]), r"does not fit: betas is \[0.9, None\] there"),
        (setting("optimizer", "state", to=[]), '"optimizer" of .* is not what save_checkpoint writes there'),
        (setting("scaler", "state", "skipped", to="many"), "does not fit: skipped is 'many' there and 0 here"),
        (setting("scaler", "state", "growth_tracker", to=2**40), "does not fit: growth_tracker is 1099511627776 there"),
        (setting("progress", to=[]), '"progress" of .* is not what save_checkpoint writes there'),
        (without("tensors_sha256"), "manifest.json is damaged"),
        (setting("format_version", to="1"), "manifest.json is damaged"),
        (setting("shards_sha256", to={"../mine": "0"}), "manifest.json is damaged"),
        (setting("shards_sha256", to={"/dev/zero": "0"}), "manifest.json is damaged"),
    ],
)
def test_another_form_is_refused_and_changes_nothing(tmp_path, change, message):
    path = forge(tmp_path, change)
    model, optimizer, scaler = parts()
    before = copy.deepcopy((dt.master_weights(model), optimizer.state_dict(), scaler.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        dt.load_checkpoint(path, model, optimizer, scaler)
    assert str((dt.master_weights(model), optimizer.state_dict(), scaler.state_dict())) == str(before)


def test_what_is_forged_without_a_change_loads(tmp_path):
    model, optimizer, scaler = parts()
    assert dt.load_checkpoint(forge(tmp_path, lambda _: None), model, optimizer, scaler) == {"step": 1}


def test_thousands_of_levels(tmp_path):
    path = forge(tmp_path, lambda _: None)
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        dt.load_checkpoint(path, nn.Linear(2, 1))
    for levels in range(100, 1000, 100):
        try:
            path = forge(tmp_path, setting("progress", to={"step": nested(levels)}))
        except RecursionError:
            return
        with pytest.raises(CheckpointError, match=r"was saved under|RecursionError"):
            dt.load_checkpoint(path, nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_a_device_without_an_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr("duotone.torch.checkpoints.folder._MOST_MANIFEST_BYTES", 100_000)
    path = forge(tmp_path, lambda _: None)
    (path / name).unlink()
    os.symlink("/dev/zero", path / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        dt.load_checkpoint(path, nn.Linear(2, 1))
