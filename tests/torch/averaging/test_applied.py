"""A model that holds averages for a while, and is afterwards what it was in every bit, whatever happened inside."""

import copy
import warnings

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import AverageError
from duotone.torch.parameters.storage import storage_of

from .models import backward, bits, small

POLICIES = ["bf16", "fp16,loss_scale=1", "fp32", "bf16-true,rounding=stochastic", None]


def trained(policy: str | None):
    """Return a model, its optimizer, and an average that stands elsewhere."""
    model = small(policy)
    optimizer = dt.AdamW(model.parameters(), lr=1e-2)
    average = dt.Average(model, decay=0.5)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    return model, optimizer, average


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    tails = {name: storage_of(param).tail for name, param in model.named_parameters()}
    where = [
        tensor.data_ptr() for tensor in (*model.parameters(), *filter(lambda tail: tail is not None, tails.values()))
    ]
    return bits({"model": model.state_dict(), "tails": tails, "optimizer": optimizer.state_dict()["state"]}), where


@pytest.mark.parametrize("policy", POLICIES)
def test_the_averages_are_in_the_model_and_nothing_of_them_stays(policy):
    model, optimizer, average = trained(policy)
    averages = {name: value.clone() for name, value in average.state_dict()["averages"].items()}
    before = everything(model, optimizer)
    tokens = torch.arange(11)
    with average.applied(model) as given:
        assert given is model
        masters = dt.master_weights(model)
        for name, value in averages.items():
            own = model.get_parameter(name)
            assert torch.equal(own.float(), value.to(own.dtype).float()) or own.dtype == torch.bfloat16
            if policy == "bf16":
                assert torch.equal(masters[name], value), name
        assert everything(model, optimizer) != before
        evaluated = model.eval()(tokens)
    model.train()
    assert everything(model, optimizer) == before
    assert optimizer.state[model.embed.weight].get("tail") is storage_of(model.embed.weight).tail
    alone = small(policy, seed=1)
    alone.load_state_dict(model.state_dict())
    exported = average.model_state_dict()
    dt.load_master_weights(alone, {name: exported[name] for name in dt.master_weights(model)})
    assert torch.equal(alone.eval()(tokens), evaluated)
    # training goes on as if nothing had been
    other, its_optimizer, _ = trained(policy)
    with warnings.catch_warnings():
        # that somebody has changed the weights, for instance
        warnings.simplefilter("error")
        for own, of in ((model, optimizer), (other, its_optimizer)):
            backward(own, 7)
            of.step()
    # the embedding's statistics are those of the same batches
    assert everything(model, optimizer)[0] == everything(other, its_optimizer)[0]


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", None])
def test_an_exception_leaves_everything_as_it_was(policy):
    model, optimizer, average = trained(policy)
    before = everything(model, optimizer)

    def edit_and_fail() -> None:
        with average.applied(model), torch.no_grad():
            model.embed.weight.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        edit_and_fail()
    assert everything(model, optimizer) == before
    with average.applied(model):
        pass


@pytest.mark.parametrize("change", ["cast", "another shape"])
def test_what_changes_the_weights_inside_keeps_the_masters(change):
    model, _, average = trained("bf16")
    masters = dt.master_weights(model)
    with average.applied(model):
        if change == "cast":
            dt.uncast(model)
        else:
            model.embed.weight.data = torch.zeros(3, 8, dtype=torch.bfloat16)
    assert all(torch.equal(value, masters[name]) for name, value in dt.master_weights(model).items())


@pytest.mark.parametrize("kind", ["own", "scaler", "torch's", "wrapped"])
def test_training_inside_is_refused(kind):
    model, optimizer, average = trained(None if kind == "torch's" else "bf16")
    params = [param for param in model.parameters() if param.requires_grad and param.numel()]
    scaler = dt.LossScaler("bf16")
    if kind == "torch's":
        optimizer = torch.optim.AdamW(params)
    elif kind == "wrapped":
        optimizer = dt.MasterWeights(torch.optim.NAdam(params))
    before = everything(model, optimizer)

    def train() -> None:
        with average.applied(model):
            backward(model, 0, scaler)
            if kind == "scaler":
                scaler.step(optimizer)
            else:
                optimizer.step()

    with pytest.raises(
        AverageError, match=r"was to step weights that hold averages.*after the block of average\.applied"
    ):
        train()
    assert everything(model, optimizer)[0]["model"] == before[0]["model"]
    # another model may be trained inside
    other = small("bf16")
    its_optimizer = dt.AdamW(other.parameters())
    with average.applied(model):
        backward(other, 0)
        its_optimizer.step()


