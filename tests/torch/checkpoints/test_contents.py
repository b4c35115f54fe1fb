"""Checkpoints: saving, loading and going on changes no bit; what does not fit is refused and nothing is lost."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError
from duotone.policy import Policy
from duotone.torch.checkpoints.folder import read_manifest
from duotone.torch.parameters.storage import storage_of


class Tied(nn.Module):
    """Embedding and head share a weight; a norm keeps running statistics; dropout draws random numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.drop(self.norm(self.embed(tokens)))))


def make(policy: str, optimizer_kind: type = dt.AdamW, seed: int = 0, width: int = 8):
    torch.manual_seed(seed)
    model = dt.cast(Tied(width), policy)
    optimizer = optimizer_kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = dt.LossScaler(policy)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return model, optimizer, scaler, scheduler


def train(parts, steps: int) -> None:
    model, optimizer, scaler, scheduler = parts
    for _ in range(steps):
        tokens = torch.randint(11, (16,))
        scaler.backward(nn.functional.cross_entropy(model(tokens).float(), tokens))
        scaler.step(optimizer, scheduler=scheduler)
        optimizer.zero_grad()


def bits(parts) -> dict[str, torch.Tensor]:
    model, optimizer, scaler, scheduler = parts
    found = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    found |= {f"master.{name}": value for name, value in dt.master_weights(model, optimizer).items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"state.{index}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    found["scale"] = torch.tensor(scaler.state_dict()["state"]["scale"])
    found["lr"] = torch.tensor(scheduler.get_last_lr())
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def save(path: Path, parts, **progress) -> None:
    model, optimizer, scaler, scheduler = parts
    dt.save_checkpoint(path, model, optimizer, scaler, scheduler=scheduler, progress=progress)


def load(path: Path, parts, **options):
    model, optimizer, scaler, scheduler = parts
    return dt.load_checkpoint(path, model, optimizer, scaler, scheduler=scheduler, **options)


@pytest.mark.parametrize("optimizer_kind", [dt.AdamW, dt.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-mixed", "bf16-true,rounding=stochastic"])
def test_going_on_changes_no_bit(tmp_path, policy, optimizer_kind):
    if optimizer_kind is torch.optim.AdamW and policy in ("bf16", "fp16", "bf16-true,rounding=stochastic"):
        policy = "fp16-mixed"
    parts = make(policy, optimizer_kind)
    train(parts, 5)
    save(tmp_path / "last", parts, step=5)
    train(parts, 5)
    expected = bits(parts)
    other = make(policy, optimizer_kind, seed=1)
    train(other, 2)
    assert load(tmp_path / "last", other) == {"step": 5}
    train(other, 5)
    assert same(bits(other), expected)
    assert other[0].head.weight is other[0].embed.weight


def test_random_states_come_back(tmp_path):
    parts = make("bf16")
    # somewhere that no test runner puts the generators by itself
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12345)
    save(tmp_path / "last", parts)
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()
    load(tmp_path / "last", parts)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()) == drawn


def test_parts_may_be_left_out(tmp_path):
    parts = make("bf16")
    train(parts, 2)
    save(tmp_path / "last", parts)
    model = make("bf16", seed=3)[0]
    dt.load_checkpoint(tmp_path / "last", model)
    assert same(dt.master_weights(model), dt.master_weights(parts[0]))
    dt.save_checkpoint(tmp_path / "weights", model)
    with pytest.raises(CheckpointError, match="holds no optimizer; load it without one"):
        load(tmp_path / "weights", parts)


def test_a_second_save_replaces_the_first(tmp_path):
    parts = make("bf16")
    save(tmp_path / "last", parts, step=0)
    train(parts, 1)
    save(tmp_path / "last", parts, step=1)
    assert load(tmp_path / "last", make("bf16")) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_it_is_two_files_that_execute_nothing(tmp_path):
    parts = make("fp16")
    train(parts, 2)
    save(tmp_path / "last", parts)
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"manifest.json", "tensors.safetensors"}
    assert Policy.from_json(read_manifest(tmp_path / "last")["policy"]).name == "fp16"


