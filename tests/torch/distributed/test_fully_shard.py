"""`fully_shard` of a cast model: what is noted on parameters goes along, and a step is the one of `data_parallel`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError
from duotone.torch.parameters import shards
from duotone.torch.parameters.storage import storage_of


class Tagger(nn.Module):
    """Norms, tied weights, a frozen one, biases of lengths that no number of ranks divides."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 11, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 17)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden + self.frozen(hidden)))


def tagger(policy: str) -> Tagger:
    torch.manual_seed(0)
    return dt.cast(Tagger(), policy)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_bits(first: Any, second: Any) -> bool:
    first, second = (whole(tensor).detach().flatten() for tensor in (first, second))
    return first.dtype == second.dtype and first.view(torch.uint8).equal(second.view(torch.uint8))


def backward(model: nn.Module, scaler: dt.LossScaler, seed: int) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokens = torch.randint(17, (2 * size, 7), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.chunk(size)[rank]
    scaler.backward(F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))


def differences(sharded: nn.Module, optimizer: Any, other: nn.Module, its_optimizer: Any) -> list[str]:
    """Return the names of what is not the same bits in two models and the states of their optimizers."""
    masters, others = dt.master_weights(sharded, optimizer), dt.master_weights(other, its_optimizer)
    found = [name for name in masters if not same_bits(masters[name], others[name])]
    for (name, param), its_param in zip(sharded.named_parameters(), other.parameters(), strict=True):
        state, its_state = optimizer.state.get(param, {}), its_optimizer.state.get(its_param, {})
        assert state.keys() == its_state.keys(), name
        # gloo sends no 16-bit integers; tails are in the masters
        found += [f"{name}: {key}" for key in state if key != "tail" and not same_bits(state[key], its_state[key])]
    return found


def train_both(policy: str, reshard: bool) -> list[str]:
    sharded, copied = tagger(policy), tagger(policy)
    before = {name: master.clone() for name, master in dt.master_weights(sharded).items()}
    for block in sharded.blocks:
        dt.fully_shard(block, reshard_after_forward=reshard)
    assert dt.fully_shard(sharded, reshard_after_forward=reshard) is sharded
    assert sharded.head.weight is sharded.embed.weight
    found = [f"{name} before" for name, m in dt.master_weights(sharded).items() if not same_bits(m, before[name])]
    wrapped = dt.data_parallel(copied)
    optimizer, its_optimizer = dt.AdamW(sharded.parameters(), lr=1e-2), dt.AdamW(wrapped.parameters(), lr=1e-2)
    preset = policy.split(",", maxsplit=1)[0]
    scaler, its_scaler = dt.LossScaler(preset), dt.LossScaler(preset)
    for step in range(3):
        backward(sharded, scaler, step)
        backward(wrapped, its_scaler, step)
        scaler.step(optimizer)
        its_scaler.step(its_optimizer)
        optimizer.zero_grad()
        its_optimizer.zero_grad()
        # what is gathered for an evaluation must not stand for the weights
        with torch.inference_mode() if step == 1 else torch.no_grad():
            tokens = torch.arange(14).view(2, 7)
            assert sharded(tokens).equal(copied(tokens))
        found += differences(sharded, optimizer, copied, its_optimizer)
    return found


@pytest.mark.parametrize(("policy", "reshard"), [("bf16", True), ("fp16", False), ("fp32", True)])
def test_training_on_two_ranks_is_that_of_data_parallel_bit_for_bit(ranks, policy: str, reshard: bool) -> None:
    assert ranks.run(2, train_both, policy, reshard) == [[], []]


def uneven(policy: str, mesh_shape: tuple[int, ...], dimension: int | None) -> list[Any]:
    """Return what is wrong with the notes of a module's DTensors, and the sizes of this rank's parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    # rows: 5, 1, 2; in all cases the columns divide
    module = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(6, 1, bias=False), nn.Linear(6, 2))
    dt.cast(module, policy)
    before = dt.master_weights(module)
    old = dict(module.named_parameters())
    records = {name: storage_of(param) for name, param in old.items()}
    has_tail = {name: storage_of(param).tail is not None for name, param in old.items()}
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "parts")[-len(mesh_shape) :])
    asked: list[Any] = []

    def place(param: nn.Parameter) -> Any:
        asked.append(param)
        return Shard(dimension) if param.dim() == 2 else None

    dt.fully_shard(module, mesh=mesh, shard_placement_fn=None if dimension is None else place)
    found: list[Any] = [] if len(asked) == len(set(asked)) else ["asked twice"]
    param: Any
    for name, param in module.named_parameters():
        now = storage_of(param)
        tail: Any = storage_of(param).tail
        if now != records[name] or (tail is not None) != has_tail[name]:
            found.append((name, now))
        if tail is not None and (
            (tail.placements, tail.device_mesh) != (param.placements, param.device_mesh)
            or tail._local_tensor.shape != param._local_tensor.shape
            or tail.dtype != torch.int16
        ):
            found.append((name, tail))
        if not same_bits(dt.master_weights(module)[name], before[name]):
            found.append(name)
        if param.grad_dtype not in (None, param.dtype):
            found.append((name, param.grad_dtype))
    return [found, [tuple(shards.local(param).shape) for param in module.parameters()]]


def test_masters_are_cut_as_weights_are(ranks) -> None:
    first, second, third = ranks.run(3, uneven, "bf16", (3,), None)
    assert [found for found, _ in (first, second, third)] == [[], [], []]
    assert [part for _, part in (first, second, third)] == [
        [(2, 6), (2,), (2,), (2,), (1, 6), (1, 6), (1,)],
        [(2, 6), (2,), (2,), (2,), (0, 6), (1, 6), (1,)],
        [(1, 6), (1,), (1,), (1,), (0, 6), (0, 6), (0,)],
    ]
    assert [found for found, _ in ranks.run(3, uneven, "fp16,reduce=float16", (3,), 1)] == [[], [], []]
    assert [found for found, _ in ranks.run(2, uneven, "bf16,state=bfloat16", (1, 2), None)] == [[], []]
    copies = ranks.run(2, uneven, "bf16-true,rounding=stochastic", (2, 1), None)
    assert copies[0] == copies[1]
    assert copies[0][0] == []
    assert copies[0][1][0] == (5, 6)


def accumulate(policy: str) -> list[bool]:
    """Return whether gradients are those of the parts, added up in FP32 over micro-batches and ranks."""
    alone = tagger(policy)
    sharded: Any = tagger(policy)
    dt.checkpoint_activations(sharded, "blocks.*")
    for block in sharded.blocks:
        dt.fully_shard(block)
    dt.fully_shard(sharded)
    scaler = dt.LossScaler("bf16")
    for micro in range(2):
        sharded.set_requires_gradient_sync(micro == 1)
        backward(sharded, scaler, micro)
    sums = [torch.zeros(param.shape) for param in alone.parameters()]
    for micro in range(2):
        backward(alone, scaler, micro)
        for total, param in zip(sums, alone.parameters(), strict=True):
            if param.grad is not None:
                total.add_(param.grad)
                param.grad = None
    for total in sums:
        torch.distributed.all_reduce(total)
    return [
        param.grad is None if not param.requires_grad else same_bits((total / 2).to(param.dtype), param.grad)
        for total, param in zip(sums, sharded.parameters(), strict=True)
    ]


def test_without_synchronisation_gradients_add_up_in_reduce(ranks) -> None:
    assert all(all(fits) for fits in ranks.run(2, accumulate, "bf16"))


class Odd(nn.Module):
    """A weight of its own beside a part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)


