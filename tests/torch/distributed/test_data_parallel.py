"""`data_parallel`: gradients are the mean of the ranks', taken in `reduce` and rounded once."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.parameters.masters import read_master


class Net(nn.Module):
    """A norm in FP32, and a part that only some calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.aside = nn.Linear(10, 10)
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor, aside: bool = True) -> Tensor:
        hidden = self.norm(self.first(x).relu())
        return self.last(self.aside(hidden) if aside else hidden)


def net(policy: str) -> Net:
    torch.manual_seed(0)
    return dt.cast(Net(), policy)


def batch(seed: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int, **arguments: Any) -> Tensor:
    # as large as losses scaled for FP16 are
    return F.mse_loss(model(batch(seed), **arguments), torch.zeros(3, 4)) * 4096


def means(policy: str, seeds: list[list[int]], **arguments: Any) -> list[Tensor | None]:
    """Return the mean over ranks of the gradients that each accumulates over its seeds, without any rank."""
    gradients = []
    for own in seeds:
        alone = net(policy)
        for seed in own:
            loss_of(alone, seed, **arguments).backward()
        gradients.append([param.grad for param in alone.parameters()])
    return [
        None if grads[0] is None else (sum(map(Tensor.float, grads)) / torch.tensor(len(grads))).to(grads[0].dtype)
        for grads in zip(*gradients, strict=True)
    ]


def reduced(policy: str) -> list[list[float]]:
    """Return how far gradients are from the means, in units in the last place of their dtype, in several uses."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for arguments, call in (
        ({}, {}),
        ({"find_unused_parameters": True}, {"aside": False}),
        ({"static_graph": True, "gradient_as_bucket_view": True}, {}),
    ):
        model = net(policy)
        wrapped = dt.data_parallel(model, **arguments)
        # the second time, buckets are rebuilt
        for start in (0, 10):
            model.zero_grad()
            micro = [start + rank]
            if not arguments:
                micro = [start + rank, start + rank + size]
                with wrapped.no_sync():
                    loss_of(wrapped, micro[0]).backward()
            loss_of(wrapped, micro[-1], **call).backward()
            seeds = [[seed - rank + other for seed in micro] for other in range(size)]
            results.append(errors([param.grad for param in model.parameters()], means(policy, seeds, **call)))
    return results


def errors(found: list[Tensor | None], wanted: list[Tensor | None]) -> list[float]:
    apart = []
    for first, second in zip(found, wanted, strict=True):
        # torch gives unused parameters no gradients, or gradients of zero
        if first is None or second is None:
            apart.append(sum(float(grad.abs().sum()) for grad in (first, second) if grad is not None))
            continue
        assert first.dtype == second.dtype
        unit = torch.nextafter(second.abs(), torch.full_like(second, torch.inf)) - second.abs()
        apart.append(((first.double() - second.double()).abs() / unit.double()).max().item())
    return apart


def reduced_in(policies: list[str]) -> dict[str, list[list[float]]]:
    return {policy: reduced(policy) for policy in policies}


def test_gradients_are_means_rounded_once(ranks) -> None:
    for found in ranks.run(2, reduced_in, ["bf16", "fp16", "fp32"]):
        for policy, results in found.items():
            assert all(max(result) == 0.0 for result in results), (policy, results)
    # three ranks add in another order: FP32 errors, and 16-bit ones where the sum is at a tie
    for found in ranks.run(3, reduced_in, ["bf16"]):
        assert all(max(result) <= 8.0 for result in found["bf16"])


def train_together() -> list[Any]:
    """Return masters after training from weights that were another rank's, and whether rank 0's came out."""
    model = net("fp16")
    if torch.distributed.get_rank() == 1:
        dt.load_master_weights(model, {name: m * 3 for name, m in dt.master_weights(model).items()})
    first = dt.master_weights(net("fp16"))
    wrapped = dt.data_parallel(model)
    are_rank_0s = all(master.equal(first[name]) for name, master in dt.master_weights(model).items())
    assert dt.policy_of(wrapped) == dt.policy_of(model)
    assert Agreement(list(model.parameters())).is_needed
    optimizer, scaler = dt.AdamW(wrapped.parameters(), lr=1e-2), dt.LossScaler("fp16")
    for step in range(3):
        scaler.backward(loss_of(wrapped, 2 * step + torch.distributed.get_rank()))
        scaler.step(optimizer)
        optimizer.zero_grad()
    return [are_rank_0s, [read_master(param).tolist() for param in model.parameters()]]


def test_ranks_begin_and_stay_with_the_same_masters(ranks) -> None:
    (is_rank_0s, masters), (others_are, others) = ranks.run(2, train_together)
    assert is_rank_0s
    assert others_are
    assert masters == others


def in_other_dtypes() -> list[Any]:
    """Return means of 0.1 and 40000 in FP16 under several policies, and whether a hook was registered."""
    results = []
    for policy in ("fp16", "fp16,reduce=float16", "bf16,reduce=bfloat16", "fp32"):
        model = dt.cast(nn.Linear(2, 1, bias=False), policy)
        wrapped = dt.data_parallel(model)
        wrapped(torch.tensor([[40000.0, 0.1 + torch.distributed.get_rank()]])).sum().backward()
        grad: Any = model.weight.grad
        results.append([grad.tolist()[0], wrapped._comm_hooks != []])
    return results


def test_sums_overflow_in_no_policy(ranks) -> None:
    for results in ranks.run(2, in_other_dtypes):
        for (large, small), _ in results:
            assert large == pytest.approx(40000.0, rel=0.01)
            assert small == pytest.approx(0.6, rel=0.01)
        assert [has_hook for _, has_hook in results] == [True, False, False, False]


def said_by_torchs_own() -> list[int]:
    """Return how often something is said while torch's class, or ours, runs a cast model twice."""
    counts = []
    for policy, wrap in (
        ("bf16", nn.parallel.DistributedDataParallel),
        ("fp16", nn.parallel.DistributedDataParallel),
        ("bf16-mixed", nn.parallel.DistributedDataParallel),
        ("bf16", dt.data_parallel),
    ):
        wrapped = wrap(net(policy))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in (1, 2):
                loss_of(wrapped, seed).backward()
        counts.append(sum("use duotone.torch.data_parallel" in str(each.message) for each in caught))
    return counts