@pytest.mark.parametrize(
    ("saved", "wanted"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16,grad=float32"), ("fp16", "bf16")]
)
def test_another_policy_is_refused_unless_converting(tmp_path, saved, wanted):
    parts = make(saved)
    train(parts, 4)
    save(tmp_path / "last", parts, step=4)
    other = make(wanted, seed=5)
    before = bits(other)
    with pytest.raises(CheckpointError, match=f'saved under policy "{saved}", the model is under "?.*{wanted}'):
        load(tmp_path / "last", other)
    assert same(bits(other), before)

    assert load(tmp_path / "last", other, convert=True) == {"step": 4}
    assert other[2].settings == dt.LossScaler(wanted).settings
    masters, expected = dt.master_weights(*other[:2]), dt.master_weights(*parts[:2])
    for name, value in expected.items():
        # a frozen weight has no tail, so BF16 keeps its rounding only
        want = value.to(other[0].get_parameter(name).dtype).float() if "frozen" in name else value
        assert torch.equal(masters[name], want), name
    moments = [
        [
            value
            for _, state in sorted(each[1].state_dict()["state"].items())
            for key, value in state.items()
            if "exp" in key
        ]
        for each in (parts, other)
    ]
    assert len(moments[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    for param in other[0].parameters():
        needs = param.requires_grad and param.dtype == torch.bfloat16
        assert (storage_of(param).tail is not None) == needs
    train(other, 1)


def test_converting_moments_gives_them_the_dtype_of_the_policy(tmp_path):
    parts, other = make("bf16"), make("bf16,state=bf16", seed=5)
    train(parts, 3)
    save(tmp_path / "last", parts)
    load(tmp_path / "last", other, convert=True)
    for one, two in zip(parts[0].parameters(), other[0].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in parts[1].state[one]:
                assert torch.equal(other[1].state[two][name], parts[1].state[one][name].bfloat16())
    train(other, 1)


def test_a_weight_that_was_trained_and_then_frozen_is_converted(tmp_path):
    parts, other = make("fp32"), make("bf16", seed=5)
    train(parts, 2)
    torch.manual_seed(5)
    model = Tied()
    model.embed.weight.requires_grad_(False)
    other = dt.cast(model, "bf16"), dt.AdamW([p for n, p in model.named_parameters() if "frozen" not in n]), *other[2:]
    save(tmp_path / "last", parts)
    dt.load_checkpoint(tmp_path / "last", *other[:2], convert=True)
    assert torch.equal(other[0].embed.weight, parts[0].embed.weight.bfloat16())
    assert torch.equal(other[1].state[model.embed.weight]["exp_avg"], parts[1].state[parts[0].embed.weight]["exp_avg"])


def test_a_weight_too_large_for_fp16_is_not_converted_to_inf(tmp_path):
    parts = make("bf16")
    with torch.no_grad():
        parts[0].embed.weight[0, 0] = 70000.0
    save(tmp_path / "last", parts)
    other = make("fp16")
    before = bits(other)
    with pytest.raises(CheckpointError, match=r'"embed\.weight" holds 70\d\d\d, beyond FP16'):
        load(tmp_path / "last", other, convert=True)
    assert same(bits(other), before)


def test_another_model_is_refused_whole(tmp_path):
    save(tmp_path / "last", make("bf16"))
    wider = make("bf16", width=9)
    before = bits(wider)
    with pytest.raises(CheckpointError, match=r'does not fit the model: "embed.weight" is .*\(11, 8\) there'):
        load(tmp_path / "last", wider)
    assert same(bits(wider), before)
    with pytest.raises(CheckpointError, match='does not fit the model: the checkpoint has no "bias"'):
        dt.load_checkpoint(tmp_path / "last", dt.cast(nn.Linear(8, 8), "bf16"))


def test_another_optimizer_is_refused(tmp_path):
    parts = make("bf16")
    train(parts, 1)
    save(tmp_path / "last", parts)
    other = make("bf16", dt.SGD)
    before = bits(other)
    with pytest.raises(CheckpointError, match="does not fit: the state is one of AdamW, not of SGD"):
        load(tmp_path / "last", other)
    assert same(bits(other), before)
    fewer = make("bf16")
    fewer_optimizer = dt.AdamW([fewer[0].embed.weight])
    with pytest.raises(CheckpointError, match="other parameters in its optimizer"):
        dt.load_checkpoint(tmp_path / "last", fewer[0], fewer_optimizer)


def test_a_scheduler_that_does_not_fit_leaves_all_masters_as_they_were(tmp_path):
    parts = make("bf16")
    train(parts, 3)
    save(tmp_path / "last", parts)
    model, optimizer, scaler, _ = make("bf16", seed=5)
    other = model, optimizer, scaler, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    train(other, 2)
    before = bits(other)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path / "last", other)
    assert same(bits(other), before)


def test_skipped_steps_are_part_of_what_goes_on(tmp_path):
    parts = make("fp16")
    # far too large a scale, and one that grows often, so that steps before and after the checkpoint are skipped
    parts[2].load_state_dict(dt.LossScaler("fp16", init_scale=2.0**32, growth_interval=2).state_dict())
    train(parts, 6)
    skipped_before = parts[2].skipped.item()
    save(tmp_path / "last", parts)
    train(parts, 14)
    other = make("fp16", seed=1)
    load(tmp_path / "last", other)
    train(other, 14)
    assert same(bits(other), bits(parts))
    assert other[2].state_dict() == parts[2].state_dict()
    assert 0 < skipped_before < parts[2].skipped.item() < 20


def test_what_cannot_be_saved_is_named(tmp_path):
    model = dt.cast(nn.Linear(1, 1), "bf16")
    with pytest.raises(CheckpointError, match=r'"progress\.loader" is a object'):
        dt.save_checkpoint(tmp_path / "last", model, progress={"loader": object()})
    assert not any(tmp_path.iterdir())
