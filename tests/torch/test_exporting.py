"""Exported weights are the masters, or their one rounding; files load where nothing is known of Duotone."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError, FormatError, OptimizerError
from duotone.torch.exporting import export_checkpoint

POLICIES = ["bf16", "fp16", "bf16-mixed", "fp16-mixed", "fp32", "bf16-true,rounding=stochastic", None]
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Net(nn.Module):
    """Tied, frozen and FP64 parameters, buffers of several dtypes, one of them not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("coarse", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("gone", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens))))


def trained(policy: str | None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Net() if policy is None else dt.cast(Net(), policy)
    params = [param for param in model.parameters() if param.dtype != torch.float64]
    optimizer = dt.AdamW(params, lr=1e-3, backend="reference")
    for _ in range(2):
        model(torch.tensor([0, 2, 4])).square().mean().backward()
        optimizer.step(found_inf=torch.tensor(False))
    return model


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plain_model_has_the_masters_then(policy, same_bits):
    model = trained(policy)
    before = copy.deepcopy(model.state_dict())
    state = dt.export(model)
    plain = Net()
    plain.load_state_dict(state)
    masters = dt.master_weights(model) | {"wide": model.wide}
    assert all(same_bits(param, masters[name]) for name, param in plain.named_parameters())
    assert all(same_bits(buffer, before[name]) for name, buffer in plain.named_buffers() if name != "gone")
    assert list(state) == list(before)
    assert state["embed.weight"] is state["head.weight"]
    assert state["wide"].dtype == torch.float64
    # the model is as before, and what was exported does not follow it
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    kept = copy.deepcopy(state)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert all(same_bits(value, kept[name]) for name, value in state.items())


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_rounded_as_everywhere(name, same_bits):
    plain = trained("fp32")
    exact = dt.export(plain)
    rounded = dt.export(plain, dtype=FORMATS[name])
    if name != "float32":
        # a model that is cast to the format has these weights
        resident = dt.cast(
            copy.deepcopy(plain), {"bfloat16": "bf16", "float16": "fp16"}[name] + f"; type=BatchNorm1d: param={name}"
        ).state_dict()
        params = dict(plain.named_parameters(remove_duplicate=False))
        assert all(same_bits(rounded[each], resident[each].data) for each in params)
    assert {each.dtype for each in rounded.values()} == {
        FORMATS[name],
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
    }
    # buffers keep their dtype
    assert all(same_bits(rounded[each], exact[each]) for each, _ in plain.named_buffers() if each != "gone")
    assert all(map(torch.equal, dt.export(plain, dtype=name).values(), rounded.values()))


def test_special_values_are_kept(same_bits):
    model = nn.Linear(4, 1, bias=False)
    values = torch.tensor([[torch.nan, torch.inf, -0.0, 1 + 2**-9 + 2**-8]])
    model.weight.data.copy_(values)
    assert same_bits(dt.export(model)["weight"], values)
    for dtype in (torch.bfloat16, torch.float16):
        weight = dt.export(model, dtype=dtype)["weight"][0]
        assert weight[0].isnan()
        assert weight[1] == torch.inf
        assert weight[2].signbit()
    # halfway between two BF16 numbers: away from zero, as the resident weight of this master
    assert dt.export(model, dtype="bfloat16")["weight"][0, 3] == dt.cast(model, "bf16").weight[0, 3] == 1 + 2**-7


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_a_file_holds_the_same_and_a_tied_weight_once(suffix, tmp_path, same_bits):
    model = trained("bf16")
    expected = dt.export(model, dtype=torch.float16)
    path = tmp_path / "new" / f"model{suffix}"
    assert dt.export(model, path, torch.float16) == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    if suffix == ".safetensors":
        loaded = load_file(path)
        assert expected.keys() - loaded.keys() == {"head.weight"}
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
        assert load_model(Net(), path) == (set(), [])
    else:
        loaded = torch.load(path)
        assert loaded.keys() == expected.keys()
        assert path.stat().st_size < 10_000
        Net().load_state_dict(loaded)
    assert all(same_bits(value, expected[name]) for name, value in loaded.items())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = trained("bf16")
    path = dt.export(model, tmp_path / "model.safetensors")
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"cannot write the weights to .*model\.safetensors: No space left"):
        dt.export(model, path, "bfloat16")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_bad_input_is_refused(tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(CheckpointError, match=r"model\.onnx says by its suffix what it is to hold: \.safetensors"):
        dt.export(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="says by its suffix"):
        dt.export(model, tmp_path / "folder")
    for dtype in ("int8", torch.float64, "fp8"):
        with pytest.raises(FormatError, match=f"float32, bfloat16, float16, not in {dtype}; choose one of them"):
            dt.export(model, dtype=dtype)
    model.weight.data.fill_(-70000.0)
    with pytest.raises(CheckpointError, match=r'"weight" holds 70000, beyond FP16\'s largest 65504; export in'):
        dt.export(model, dtype="float16")

    class Extra(nn.Linear):
        def get_extra_state(self) -> str:
            return "more"

        def set_extra_state(self, state: str) -> None:
            assert state == "more"

    with pytest.raises(CheckpointError, match=r'"_extra_state" is a str; write a \.pt file'):
        dt.export(Extra(1, 1), tmp_path / "model.safetensors")
    Extra(1, 1).load_state_dict(torch.load(dt.export(Extra(1, 1), tmp_path / "model.pt")))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_wrappers_leave_no_trace_in_the_names():
    model = trained("bf16")
    assert list(dt.export(torch.compile(model))) == list(model.state_dict())


class Config:
    """As Hugging Face's: `save_pretrained` writes into it."""

    def __init__(self) -> None:
        self.dtype: Any = torch.float32


class Pretrained(Net):
    """What `dt.export` knows of a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def save_pretrained(self, folder: Path, state_dict: dict[str, Any]) -> None:
        folder.mkdir()
        self.config.dtype = str(self.embed.weight.dtype).removeprefix("torch.")
        config = {"dtype": self.config.dtype, "text_config": {"torch_dtype": self.config.dtype, "layers": 2}}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"dtype": "bfloat16"}}))
        torch.save(state_dict, folder / "model.bin")


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_folder_of_hugging_face_says_the_dtype_that_it_holds(dtype, tmp_path, same_bits):
    model = dt.cast(Pretrained(), "bf16")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert dt.export(model, folder, dtype) == folder
    assert {each.name for each in folder.iterdir()} == {"tokenizer.json", "config.json", "model.bin"}
    assert json.loads((folder / "config.json").read_text()) == {
        "dtype": dtype,
        "text_config": {"torch_dtype": dtype, "layers": 2},
        "quantization_config": {"dtype": "bfloat16"},
    }
    assert model.config.dtype == torch.float32
    loaded = torch.load(folder / "model.bin")
    assert all(same_bits(loaded[name], value) for name, value in dt.export(model, dtype=dtype).items())
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("policy", [*POLICIES[:3], POLICIES[-2]])
def test_a_checkpoint_is_exported_without_its_model(policy, tmp_path, same_bits):
    model = trained(policy)
    dt.save_checkpoint(tmp_path / "saved", model)
    for dtype in FORMATS:
        export_checkpoint(tmp_path / "saved", tmp_path / "model.pt", dtype)
        loaded, expected = torch.load(tmp_path / "model.pt"), dt.export(model, dtype=dtype)
        assert loaded.keys() == expected.keys()
        assert all(same_bits(loaded[name], value) for name, value in expected.items())


def test_a_checkpoint_of_an_earlier_version_is_exported(tmp_path):
    # one that knew neither tied names nor buffers; the model and its optimizer are in test_saved_states.py
    saved = Path(__file__).parent / "checkpoints" / "saved" / "adamw-fp16"
    export_checkpoint(saved, tmp_path / "model.pt", "bfloat16")
    state = torch.load(tmp_path / "model.pt")
    assert torch.bfloat16 in {value.dtype for value in state.values()}


def exported_from_shards(folder: str, policy: str) -> tuple[dict[str, Any], list[str]]:
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)), policy)
    expected = dt.export(model)
    dt.fully_shard(model)
    assert all(map(torch.equal, dt.export(model).values(), expected.values()))
    dt.export(model, Path(folder, "model.pt"), "bfloat16")
    dt.save_checkpoint(Path(folder, "saved"), model)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(70000.0 if policy == "bf16" else 1.0)
    refused = []
    if policy == "bf16":
        try:
            dt.export(model, Path(folder, "no.pt"), "float16")
        except CheckpointError as error:
            refused.append(str(error))
    return expected, refused


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_shards_are_gathered_and_written_once(ranks, tmp_path, policy, same_bits):
    (expected, refused), (_, refused_too) = ranks.run(2, exported_from_shards, str(tmp_path), policy)
    # whoever fails, all ranks raise
    assert refused == refused_too
    assert len(refused) == (policy == "bf16")
    loaded = torch.load(tmp_path / "model.pt")
    assert loaded.keys() == expected.keys()
    assert not (tmp_path / "no.pt").exists()
    export_checkpoint(tmp_path / "saved", tmp_path / "again.pt", "bfloat16")
    assert all(same_bits(torch.load(tmp_path / "again.pt")[name], value) for name, value in loaded.items())
    export_checkpoint(tmp_path / "saved", tmp_path / "exact.pt")
    assert all(same_bits(torch.load(tmp_path / "exact.pt")[name], value) for name, value in expected.items())


def lost() -> str:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(dt.cast(nn.Linear(2, 2), "bf16"))
    with pytest.raises(OptimizerError, match="has lost its tail") as raised:
        dt.export(model)
    return str(raised.value)


def test_lost_tails_are_named(ranks):
    assert all(ranks.run(2, lost))


@pytest.mark.slow
def test_a_file_loads_where_duotone_is_not(tmp_path):
    path = dt.export(trained("bf16"), tmp_path / "model.pt")
    code = f"import sys, torch; torch.load({str(path)!r}); print('duotone' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
