"""Optimizers on DTensors: each rank updates its part, to the bits that the whole would get."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of

# on three ranks: two rows and one, one row each or none, one rank alone, 14 rows and 12
SHAPES = ((5, 6), (2,), (1, 7), (40, 3))


class Lamb(torch.optim.Optimizer):
    """Scales each update by the norm of the whole weight: You et al., "Large batch optimization" (1904.00962)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    ratio = param.norm() / param.grad.norm()
                    param.data.add_(param.grad * ratio, alpha=-group["lr"])


MADE: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: dt.AdamW(params, lr=1e-2),
    "AdamW, reference": lambda params: dt.AdamW(params, lr=1e-2, backend="reference"),
    "SGD": lambda params: dt.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Lion": lambda params: dt.Lion(params, lr=1e-3),
    "foreach": lambda params: dt.MasterWeights(torch.optim.AdamW(params, lr=1e-2, foreach=True)),
    "fused": lambda params: dt.MasterWeights(torch.optim.AdamW(params, lr=1e-2, fused=True)),
    "NAdam": lambda params: dt.MasterWeights(torch.optim.NAdam(params, lr=1e-2, foreach=False)),
    "Lamb": lambda params: dt.MasterWeights(Lamb(params)),
}


class Weights(nn.Module):
    """Some weights, called by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape, generator=torch.manual_seed(3)) for shape in SHAPES)

    def forward(self) -> None: ...


def both(policy: str, mesh: Any = None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    sharded = dt.fully_shard(dt.cast(Weights(), policy), mesh=mesh)
    return list(sharded.parameters()), list(dt.cast(Weights(), policy).parameters())


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if shards.is_shard(tensor) else tensor


def give_gradients(sharded: list[nn.Parameter], alone: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for number, (param, other) in enumerate(zip(sharded, alone, strict=True)):
        other.grad = torch.randn(other.shape, generator=generator).to(other.dtype)
        part = shards.local(shards.cut(other.grad, param))
        # fully_shard lets gradients lie anywhere in one piece of memory
        memory = torch.zeros(part.numel() + 5, dtype=part.dtype)
        moved = memory.as_strided(part.shape, part.stride(), storage_offset=number % 3)
        param.grad = shards.like(moved.copy_(part), param)


def errors(sharded: list[nn.Parameter], alone: list[nn.Parameter]) -> list[float]:
    """Return by how much masters are apart, in FP32's units in the last place."""
    found = []
    for param, other in zip(sharded, alone, strict=True):
        first, second = whole(read_master(param)), read_master(other)
        unit = second.abs().nextafter(torch.tensor(math.inf)) - second.abs()
        found.append(((first - second).abs() / unit).max().item())
    return found


def train(name: str, policy: str) -> float:
    sharded, alone = both(policy)
    optimizer, other = MADE[name](sharded), MADE[name](alone)
    for step in range(3):
        give_gradients(sharded, alone, step)
        scalars = {"grad_multiplier": torch.tensor(0.5), "found_inf": torch.tensor(step == 1)}
        optimizer.step(**scalars)
        other.step(**scalars)
    param: Any
    for param in sharded:
        for key, value in optimizer.state[param].items():
            if key not in ("step", "beta_products", "mu_product"):
                assert (value.placements, value.shape) == (param.placements, param.shape), key
    return max(errors(sharded, alone))


def train_all(cases: list[tuple[str, str]]) -> dict[str, float]:
    return {f"{name}, {policy}": train(name, policy) for name, policy in cases}


def test_parts_get_the_bits_of_the_whole(ranks) -> None:
    cases = [(name, "bf16") for name in MADE if name != "Lamb"]
    cases += [("AdamW", "fp16"), ("AdamW", "fp32"), ("fused", "fp16"), ("fused", "fp32"), ("SGD", "fp32")]
    for found in ranks.run(3, train_all, cases):
        assert set(found.values()) == {0.0}, found
    # norms are summed part by part
    for found in ranks.run(2, train_all, [("Lamb", "bf16"), ("Lamb", "fp32")]):
        assert all(error <= 16 for error in found.values()), found


