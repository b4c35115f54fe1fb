"""One record per parameter: whatever copies, moves or wraps a parameter takes every field of it along."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import PolicyError
from duotone.policy import Policy
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.kernels import Rounding
from duotone.torch.parameters.shards import cut, local
from duotone.torch.parameters.storage import (
    NO_STORAGE,
    Storage,
    other_attributes,
    set_storage,
    set_tail,
    storage_changes,
    storage_of,
)

# the fields that code reads, and so need real values; a new field gets a mark
REAL = {
    "param",
    "grad",
    "reduce",
    "state",
    "rounding",
    "frozen",
    "tail",
    "weight_dtype",
    "weight_shape",
    "order",
    "ranks",
}
REAL |= {"in_full_precision"}
POLICIES = ["bf16,state=bf16,reduce=bf16", "fp16", "bf16-true,rounding=stochastic"]


def marked(policy: str, seed: int = 0, **changes: Any) -> nn.Sequential:
    """Return a cast model in whose records every field has a value that is not the default, where it can."""
    torch.manual_seed(seed)
    model = dt.cast(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), policy)
    for path, param in model.named_parameters():
        marks = {field.name: f"{field.name} of {path}" for field in fields(Storage) if field.name not in REAL}
        set_storage(param, replace(storage_of(param), **{**marks, "is_replaced": False, **changes}))
    return model


def differences(before: Storage, after: Storage) -> list[str]:
    """Return the names of the fields in which a record differs from what it was."""
    assert type(after) is Storage
    found = []
    for field in fields(Storage):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            # of a sharded tail this rank's part
            is_same = torch.equal(local(cut(old, new)), local(new))
        else:
            is_same = type(old) is type(new) and old == new
        if not is_same:
            found.append(field.name)
    return found


def changed(model: nn.Module, records: dict[str, Storage]) -> dict[str, list[str]]:
    """Return which fields of a model's records are not as they were, by parameter."""
    now = {name: storage_of(param) for name, param in model.named_parameters()}
    assert now.keys() == records.keys()
    return {name: found for name in now if (found := differences(records[name], now[name]))}


def records_of(model: nn.Module) -> dict[str, Storage]:
    """Return the records of a model's parameters, with tails that nothing changes."""
    records = {name: storage_of(param) for name, param in model.named_parameters()}
    return {name: copy.deepcopy(storage) for name, storage in records.items()}


def test_every_field_has_a_value_of_its_own_somewhere() -> None:
    models = [marked(policy) for policy in POLICIES]
    models.append(marked("bf16", ranks="some", frozen="tail", is_replaced=True, in_full_precision=True))
    records = [storage for model in models for storage in records_of(model).values()]
    records += [storage_of(param) for param in models[-1].parameters()]
    for field in fields(Storage):
        assert any(getattr(storage, field.name) != field.default for storage in records), field.name


def test_a_parameter_without_a_record_has_the_defaults() -> None:
    param = nn.Parameter(torch.ones(2))
    assert storage_of(param) is NO_STORAGE
    assert other_attributes(param) == {}
    assert [getattr(NO_STORAGE, field.name) for field in fields(Storage)] == [
        field.default for field in fields(Storage)
    ]


def test_a_record_is_replaced_as_a_whole_and_that_is_counted() -> None:
    param = nn.Parameter(torch.ones(2))
    param.group = "user"
    before = storage_changes()
    set_storage(param, Storage(name="weight"))
    assert storage_changes() != before
    assert storage_of(param).name == "weight"
    assert other_attributes(param) == {"group": "user"}
    with pytest.raises(FrozenInstanceError):
        storage_of(param).name = "other"  # type: ignore[misc]
    before = storage_changes()
    assert storage_of(param) == Storage(name="weight")
    assert storage_changes() == before


def test_a_tail_knows_the_weight_that_it_belongs_to() -> None:
    param = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    set_storage(param, Storage(name="weight"))
    set_tail(param, torch.zeros(2, 3, dtype=torch.int16))
    assert (storage_of(param).weight_dtype, storage_of(param).weight_shape) == (torch.bfloat16, torch.Size([2, 3]))
    set_tail(param, None)
    assert storage_of(param) == Storage(name="weight")
    assert storage_of(param).tail is None


def by_deep_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_deep_copies_of_parts(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(part) for part in (model[0], model[2])))


def by_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", [by_deep_copy, by_deep_copies_of_parts, by_pickle])
def test_copies_have_every_field_but_ranks(policy: str, way: Callable[[nn.Module], nn.Module]) -> None:
    ranks = None if way is by_pickle else object
    model = marked(policy, ranks=ranks, in_full_precision=True)
    own = {"ranks": None, "in_full_precision": False}
    expected = {param.data_ptr(): replace(storage_of(param), **own) for param in model.parameters()}
    copied = way(model)
    originals = [
        p for part in (model if len(copied) == len(model) else [model[0], model[2]]) for p in part.parameters()
    ]
    for param, original in zip(copied.parameters(), originals, strict=True):
        assert differences(expected[original.data_ptr()], storage_of(param)) == []
        tail = storage_of(original).tail
        assert tail is None or storage_of(param).tail is not tail


def test_a_copy_of_no_record_is_no_record() -> None:
    assert copy.deepcopy(NO_STORAGE) is NO_STORAGE
    param = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    set_storage(param, copy.deepcopy(NO_STORAGE))
    assert storage_of(pickle.loads(pickle.dumps(param))) == NO_STORAGE


def test_a_tied_parameter_has_one_record_in_a_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    copied = copy.deepcopy(dt.cast(model, "bf16"))
    assert copied[0].weight is copied[1].weight
    assert storage_of(copied[0].weight).tail is not None


