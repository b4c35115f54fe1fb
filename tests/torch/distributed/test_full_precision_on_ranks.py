"""`full_precision` of models that ranks share: sharded weights, what is gathered of them, and hooks that reduce."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import PolicyError
from duotone.torch.parameters.shards import local
from duotone.torch.parameters.storage import storage_of


class Net(nn.Module):
    """A frozen weight, tied ones, lengths that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.block = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.block(self.embed(tokens))))


def net(policy: str) -> Any:
    """Return a cast model whose masters no 16-bit weight holds."""
    model = dt.cast(Net(), policy)
    dt.load_master_weights(model, {name: master * 1.01 for name, master in dt.master_weights(model).items()})
    return model


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same(first: Any, second: Any) -> bool:
    first, second = whole(first).detach(), whole(second).detach()
    return first.dtype == second.dtype and first.equal(second)


def step(model: nn.Module, optimizer: Any, scaler: dt.LossScaler, seed: int) -> None:
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    tokens = torch.randint(7, (2 * size, 3), generator=torch.Generator().manual_seed(seed)).chunk(size)[rank]
    scaler.backward(F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    scaler.step(optimizer)
    optimizer.zero_grad()


def edit(model: Any) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + 1e-4)
        model.frozen.weight.fill_(0.1)


def gathered_dtypes(model: nn.Module) -> list[tuple[torch.dtype, torch.dtype]]:
    """Return the dtypes of the weights that a forward pass runs on, of embedding and norm."""
    seen: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
        for module in (model.embed, model.block[1])  # type: ignore[index, union-attr]
    ]
    with torch.no_grad():
        model(torch.tensor([[0, 1, 2]]))
    for hook in hooks:
        hook.remove()
    return [tuple(seen)]


def shared(policy: str, reshard: bool, steps_before: int) -> list[str]:
    """Return what differs between a sharded model and one on this rank, in a block, after it, and in later steps."""
    alone, sharded = net(policy), net(policy)
    dt.fully_shard(sharded.block, reshard_after_forward=reshard)
    dt.fully_shard(sharded, reshard_after_forward=reshard)
    wrapped = dt.data_parallel(alone)
    preset = policy.split(",", maxsplit=1)[0]
    optimizers = [dt.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (sharded, wrapped)]
    scalers = [dt.LossScaler(preset), dt.LossScaler(preset)]
    wrong = []

    def compare(when: str) -> None:
        masters, its_masters = dt.master_weights(sharded), dt.master_weights(alone)
        wrong.extend(f"{name} {when}" for name in masters if not same(masters[name], its_masters[name]))

    for number in range(steps_before):
        for model, optimizer, scaler in zip((sharded, wrapped), optimizers, scalers, strict=True):
            step(model, optimizer, scaler, number)
    objects, addresses = list(sharded.parameters()), [local(p).data_ptr() for p in sharded.parameters()]
    dtypes = [param.dtype for param in objects]
    masters = {name: whole(master).clone() for name, master in dt.master_weights(sharded).items()}
    with dt.full_precision(sharded), dt.full_precision(wrapped):
        wrong += [f"{n} inside" for n, p in sharded.named_parameters() if not same(p, masters[n])]
        edit(sharded)
        edit(alone)
        tokens = torch.arange(6).view(2, 3)
        for _ in range(2):
            with torch.no_grad():
                if not sharded(tokens).equal(alone(tokens)):
                    wrong.append("a forward pass inside")
        if gathered_dtypes(sharded) != [(torch.float32, torch.float32)]:
            wrong.append("gathered inside")
        sharded(tokens).sum().backward()
        if any(param.grad is not None and param.grad.dtype != torch.float32 for param in sharded.parameters()):
            wrong.append("gradients inside")
    compare("after")
    if not all(a is b for a, b in zip(sharded.parameters(), objects, strict=True)):
        wrong.append("parameters")
    if [p.dtype for p in objects] != dtypes or [local(p).data_ptr() for p in objects] != addresses:
        wrong.append("dtypes or addresses")
    if gathered_dtypes(sharded) != [(dtypes[0], torch.float32)]:
        wrong.append("gathered after")
    for number in range(2):
        for model, optimizer, scaler in zip((sharded, wrapped), optimizers, scalers, strict=True):
            step(model, optimizer, scaler, 10 + number)
        compare(f"after step {number}")
    if not same(sharded.frozen.weight, alone.frozen.weight) or storage_of(sharded.frozen.weight).tail is None:
        wrong.append("frozen")
    return wrong


@pytest.mark.parametrize(
    ("policy", "reshard", "steps_before"), [("bf16", True, 2), ("fp16", False, 1), ("bf16,reduce=bfloat16", True, 0)]
)
def test_two_ranks_do_what_one_does(ranks: Any, policy: str, reshard: bool, steps_before: int) -> None:
    assert ranks.run(2, shared, policy, reshard, steps_before) == [[], []]


def refused() -> list[str]:
    """Return the messages of a part that is not sharded by itself, and of a value beyond FP16 on one rank."""
    model = net("fp16")
    dt.fully_shard(model)
    before = {name: whole(master) for name, master in dt.master_weights(model).items()}
    messages = []
    try:
        dt.full_precision(model.block).__enter__()
    except PolicyError as error:
        messages.append(str(error))
    try:
        with dt.full_precision(model):
            if torch.distributed.get_rank() == 1:
                local(model.block[0].weight).data.fill_(70000.0)
    except PolicyError as error:
        messages.append(str(error))
    after = {name: whole(master) for name, master in dt.master_weights(model).items()}
    assert all(same(before[name], after[name]) for name in before)
    for path, module in dt.full_precision(model).by_module():
        own = list(module.parameters(recurse=False))
        assert all(param.dtype == torch.float32 for param in own), path
        with torch.no_grad():
            own[-1].mul_(2)
    after = {name: whole(master) for name, master in dt.master_weights(model).items()}
    assert same(before["block.0.bias"] * 2, after["block.0.bias"])
    return messages


def test_what_ranks_cannot_do_is_refused_on_all(ranks: Any) -> None:
    first, second = ranks.run(2, refused)
    assert "is sharded together with modules outside of this Sequential" in first[0]
    assert "a parameter on another rank is, beyond FP16's largest" in first[1]
    assert '"block.0.weight" holds 70000, beyond FP16' in second[1]


def averaging() -> Any:
    """Return the gradients of DDP after a block, and the mean of the ranks'."""
    model = net("bf16")
    wrapped = dt.data_parallel(copy.deepcopy(model))
    tokens = torch.full((1, 2), torch.distributed.get_rank())
    wrapped(tokens).square().sum().backward()
    for param in wrapped.parameters():
        param.grad = None
    with dt.full_precision(wrapped):
        with torch.no_grad():
            wrapped.module(tokens)
        with pytest.raises(PolicyError, match="data_parallel was called inside"):
            dt.data_parallel(wrapped.module)
    wrapped(tokens).square().sum().backward()
    return [param.grad.float().tolist() for param in wrapped.parameters() if param.requires_grad]


def test_gradients_are_reduced_after_a_block(ranks: Any) -> None:
    first, second = ranks.run(2, averaging)
    assert first == second