def round_equal_rows(name: str, mesh_shape: tuple[int, ...]) -> list[list[float]]:
    """Return the rows of a weight of equal numbers after a step with equal gradients, rounded stochastically."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "parts")[-len(mesh_shape) :])
    model = dt.cast(nn.Linear(64, 2, bias=False), "bf16-true,rounding=stochastic")
    nn.init.ones_(model.weight)
    sharded = dt.fully_shard(model, mesh=mesh)
    optimizer: Any = dt.SGD(sharded.parameters(), lr=1.0)
    if name == "MasterWeights":
        optimizer = dt.MasterWeights(torch.optim.SGD(sharded.parameters(), lr=1.0))
    param = sharded.weight
    param.grad = shards.like(torch.full_like(shards.local(param), -(2.0**-8)), param)
    optimizer.step()
    return shards.local(param).float().tolist()


@pytest.mark.parametrize("name", ["SGD", "MasterWeights"])
def test_parts_draw_bits_of_their_own_and_copies_the_same(ranks, name: str) -> None:
    (first,), (second,) = ranks.run(2, round_equal_rows, name, (2,))
    # half of them are rounded up: all 64 alike, or none, would be a chance of 2^-64
    assert len(set(first)) == len(set(second)) == 2
    assert first != second
    copies = ranks.run(2, round_equal_rows, name, (2, 1))
    assert copies[0] == copies[1]
    assert copies[0][0] == first


def go_on(name: str, policy: str) -> list[str]:
    """Return what differs between going on and going on from a state dict, whole masters, or a copy."""
    sharded, alone = both(policy)
    optimizer = MADE[name](sharded)
    give_gradients(sharded, alone, 0)
    optimizer.step()
    # torch copies no parameter that has such a gradient
    optimizer.zero_grad()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    masters = [read_master(param) for param in sharded]
    again, _ = both(policy)
    resumed = MADE[name](again)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    for param, master in zip(again, masters, strict=True):
        dt.load_master_weights(_holder(param), {"weight": whole(master) if policy == "bf16" else master})
    copied = copy.deepcopy(optimizer)
    twins = [param for group in copied.param_groups for param in group["params"]]
    for params, each in ((sharded, optimizer), (again, resumed), (twins, copied)):
        give_gradients(params, alone, 1)
        each.step()
    found = []
    for number, param in enumerate(sharded):
        for kind, other in (("resumed", again[number]), ("copied", twins[number])):
            if not shards.local(read_master(param)).equal(shards.local(read_master(other))):
                found.append(f"{kind} {number}")
            tail = storage_of(other).tail
            if not shards.is_shard(other) or (tail is not None and not shards.is_shard(tail)):
                found.append(f"{kind} {number} is whole")
    return found


def _holder(param: nn.Parameter) -> nn.Module:
    holder = nn.Module()
    holder.register_parameter("weight", param)
    return holder


def go_on_all(cases: list[tuple[str, str]]) -> list[str]:
    return [f"{name}, {policy}: {found}" for name, policy in cases for found in go_on(name, policy)]


def test_states_and_copies_keep_parts(ranks) -> None:
    cases = [
        ("AdamW", "bf16"),
        ("AdamW", "bf16,state=bfloat16"),
        ("fused", "bf16"),
        ("SGD", "fp32"),
        ("foreach", "fp16"),
    ]
    assert ranks.run(2, go_on_all, cases) == [[], []]


def odd_ones() -> list[Any]:
    """Return what optimizers make of plain parameters beside parts, gradients yet to be summed, and other cuts."""
    from torch.distributed.tensor import DTensor, Partial

    sharded, alone = both("bf16")
    plain = dt.cast(nn.Linear(3, 2, bias=False), "bf16").weight
    before, versions = read_master(plain), [param._version for param in sharded]
    optimizer = dt.AdamW([{"params": [plain, *sharded]}], lr=1e-2)
    other = dt.AdamW(alone, lr=1e-2)
    for step in range(2):
        give_gradients(sharded, alone, step)
        plain.grad = torch.ones_like(plain)
        # what tensor parallelism leaves: each rank has a term of the sum
        param: Any
        reference: Any
        for param, reference in zip(sharded, alone, strict=True):
            term = reference.grad if torch.distributed.get_rank() == 0 else torch.zeros_like(reference)
            param.grad = DTensor.from_local(term, param.device_mesh, [Partial()], run_check=False)
        optimizer.step()
        other.step()
    exact = max(errors(sharded, alone)) == 0.0
    # autograd is to notice that saved weights have changed
    moved = (read_master(plain) < before).all().item() and all(
        param._version > version for param, version in zip(sharded, versions, strict=True)
    )
    memory = dt.memory(nn.ParameterList(sharded), optimizer)
    portable = optimizer.portable_state_dict()
    placed = [type(state["exp_avg"]).__name__ for state in portable["state"].values()]
    optimizer.load_portable_state_dict(portable)
    messages = []
    masters: dict[str, Any] = dt.master_weights(nn.ParameterList(sharded))
    replicated = {name: master.redistribute(placements=[_replicate()]) for name, master in masters.items()}
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"] = state["state"][1]["exp_avg"].redistribute(placements=[_replicate()])
    for call in (
        lambda: dt.load_master_weights(nn.ParameterList(sharded), replicated),
        lambda: optimizer.load_state_dict(state),
    ):
        with pytest.raises(OptimizerError) as caught:
            call()
        messages.append(str(caught.value))
    return [exact, moved, memory.parameters, memory.bytes_per_parameter, placed, messages]


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def test_plain_parameters_and_gradients_cut_otherwise(ranks) -> None:
    results = ranks.run(2, odd_ones)
    for exact, moved, _, bytes_per_parameter, placed, messages in results:
        assert exact
        assert moved
        assert bytes_per_parameter == 14.0
        assert placed == ["Tensor"] + ["DTensor"] * 4
        assert "is cut as R over a mesh of (2,) ranks, its parameter cut as S(0) over" in messages[0]
        assert "the parameter cut as S(0) over a mesh of (2,) ranks; load whole tensors" in messages[1]
    assert [parameters for _, _, parameters, *_ in results] == [18 + 1 + 7 + 60, 12 + 1 + 0 + 60]
