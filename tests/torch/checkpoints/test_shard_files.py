"""Checkpoints of several ranks: any number of them loads what any number saved, and one that fails fails on all."""

import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import duotone.torch as dt
from duotone.errors import CheckpointError
from duotone.torch.checkpoints import folder as checkpoint_folder
from duotone.torch.checkpoints import shard_files
from duotone.torch.checkpoints.folder import read_folder, verify
from duotone.torch.distributed.fully_shard import fully_shard
from duotone.torch.parameters.shards import is_shard, local

OPTIMIZERS: dict[str, Any] = {
    "bf16 wrapped": lambda params, lr: dt.MasterWeights(torch.optim.NAdam(params, lr=lr)),
    "fp32 torch": torch.optim.AdamW,
}
# policies, with another optimizer after some
CASES = ("bf16", "fp16", "fp32", "bf16,state=bfloat16", *OPTIMIZERS)


class Uneven(nn.Module):
    """Its sizes are odd or one, a weight is tied, one frozen, norms stay FP32, and dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.ones(1))
        self.pair = nn.Parameter(torch.ones(2))
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.frozen(self.drop(self.norm(self.embed(tokens) * self.gain))) * self.pair.sum()
        return self.head(inner)


def make(case: str, seed: int, kind: str = "plain") -> Any:
    torch.manual_seed(seed)
    policy = case.partition(" ")[0]
    model = dt.cast(Uneven(), policy)
    if kind == "sharded":
        fully_shard(model)
    if kind == "replicated":
        model = nn.parallel.DistributedDataParallel(model)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = OPTIMIZERS.get(case, dt.AdamW)(params, lr=1e-2)
    scaler = dt.LossScaler(policy)
    return model, optimizer, scaler, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def train(parts: Any, steps: int) -> None:
    model, optimizer, scaler, scheduler = parts
    for _ in range(steps):
        tokens = torch.randint(11, (16,))
        scaler.backward(nn.functional.cross_entropy(model(tokens).float(), tokens))
        scaler.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()


def evaluate(parts: Any) -> None:
    """Leave the weights gathered, as the end of a forward pass does."""
    with torch.no_grad():
        parts[0](torch.arange(11))
    assert not any(is_shard(param) for param in parts[0].embed.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_shard(tensor) else tensor).clone()  # type: ignore[attr-defined]


def bits(parts: Any) -> dict[str, Any]:
    """Return masters and moments, put together from all ranks, and all that is the same on every rank."""
    model, optimizer, scaler, scheduler = parts
    model = getattr(model, "module", model)
    names = {param: name for name, param in model.named_parameters()}
    found: dict[str, Any] = {name: whole(master) for name, master in dt.master_weights(model, optimizer).items()}
    for param, state in optimizer.state.items():
        found |= {f"{names[param]}.{key}": whole(value) for key, value in state.items() if key != "tail"}
    return found | {"scaler": scaler.state_dict(), "lr": scheduler.get_last_lr(), "groups": len(optimizer.param_groups)}


def own_bits(parts: Any) -> dict[str, torch.Tensor]:
    """Return what this rank holds, tails among it."""
    model, optimizer, *_ = parts
    found = {name: local(value.detach()).clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": local(value).clone() for key, value in state.items()}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) and value.dtype == b[name].dtype
        if isinstance(value, torch.Tensor)
        else value == b[name]
        for name, value in a.items()
    )


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name, value in sorted(a.items()) if torch.is_tensor(value) and not torch.equal(value, b[name])]


def save(path: Path, parts: Any, **progress: Any) -> None:
    model, optimizer, scaler, scheduler = parts
    dt.save_checkpoint(path, model, optimizer, scaler, scheduler=scheduler, progress=progress)


def load(path: Path, parts: Any) -> dict[str, Any]:
    model, optimizer, scaler, scheduler = parts
    return dt.load_checkpoint(path, model, optimizer, scaler, scheduler=scheduler)


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def message_of(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def save_and_go_on(folder: Path) -> list[Any]:
    results = []
    for case in CASES:
        parts = make(case, 0, "sharded")
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(100 + dist.get_rank())
        train(parts, 3)
        evaluate(parts)
        save(folder / case, parts, step=3)
        saved = bits(parts)
        train(parts, 2)
        results.append((saved, bits(parts), draw()))
    return results


def load_and_go_on(folder: Path) -> list[Any]:
    results = []
    for case in CASES:
        parts = make(case, 1, "sharded")
        train(parts, 1)
        evaluate(parts)
        assert load(folder / case, parts) == {"step": 3}
        loaded = bits(parts)
        train(parts, 2)
        results.append((loaded, bits(parts), draw()))
    return results


def convert(folder: Path) -> list[Any]:
    results = []
    for saved, wanted in (("bf16", "fp32"), ("fp32", "bf16")):
        model, optimizer, scaler, scheduler = make(wanted, 3, "sharded")
        dt.load_checkpoint(folder / saved, model, optimizer, convert=True)
        results.append(bits((model, optimizer, scaler, scheduler)))
    return results


def only_in_a_group(path: Path) -> Any:
    group: Any = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return message_of(lambda: dt.save_checkpoint(path, nn.Linear(1, 1), process_group=group))
    mesh = DeviceMesh.from_group(group, "cpu")
    model, other = (fully_shard(dt.cast(Uneven(), "bf16"), mesh=mesh) for _ in range(2))
    expected = dt.master_weights(model)
    dt.save_checkpoint(path, model, process_group=group)
    dt.load_checkpoint(path, other, process_group=group)
    return all(torch.equal(local(got), local(expected[name])) for name, got in dt.master_weights(other).items())


def load_and_save(source: Path, goal: Path, kind: str, cases: tuple[str, ...]) -> list[Any]:
    results = []
    for case in cases:
        parts = make(case, 2, kind)
        if kind == "sharded":
            evaluate(parts)
        load(source / case, parts)
        save(goal / case, parts, step=3)
        drawn = draw()
        load(source / case, parts)
        assert draw() == drawn
        results.append((bits(parts), drawn))
    return results


def check_folder(path: Path, shards: int) -> None:
    """Assert that a checkpoint is JSON and safetensors without a byte besides: nothing that could be executed."""
    names = {f"tensors-{rank:05d}-of-{shards:05d}.safetensors" for rank in range(1, shards + 1)}
    assert {file.name for file in path.iterdir()} == {"manifest.json", "tensors.safetensors"} | names
    assert json.loads((path / "manifest.json").read_text())["manifest"]["format_version"] == (2 if shards else 1)
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        assert len(content) == 8 + length + max(ends)


def test_any_number_of_ranks_goes_on_from_what_any_number_saved(ranks, tmp_path, monkeypatch):
    saved = ranks.run(2, save_and_go_on, tmp_path / "two")
    expected = [result[0] for result in saved[0]]
    assert expected[0]["embed.weight"].any()
    check_folder(tmp_path / "two" / "bf16", 2)
    verify(tmp_path / "two" / "bf16")
    with pytest.raises(CheckpointError, match="holds parts of tensors that several ranks saved"):
        read_folder(tmp_path / "two" / "bf16")

    for before, after in zip(saved, ranks.run(2, load_and_go_on, tmp_path / "two"), strict=True):
        for old, new in zip(before, after, strict=True):
            assert same(old[0], new[0])
            assert same(old[1], new[1])
            assert old[2] == new[2]

    to_fp32, to_bf16 = ranks.run(2, convert, tmp_path / "two")[0]
    assert differing(to_fp32, expected[0]) == []
    # a frozen weight has no tail, so BF16 keeps its rounding only
    assert differing(to_bf16, expected[2]) == ["frozen.bias", "frozen.weight"]

    on_three = ranks.run(3, load_and_save, tmp_path / "two", tmp_path / "three", "sharded", CASES)
    assert all(same(got, want) for (got, _), want in zip(on_three[0], expected, strict=True))
    draws = [result[0][1] for result in on_three]
    assert len({tuple(drawn) for drawn in draws}) == 3
    check_folder(tmp_path / "three" / "fp16", 3)

    def executed(*_: object, **__: object) -> None:
        raise AssertionError("loading a checkpoint must not unpickle anything")

    with monkeypatch.context() as patch:
        for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
            patch.setattr(module, name, executed)
        on_one = load_and_save(tmp_path / "three", tmp_path / "one", "plain", CASES)
    assert all(same(got, want) for (got, _), want in zip(on_one, expected, strict=True))
    check_folder(tmp_path / "one" / "fp32", 0)
    # of the rank that saved first, which is the one that loads
    assert on_one[0][1] == draws[0]

    for kind, size, cases in (("sharded", 2, CASES), ("sharded", 1, ("fp32",)), ("replicated", 2, ("bf16",))):
        again = ranks.run(size, load_and_save, tmp_path / "one", tmp_path / kind, kind, cases)
        assert all(same(got, expected[CASES.index(case)]) for (got, _), case in zip(again[0], cases, strict=True))
    manifest = read_folder(tmp_path / "replicated" / "bf16")
    assert "embed.weight" in manifest["model"]
    assert len(manifest["random_of_other_ranks"]) == 1
    check_folder(tmp_path / "replicated" / "bf16", 0)
    back = load_and_save(tmp_path / "replicated", tmp_path / "back", "plain", ("bf16",))
    assert same(back[0][0], expected[0])


def test_a_process_group_saves_and_loads_without_the_others(ranks, tmp_path):
    outside, *inside = ranks.run(3, only_in_a_group, tmp_path / "last")
    assert inside == [True, True]
    assert outside.startswith("this rank is not part of the process group")
    check_folder(tmp_path / "last", 2)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def failing_writes(path: Path) -> tuple[dict[str, str], bool]:
    from torch.distributed.checkpoint.filesystem import FileSystem

    parts = make("bf16", 0, "sharded")
    train(parts, 1)
    save(path, parts, step=1)
    messages = {}
    for rank, module, name in (
        (1, FileSystem, "create_stream"),
        (1, shard_files, "flush"),
        (0, shard_files, "partial_folder"),
        (0, checkpoint_folder, "save_file"),
        (0, checkpoint_folder, "replace_folder"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(module, name, full_disk)
            messages[name] = message_of(lambda: save(path, parts, step=2))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(shard_files, "Path", lambda _: path.parent.parent / "elsewhere")
        messages["elsewhere"] = message_of(lambda: save(path, parts, step=2))
    messages["path"] = message_of(lambda: save(path.parent / str(dist.get_rank()), parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent if dist.get_rank() == 0 else path)
        messages["folder"] = message_of(lambda: save(Path("last"), parts))
    messages["progress"] = message_of(lambda: save(path, parts, odd=object() if dist.get_rank() == 1 else 1))
    replicated = make("bf16", 0, "replicated")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(checkpoint_folder, "save_file", full_disk)
        messages["replicated"] = message_of(lambda: save(path, replicated))
    dist.barrier()
    return messages, [entry.name for entry in path.parent.iterdir()] == [path.name] and load(path, parts) == {"step": 1}


def test_a_failing_write_on_one_rank_is_raised_on_all_and_leaves_the_old_checkpoint(ranks, tmp_path):
    (first, intact), (second, intact_there) = ranks.run(2, failing_writes, tmp_path / "folder" / "last")
    assert first == second
    assert intact
    assert intact_there
    wanted = f"cannot write the checkpoint {tmp_path / 'folder' / 'last'}: No space left on device (on rank %d)"
    failing = {"create_stream": 1, "flush": 1} | dict.fromkeys(
        ("partial_folder", "save_file", "replace_folder", "replicated"), 0
    )
    assert {name: first[name] for name in failing} == {name: wanted % rank for name, rank in failing.items()}
    assert "rank 0 does not see tensors-00002-of-00002.safetensors, which other ranks wrote" in first["elsewhere"]
    assert f"rank 1 has another path than rank 0: {tmp_path}/folder/1 and {tmp_path}/folder/0" in first["path"]
    assert f"another path than rank 0: {tmp_path}/folder/last/last and {tmp_path}/folder/last;" in first["folder"]
    assert '"progress.odd" is a object; leave it out (on rank 1)' in first["progress"]


def failing_loads(path: Path) -> tuple[dict[str, str], bool]:
    from torch.distributed.fsdp import fully_shard as torchs_fully_shard

    parts = make("bf16", 0, "sharded")
    train(parts, 1)
    save(path, parts, step=1)
    train(parts, 1)
    model, optimizer, scaler, scheduler = parts
    before = own_bits(parts)
    messages = {}
    bad_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    scheduler_here = bad_scheduler if dist.get_rank() == 1 else scheduler
    messages["scheduler"] = message_of(load, path, (model, optimizer, scaler, scheduler_here))
    messages["model"] = message_of(dt.load_checkpoint, path, model if dist.get_rank() == 0 else nn.Linear(1, 1))
    messages["choice"] = message_of(dt.load_checkpoint, path, model, optimizer if dist.get_rank() == 0 else None)
    theirs: Any = make("bf16", 0)[0]
    for module in (theirs.norm, theirs):
        torchs_fully_shard(module)
    messages["theirs"] = message_of(dt.load_checkpoint, path, theirs)
    messages["theirs saved"] = message_of(dt.save_checkpoint, path, theirs)
    # the same tensors, another manifest
    other = path.parent / "other"
    for place in (path, other):
        save(place, parts, step=place.name)
    messages["other"] = message_of(load, path if dist.get_rank() == 0 else other, parts).partition(" at ")[0]
    damaged = path / "tensors-00002-of-00002.safetensors"
    intact = damaged.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        damaged.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    dist.barrier()
    messages["damaged"] = message_of(load, path, parts)
    dist.barrier()
    if dist.get_rank() == 0:
        damaged.write_bytes(intact)
        os.link(damaged, path / "more.safetensors")
    dist.barrier()
    messages["foreign"] = message_of(load, path, parts)
    return messages, same(own_bits(parts), before)


def test_a_failing_load_on_one_rank_is_raised_on_all_and_changes_nothing(ranks, tmp_path):
    path = tmp_path / "last"
    (first, unchanged), (second, unchanged_there) = ranks.run(2, failing_loads, path)
    assert first == second
    assert unchanged
    assert unchanged_there
    assert first["scheduler"].startswith(f"{path} does not fit: ")
    assert first["scheduler"].endswith("(on rank 1)")
    assert first["model"].startswith(f'{path} was saved under policy "bf16", the model is under no policy')
    assert first["choice"].startswith("rank 1 has another choice of what to load than rank 0: [] and ['optimizer']")
    for name in ("theirs", "theirs saved"):
        assert '"gain" has lost its tail, and with it the lower bits of its FP32 master' in first[name]
    assert first["other"] == "rank 1 has another checkpoint"
    assert "tensors-00002-of-00002.safetensors is damaged: its SHA-256" in first["damaged"]
    assert first["foreign"].startswith(f"{path} holds more.safetensors, which its manifest does not name")