def refusals() -> list[str]:
    """Return the messages of calls that are wrong, and whether any of them changed a module."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as torchs

    def message(call: Any) -> str:
        try:
            call()
        except (PolicyError, OptimizerError) as error:
            return str(error)
        return "nothing was raised"

    cast = dt.cast(nn.Linear(4, 4), "bf16")
    wide = dt.cast(nn.Linear(4, 4), "bf16,grad=float32")
    odd = nn.Sequential(Odd(), nn.Linear(4, 4))
    dt.cast(odd, "bf16; 0: param=float32,compute=float32; 0.inner: param=bfloat16,compute=bfloat16")
    messages = [
        message(lambda: dt.fully_shard(nn.Linear(4, 4))),
        message(lambda: dt.fully_shard(cast, mp_policy=MixedPrecisionPolicy())),
        message(lambda: dt.fully_shard(wide)),
        message(lambda: dt.fully_shard(odd)),
        message(lambda: dt.fully_shard(nn.ModuleList([cast]))),
        message(lambda: dt.fully_shard(dt.cast(nn.Linear(4, 4, device="meta"), "bf16"))),
    ]
    assert not any(hasattr(param, "placements") for module in (cast, wide, odd) for param in module.parameters())
    stale = dt.AdamW(cast.parameters())
    wrapped = dt.MasterWeights(torch.optim.AdamW(cast.parameters()))
    old = list(cast.parameters())
    dt.fully_shard(cast)
    theirs: Any = torchs(dt.cast(nn.Linear(4, 4), "bf16"))
    tied = tagger("bf16")
    dt.fully_shard(tied.embed)
    flat: list[Any] = []
    for policy, use_orig_params in (("bf16", False), ("bf16-mixed", True)):
        model = dt.cast(nn.Linear(4, 4), policy)
        flat.append(FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu")))
    messages += [
        message(stale.step),
        message(wrapped.step),
        message(lambda: dt.AdamW(old)),
        message(lambda: dt.AdamW(theirs.parameters())),
        message(lambda: dt.master_weights(theirs)),
        message(lambda: dt.MasterWeights(torch.optim.SGD(theirs.parameters()))),
        message(lambda: dt.cast(cast, "bf16")),
        message(lambda: dt.uncast(nn.Sequential(cast))),
        message(lambda: dt.cast(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), "bf16")),
        message(lambda: dt.fully_shard(tied)),
        message(lambda: dt.AdamW(flat[0].parameters())),
        message(lambda: dt.MasterWeights(torch.optim.NAdam(flat[1].parameters()))),
    ]
    return messages


def test_what_cannot_work_is_refused(ranks) -> None:
    wanted = [
        r'parameter "weight" was never cast; call duotone.torch.cast',
        "mp_policy is what the model's own policy says already",
        'parameter "weight" is kept in torch.bfloat16 and its gradient in torch.float32',
        "a Odd keeps parameters of its own in torch.float32, and those around it or in its parts in torch.bfloat16",
        "a ModuleList has no forward",
        'parameter "weight" is on the meta device',
        "built from parameters that fully_shard has replaced",
        "built from parameters that fully_shard has replaced",
        "built from parameters that fully_shard has replaced",
        "has lost its tail",
        "has lost its tail",
        "has lost its tail",
        'cannot cast this FSDPLinear: module "" is sharded already',
        'cannot uncast this Sequential: module "0" is sharded already',
        'module "" is wrapped in DistributedDataParallel already',
        'parameter "embed.weight" of a Linear is tied to one that is sharded already',
        "flattened by FullyShardedDataParallel",
        "flattened by FullyShardedDataParallel",
    ]
    for messages in ranks.run(2, refusals):
        assert len(messages) == len(wanted)
        for message, start in zip(messages, wanted, strict=True):
            assert start in message