def test_saved_parameters_load_without_executing_anything() -> None:
    model = marked("bf16-true,rounding=stochastic")
    model[2].weight.unknown = 1
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    records = records_of(model)
    for name, param in loaded.items():
        assert differences(records[name], storage_of(param)) == []
    assert loaded["2.weight"].unknown == 1
    assert storage_of(loaded["0.weight"]).rounding is Rounding.STOCHASTIC


def test_saved_parameters_load_where_duotone_is_not(tmp_path: Path) -> None:
    torch.save(dict(marked("bf16").named_parameters()), tmp_path / "weights.pt")
    code = "import sys, torch; print(torch.load('weights.pt')['0.weight'].dtype, 'duotone' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["torch.bfloat16", "False"]


def test_records_of_other_versions_are_read() -> None:
    param = nn.Parameter(torch.ones(1))
    plain = pickle.loads(pickle.dumps(Storage(name="weight", rounding=Rounding.NEAREST)))
    del plain["order"]
    param.duotone_storage = {**plain, "of_a_later_version": 1}
    assert storage_of(param) == Storage(name="weight", rounding=Rounding.NEAREST)
    assert type(param.duotone_storage) is Storage


def test_a_model_that_an_earlier_version_pickled_is_refused() -> None:
    forward = cast_forward_of(marked("bf16"))
    assert forward is not None
    state = {**forward.__dict__, "_grad_dtypes": []}
    with pytest.raises(
        PolicyError, match=r"pickled by an earlier version .* save it with that version's save_checkpoint"
    ):
        object.__new__(type(forward)).__setstate__(state)


class Watching(torch.optim.NAdam):
    """Notes the records and attributes of what it updates."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [(storage_of(p), other_attributes(p)) for group in self.param_groups for p in group["params"]]
        return super().step(closure)


@pytest.mark.parametrize("policy", ["fp16", "bf16,reduce=bf16", "bf16-true,rounding=stochastic"])
def test_master_weights_leave_every_field_and_load_into_it(policy: str) -> None:
    model, other = marked(policy), marked(policy, seed=1)
    model[0].weight.group = "user"
    records, of_other = records_of(model), records_of(other)
    inner = Watching(model.parameters())
    optimizer, second = dt.MasterWeights(inner), dt.MasterWeights(Watching(other.parameters()))
    model(torch.ones(2, 6)).float().sum().backward()
    optimizer.step()
    assert {name for found in changed(model, records).values() for name in found} <= {"tail"}
    assert inner.seen[0] == (NO_STORAGE, {"group": "user"})
    second.load_state_dict(optimizer.state_dict())
    assert {name for found in changed(other, of_other).values() for name in found} <= {"tail"}
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert differences(storage_of(ours), storage_of(theirs)) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_optimizers_leave_every_field_and_load_into_it(policy: str) -> None:
    model, other = marked(policy), marked(policy, seed=1)
    records = records_of(model)
    optimizer, second = dt.AdamW(model.parameters()), dt.AdamW(other.parameters())
    model(torch.ones(2, 6)).float().sum().backward()
    optimizer.step()
    assert {name for found in changed(model, records).values() for name in found} <= {"tail"}
    second.load_state_dict(optimizer.state_dict())
    assert changed(other, records_of(model)) == {}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
def test_prepare_keeps_every_field_that_a_cast_does_not_set(policy: str, kind: Any) -> None:
    if kind is torch.optim.NAdam and "state" in policy:
        policy = "bf16"
    model = marked(policy)
    scale = Policy.parse(policy).loss_scale
    records = {path: replace(each, name=path, loss_scale=scale) for path, each in records_of(model).items()}
    dt.prepare(model, kind(model.parameters()), policy)
    assert changed(model, records) == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_restores_tails_and_leaves_every_other_field(policy: str, tmp_path: Path) -> None:
    model, other = marked(policy), marked(policy, seed=1)
    dt.save_checkpoint(tmp_path / "saved", model, dt.AdamW(model.parameters()))
    dt.load_checkpoint(tmp_path / "saved", other, dt.AdamW(other.parameters()))
    assert changed(other, records_of(model)) == {}


def sharded(policy: str) -> list[Any]:
    """Return which fields are not carried, and which old parameters do not know that they were replaced."""
    model = marked(policy)
    records, old = records_of(model), list(model.parameters())
    dt.fully_shard(model)
    left = [
        storage_of(param).name
        for param in old
        if not storage_of(param).is_replaced or storage_of(param).tail is not None
    ]
    return [changed(model, records), left]


@pytest.mark.parametrize("policy", POLICIES)
def test_fully_shard_gives_every_field_to_the_new_parameters(policy: str, ranks: Any) -> None:
    assert ranks.run(2, sharded, policy) == [[{}, []]] * 2


def parallel(policy: str) -> list[Any]:
    """Return which fields are not carried, and whether the ranks are known."""
    model = marked(policy)
    records = records_of(model)
    wrapped = dt.data_parallel(model)
    known = all(storage_of(param).ranks.group is dist.group.WORLD for param in model.parameters())
    copied = copy.deepcopy(wrapped.module)
    return [changed(model, records), known, changed(copied, records)]


@pytest.mark.parametrize("policy", POLICIES)
def test_data_parallel_sets_ranks_and_leaves_every_other_field(policy: str, ranks: Any) -> None:
    for differing, known, of_copy in ranks.run(2, parallel, policy):
        assert {name for found in differing.values() for name in found} == {"ranks"}
        assert known
        assert of_copy == {}
