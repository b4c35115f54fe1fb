"""What ranks agree on: sums of the whole, flags of any, whatever is sharded, replicated or plain; and that steps do."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import duotone.torch as dt
from duotone.errors import LossScaleCollapse
from duotone.torch.distributed.agreement import Agreement, SharedBy, set_ranks
from duotone.torch.kernels import grad_stats
from duotone.torch.parameters.shards import local


def agreed(agreement, gradients, *flags):
    """Return (sum of squares, found_inf) of each optimizer's gradients, and flags, as ranks agree on them."""
    stats = [[grad_stats(share, torch.ones(())) for share in agreement.shares(grads)] for grads in gradients]
    sums = torch.stack([torch.stack([total for total, _ in each[:-1]]) for each in stats], dim=1)
    found_inf = [torch.stack([flag for _, flag in each]).any() for each in stats]
    sums, flags = (each.tolist() for each in agreement.combined(sums, torch.stack([*found_inf, *flags])))
    return list(zip(sums, flags, strict=False)), flags[len(sums) :]


def sums_of_the_whole():
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world_size,))
    whole = [torch.randn(shape) for shape in ((5, 3), (1,), (7,), (4, 2))]
    placements = [Shard(0), Shard(0), Shard(0), Replicate()]
    sharded = [distribute_tensor(each, mesh, [place]) for each, place in zip(whole, placements, strict=True)]
    plain = torch.full((3,), 2.0)
    expected = sum(each.double().square().sum().item() for each in whole)

    agreement = Agreement([*sharded, plain])
    assert agreement.is_needed
    assert agreement.is_known
    stats, flags = agreed(agreement, [sharded, [plain], []], torch.tensor(rank == world_size - 1), torch.tensor(False))
    (first, found_inf), second, empty = stats
    assert first == pytest.approx(expected, rel=1e-12)
    assert (found_inf, second, empty) == (False, (12.0, False), (0.0, False))
    assert flags == [True, False]
    assert agreement.any(torch.tensor([rank == 0, False, rank == 1])).tolist() == [True, False, True]
    # one rank, one element
    bad = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    if rank == 0:
        local(bad)[0, 0] = math.nan
    stats, _ = agreed(agreement, [[bad], sharded])
    assert [found_inf for _, found_inf in stats] == [True, False]
    return [first, *(total for total, _ in stats[1:])]


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_are_those_of_the_whole_and_the_same_bits_everywhere(ranks, world_size):
    results = ranks.run(world_size, sums_of_the_whole)
    assert all(result == results[0] for result in results)


def two_dimensions():
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    whole = torch.arange(6.0).view(3, 2)
    expected = whole.double().square().sum().item()
    for each in (mesh, other):
        grad = distribute_tensor(whole, each, [Replicate(), Shard(0)])
        agreement = Agreement([grad])
        assert agreed(agreement, [[grad]], torch.tensor(rank == 1)) == ([(expected, False)], [True])
    # parameters on several meshes in one optimizer
    grads = [distribute_tensor(whole, each, [Replicate(), Shard(0)]) for each in (mesh, other)]
    if rank == 1:
        local(grads[0])[-1, -1] = math.inf
    (first, (_, found_inf)), _ = agreed(Agreement(grads), [grads[1:], grads])
    assert first == (expected, False)
    assert found_inf


def test_replicas_count_once(ranks):
    ranks.run(2, two_dimensions)


def an_infinity_on_one_rank(kind: str):
    """Return weights and scale after three steps, the second of which overflows on rank 1 only; a third has no part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(2))
    # torch cannot update both kinds at once
    params = [{"params": [whole]}, {"params": [plain]}]
    if kind == "duotone":
        optimizer = dt.AdamW(params, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=kind == "fused", foreach=False)
    scaler = dt.LossScaler("fp16", init_scale=4.0)
    reports = []
    for number in range(3):
        scaler.scale(torch.ones(()))
        whole.grad = distribute_tensor(torch.full((4, 3), 4.0), mesh, [Shard(0)])
        plain.grad = torch.full((2,), 4.0)
        if number == 1 and dist.get_rank() == 1:
            local(whole.grad).fill_(math.inf)
        if number == 1 and kind == "unscaled":
            scaler.unscale_(optimizer)
        reports.append(scaler.step(optimizer, clip_norm=1.0))
    assert [report.skipped.item() for report in reports] == [False, True, False]
    assert reports[0].grad_norm.item() == pytest.approx(math.sqrt(14.0))
    assert reports[2].loss_scale.item() == 2.0
    return [whole.detach().full_tensor(), plain.detach(), scaler.state_dict()]


@pytest.mark.parametrize("kind", ["duotone", "fused", "plain", "unscaled"])
def test_all_ranks_skip_what_one_has_to(ranks, kind):
    first, *others = ranks.run(3 if kind == "duotone" else 2, an_infinity_on_one_rank, kind)
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
        assert first[2] == other[2]


def a_loss_that_is_nan_on_one_rank(ranks_are_known: bool):
    """Return how the scale reacts if gradients are averaged, as DDP does, and one rank's loss was NaN."""
    param = nn.Parameter(torch.ones(2))
    if ranks_are_known:
        set_ranks(param, dist.group.WORLD)
    optimizer = dt.SGD([param], lr=0.1)
    scaler = dt.LossScaler("fp16", init_scale=8.0)
    loss = torch.tensor(math.nan if dist.get_rank() == 0 else 1.0)
    scaler.scale(loss)
    param.grad = torch.full((2,), math.nan)
    assert scaler.step(optimizer).skipped.item()
    return scaler.loss_scale.item()


@pytest.mark.filterwarnings("ignore:loss 1 of step 1")
def test_ranks_never_come_to_different_scales(ranks):
    # where the ranks are known, they all know that it was the loss; where not, all take it for an overflow
    assert ranks.run(2, a_loss_that_is_nan_on_one_rank, True) == [8.0, 8.0]
    assert ranks.run(2, a_loss_that_is_nan_on_one_rank, False) == [1.0, 1.0]


def collapsed_on_one_rank():
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(2)]
    optimizer = dt.SGD([("a.weight", params[0]), ("b.weight", params[1])], lr=0.1)
    scaler = dt.LossScaler("bf16", patience=1)
    for param in params:
        param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        local(params[1].grad).fill_(math.nan)
    with pytest.raises(LossScaleCollapse) as caught:
        scaler.step(optimizer)
    return str(caught.value)


def test_every_rank_names_the_same_parameters(ranks):
    first, second = ranks.run(2, collapsed_on_one_rank)
    assert first == second
    assert "1 of 2 gradients are not finite (b.weight)" in first


def test_without_ranks_nobody_is_asked():
    params = [nn.Parameter(torch.ones(2))]
    agreement = Agreement(params)
    assert not agreement.is_needed
    assert agreement.is_known
    assert agreed(agreement, [[torch.full((2,), 3.0)]], torch.tensor(True)) == ([(18.0, False)], [True])
    flags = torch.tensor([True, False])
    assert agreement.any(flags) is flags


def test_ranks_do_not_go_into_copies():
    import copy
    import pickle

    shared_by = SharedBy(object())
    assert copy.deepcopy(shared_by).group is None
    assert pickle.loads(pickle.dumps(shared_by)).group is None
