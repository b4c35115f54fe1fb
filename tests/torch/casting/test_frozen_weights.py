"""Frozen weights: what a cast keeps of them, what it says, and what comes of freezing and unfreezing later."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, PolicyError
from duotone.torch.casting import frozen_weights
from duotone.torch.parameters.storage import storage_of

CHOICES = ["rounded", "float32", "tail"]


class Frequencies(nn.Module):
    """A Fourier embedding: one frozen vector."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(16 * torch.randn(4), requires_grad=False)

    def forward(self, time):
        angle = time[:, None] * self.scale
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Model(nn.Module):
    """Positions of both kinds, a Fourier embedding and a product, all frozen; a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.time = Frequencies()
        self.body = nn.Linear(8, 8)
        self.requires_grad_(False)
        self.head = nn.Linear(8, 2)

    def forward(self, index, time):
        hidden = self.table(index) + self.positions + self.time(time)[:, None]
        return self.head(self.body(hidden))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def inputs():
    return torch.arange(6).repeat(2, 1), torch.tensor([713.0, 714.0])


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_what_each_choice_keeps(model, policy, choice):
    before, narrow = bits_of(model), {"bf16": torch.bfloat16, "fp16": torch.float16}[policy]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DuotoneWarning)
        dt.cast(model, f"{policy},frozen={choice},residual=compute")
    frozen = {name: param for name, param in model.named_parameters() if not param.requires_grad}
    assert model.head.weight.dtype == narrow
    in_float32 = {name for name, param in frozen.items() if param.dtype == torch.float32}
    with_tail = {name for name, param in frozen.items() if storage_of(param).tail is not None}
    if choice == "rounded":
        assert in_float32 == {"time.scale"}
        assert with_tail == {"table.weight", "positions"}
        (warning,) = (each for each in caught if "frozen" in str(each.message))
        assert warning.filename == __file__
        assert str(warning.message) == (
            "frozen weights were rounded to 16 bits and have no masters (body.weight, body.bias): uncast, exports and "
            "a training that unfreezes them later start from the rounding; products read the same. To keep every bit "
            "write frozen=tail in the policy, or in a rule, for 144 bytes more, or frozen=float32"
        )
    else:
        assert not any("frozen" in str(each.message) for each in caught)
        assert in_float32 == ({*frozen} if choice == "float32" else set())
        assert with_tail == ({*frozen} if choice == "tail" else set())
    assert model(*inputs()).isfinite().all()
    lossy = {"body.weight", "body.bias"} if choice == "rounded" else set()
    # FP16 keeps what is at least 2^-16
    assert set(changed(dt.uncast(model), before)) == lossy


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_is_lost(model):
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    dt.cast(model, "bf16")
    assert storage_of(model.body.weight).tail is None
    # and again, and without masters, where every weight is rounded
    dt.cast(model, "bf16")
    dt.cast(Model(), "bf16-true,rounding=nearest")


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_table_is_not_large_and_no_operand_of_a_product(model, monkeypatch):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 8, 8)), nn.Parameter(torch.randn(8))

    model.experts, model.filter = Experts(), nn.Conv2d(1, 1, 3)
    model.requires_grad_(False)
    monkeypatch.setattr(frozen_weights, "LARGEST_TABLE", 48)
    model.large = nn.Embedding(7, 7).requires_grad_(False)
    # an embedding that is the head's weight is an operand too
    model.tied = nn.Embedding(2, 8).requires_grad_(False)
    model.head.weight = model.tied.weight
    dt.cast(model, "bf16,residual=compute")
    rounded = [name for name, param in model.named_parameters() if storage_of(param).tail is None]
    assert rounded == [
        "time.scale",
        "body.weight",
        "body.bias",
        "head.weight",
        "head.bias",
        "experts.weight",
        "filter.weight",
        "filter.bias",
        "large.weight",
    ]


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_norms_and_layer_scales_of_others_are_no_constants(model):
    class RMSNorm2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8), requires_grad=False)

    class LayerScale(RMSNorm2):
        pass

    model.norm, model.scale = RMSNorm2(), LayerScale()
    dt.cast(model, "bf16")
    for part in (model.norm, model.scale):
        assert part.weight.dtype == torch.bfloat16
        assert storage_of(part.weight).tail is not None


def test_a_fourier_embedding_tells_times_apart(model):
    dt.cast(model.time, "bf16,output=float32")
    times = torch.tensor([713, 714])
    angle = times[:, None] * model.time.scale
    assert torch.equal(model.time(times)[:, :4], angle.sin())


@pytest.mark.filterwarnings("error")
def test_rules_choose_and_the_json_says_so(model):
    before = bits_of(model)
    dt.cast(model, "bf16,frozen=tail,residual=compute; table: frozen=float32; type=Linear: frozen=float32")
    assert model.table.weight.dtype == model.body.weight.dtype == torch.float32
    assert storage_of(model.positions).tail is not None
    policy = dt.policy_of(model)
    assert policy is not None
    assert policy.from_json(policy.to_json()) == policy
    assert changed(dt.uncast(model), before) == []


def test_tied_weights_that_rules_tear_apart_are_refused(model):
    model.head.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)
    model.body.weight = model.head.weight
    with pytest.raises(PolicyError, match=r"kept in torch.bfloat16, frozen=rounded and torch.bfloat16, frozen=tail"):
        dt.cast(model, "bf16; head: frozen=tail")


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_unfrozen_starts_from_what_was_kept(model, choice):
    master = model.body.weight.detach().clone()
    dt.cast(model, f"bf16,frozen={choice}")
    model.body.requires_grad_(True)
    optimizer, scaler = dt.AdamW(model.parameters(), lr=0.0), dt.LossScaler("bf16")
    scaler.backward(model(*inputs()).sum())
    scaler.step(optimizer)
    kept = dt.master_weights(model, optimizer)["body.weight"]
    assert torch.equal(kept, master.bfloat16().float() if choice == "rounded" else master)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_casting_again_with_another_choice_starts_from_what_is_there(model):
    before = bits_of(model)
    for choice in ("tail", "float32", "tail"):
        dt.cast(model, f"bf16,frozen={choice}")
    assert changed(dt.uncast(copy.deepcopy(model)), before) == []
    with pytest.warns(DuotoneWarning, match=r"frozen weights were rounded .*body.weight, body.bias"):
        dt.cast(model, "bf16,frozen=rounded")
    assert storage_of(model.body.weight).tail is None
    # what was trained and is frozen since keeps its tail
    model.head.requires_grad_(False)
    dt.cast(model, "bf16")
    assert changed(dt.uncast(model), before) == ["body.weight", "body.bias"]


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("choice", CHOICES)
def test_masters_go_in_and_out(model, choice, tmp_path):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(torch.rand_like(param))
    given = bits_of(other)
    for each in (model, other):
        dt.cast(each, f"bf16,frozen={choice}")
    lossy = {"body.weight", "body.bias"} if choice == "rounded" else set()
    dt.load_master_weights(model, given)
    masters = dt.master_weights(model)
    assert {name for name in given if not torch.equal(masters[name], given[name])} == lossy
    # a state dict in FP32, and a checkpoint
    fresh = dt.cast(Model(), f"bf16,frozen={choice}")
    fresh.load_state_dict(given)
    dt.save_checkpoint(tmp_path / "checkpoint", fresh)
    again = dt.cast(Model(), f"bf16,frozen={choice}")
    dt.load_checkpoint(tmp_path / "checkpoint", again)
    for each in (fresh, again):
        masters = dt.master_weights(each)
        assert {name for name in given if not torch.equal(masters[name], given[name])} == lossy
    # what is edited in full precision keeps every bit, whatever the choice
    with dt.full_precision(again):
        again.body.weight.data.fill_(0.1)
    assert dt.master_weights(again)["body.weight"].equal(torch.full((8, 8), 0.1))


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_memory_counts_what_frozen_weights_cost(model):
    other = {}
    for choice in CHOICES:
        each: Any = dt.cast(copy.deepcopy(model), f"bf16,frozen={choice}")
        memory = dt.memory(each)
        assert memory.bytes_per_parameter == 2 + 2 + 2
        other[choice] = memory.other_bytes
    elements = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    assert other == {"rounded": 4 * elements - 2 * 72, "float32": 4 * elements, "tail": 4 * elements}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("choice", CHOICES)
def test_weights_without_elements_have_nothing_to_lose(choice):
    model = nn.Sequential(nn.Embedding(0, 2), nn.Embedding(0, 0)).requires_grad_(False)
    dt.cast(model, f"bf16,frozen={choice}")
    assert dt.uncast(model)[1].weight.shape == (0, 0)


def test_on_the_meta_device_nothing_is_read():
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dt.cast(Model(), "bf16")
    assert model.body.weight.dtype == torch.bfloat16