def test_nesting_and_whatever_takes_averages_for_weights_is_refused(tmp_path):
    model, optimizer, average = trained("bf16")
    second = dt.Average(model, decay=0.9)
    dt.save_checkpoint(tmp_path / "before", model, optimizer, average=average)
    before = everything(model, optimizer)
    with average.applied(model):
        for action, call in {
            "apply an average": lambda: average.applied(model).__enter__(),
            "apply an average ": lambda: second.applied(model).__enter__(),
            "update an average": average.update,
            "update an average ": second.update,
            "save an average": average.state_dict,
            "load an average": lambda: average.load_state_dict({}),
            "save a checkpoint to resume from": lambda: dt.save_checkpoint(tmp_path / "no", model, optimizer),
            "load a checkpoint": lambda: dt.load_checkpoint(tmp_path / "before", model),
        }.items():
            with pytest.raises(AverageError, match=f"cannot {action.strip()}: the model holds averages"):
                call()
        # the averages as a model's weights
        dt.save_checkpoint(tmp_path / "averages", model)
    assert everything(model, optimizer) == before
    other = small("bf16", seed=3)
    dt.load_checkpoint(tmp_path / "averages", other)
    averages = average.state_dict()["averages"]
    assert all(
        torch.equal(value, averages[name]) for name, value in dt.master_weights(other).items() if name in averages
    )


def test_another_model_of_the_same_names():
    model, _, average = trained("bf16")
    averages = average.state_dict()["averages"]
    copied = dt.uncast(copy.deepcopy(model))
    with average.applied(copied):
        for name, value in averages.items():
            assert torch.equal(copied.get_parameter(name), value)
    with pytest.raises(AverageError, match=r'a parameter "empty" of shape \(0, 3\), the model has none; give'):
        average.applied(nn.Linear(2, 2)).__enter__()
    with average.applied() as own:
        assert own is model
    with average.applied(nn.Sequential(model)) as wrapped:
        assert torch.equal(dt.master_weights(wrapped)["0.embed.weight"], averages["embed.weight"])


@pytest.mark.parametrize("policy", ["bf16", "fp32", "bf16-true,rounding=stochastic"])
@pytest.mark.parametrize("outer", ["applied", "full_precision"])
def test_full_precision_inside_and_around(policy, outer):
    model, optimizer, average = trained(policy)
    averages = average.state_dict()["averages"]
    before = everything(model, optimizer)
    blocks = [average.applied(model), dt.full_precision(model)]
    first, second = blocks if outer == "applied" else reversed(blocks)
    with first, second:
        for name, value in averages.items():
            # a weight without a master cannot hold an average before it is FP32
            if outer == "full_precision" or "stochastic" not in policy:
                assert torch.equal(model.get_parameter(name), value), name
        with torch.no_grad():
            model.embed.weight.add_(1.0)
    assert everything(model, optimizer) == before


def test_export_inside_is_an_export_of_the_averages():
    model, _, average = trained("bf16")
    with average.applied(model):
        exported = dt.export(model)
    expected = average.model_state_dict()
    plain = small(None, seed=1)
    plain.load_state_dict(exported if isinstance(exported, dict) else exported.state_dict())
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", "fp32", None])
@pytest.mark.parametrize("average_buffers", [True, False])
def test_a_block_may_stand_between_a_forward_and_its_backward_pass(policy, average_buffers):
    gradients = []
    for is_between in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        if policy is not None:
            dt.cast(model, policy)
        model[1].eval()
        average = dt.Average(model, average_buffers=average_buffers, backend="reference")
        for value in average.state_dict()["averages"].values():
            value.mul_(2.0)
        loss = model(torch.ones(3, 4)).square().mean()
        if is_between:
            with average.applied(model), torch.no_grad():
                assert model(torch.ones(3, 4)).square().mean() != loss
        loss.backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_what_is_computed_inside_does_not_go_backward_outside():
    model = dt.cast(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), "bf16")
    optimizer = dt.AdamW(model.parameters(), backend="reference")
    average = dt.Average(model, backend="reference")
    with average.applied(model):
        losses = [model(torch.ones(3, 4)).square().mean()]
    with average.applied(model):
        losses.append(model(torch.ones(3, 4)).square().mean())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward(retain_graph=True)
    for _ in range(3):
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