def test_torchs_own_class_is_said_to_let_masters_drift_apart(ranks) -> None:
    assert ranks.run(2, said_by_torchs_own) == [[1, 1, 0, 0]] * 2


def steps_in_join() -> list[Any]:
    """Return how many steps ranks take in torch's `Join`, the second with one batch more, and what is said."""
    found: list[Any] = []
    for stops_together in (False, True):
        model = net("bf16")
        wrapped = dt.data_parallel(model)
        optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("bf16")
        steps, message = 0, ""
        try:
            with Join([wrapped], throw_on_early_termination=stops_together):
                for seed in range(2 + dist.get_rank()):
                    scaler.backward(loss_of(wrapped, seed))
                    scaler.step(optimizer)
                    steps += 1
        except (OptimizerError, RuntimeError) as error:
            message = str(error)
        found.append((steps, message.partition(",")[0]))
    return found


def test_a_rank_that_runs_out_of_batches_is_not_waited_for(ranks) -> None:
    for uneven, (steps, message) in ranks.run(2, steps_in_join):
        assert uneven == (0, "ranks agree in every step")
        assert steps == 2
        assert "exhausted" in message


def refusals() -> list[str]:
    sharded = dt.fully_shard(net("bf16"))
    cases = [
        (nn.Linear(2, 1), {}),
        (dt.cast(nn.Linear(2, 1), "bf16,grad=float32"), {}),
        (dt.cast(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), "bf16; 1: reduce=bfloat16"), {}),
        (sharded, {}),
        (net("bf16"), {"mixed_precision": "any"}),
    ]
    messages = []
    for model, arguments in cases:
        with pytest.raises(PolicyError) as caught:
            dt.data_parallel(model, **arguments)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_work_is_refused(ranks) -> None:
    wanted = [
        'parameter "weight" was never cast; call duotone.torch.cast(model, policy) on the whole model before data',
        'parameter "weight" is kept in torch.bfloat16 and its gradient in torch.float32; Distributed',
        '"0.weight" is reduced in torch.float32 and "1.weight" in torch.bfloat16',
        'parameter "first.weight" is sharded already; use fully_shard or data_parallel',
        "mixed_precision of DistributedDataParallel casts weights",
    ]
    for messages in ranks.run(2, refusals):
        for message, start in zip(messages, wanted, strict=True):
            assert message.startswith(start)
