"""Averages of 16-bit weights in 16 bits are warned of, whoever keeps them; copies that are no averages are not."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch.parameters import foreign_averages

MESSAGE = (
    r"averages? (its )?16-bit weights .*small steps are lost, or kept as noise; use duotone\.torch\.Average\(model\)"
)
ONE_MINUS_DECAY = 1e-3
Update = Callable[[], None]


# tensors are looked for before this step, and read again twice
STEPS = foreign_averages._SCANS[0] + 2 * foreign_averages._INTERVAL + 1


@pytest.fixture(autouse=True)
def nothing_else_warns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # so many searches are made in a process
    monkeypatch.setattr(foreign_averages, "_scans", itertools.count(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "this CPU has no FP16")
        yield


def made(policy: str | None = "bf16") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4, bias=False))
    if policy is not None:
        dt.cast(model, policy)
    return model, dt.AdamW(model.parameters(), lr=1e-3, backend="reference")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, update: Update, steps: int) -> None:
    for step in range(steps):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        (model(inputs) - 3.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()


def detached(model: nn.Module) -> list[Tensor]:
    return [param.detach() for param in model.parameters()]


def clones(model: nn.Module, *, foreach: bool) -> Update:
    """As diffusers 0.42's `EMAModel` does it."""
    shadows = [param.clone().detach() for param in model.parameters()]

    def update() -> None:
        params = detached(model)
        if foreach:
            torch._foreach_sub_(shadows, torch._foreach_sub(shadows, params), alpha=ONE_MINUS_DECAY)
        else:
            for shadow, param in zip(shadows, params, strict=True):
                shadow.sub_(ONE_MINUS_DECAY * (shadow - param))

    return update


def lerp_of_a_copy(model: nn.Module) -> Update:
    averaged = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for average, param in zip(averaged.parameters(), model.parameters(), strict=True):
            average.lerp_(param, ONE_MINUS_DECAY)

    return update


def target_network(model: nn.Module) -> Update:
    """As DDPG, TD3 and SAC follow a network."""
    target = copy.deepcopy(model)

    def update() -> None:
        for average, param in zip(target.parameters(), model.parameters(), strict=True):
            # of so few weights, not one would change in the first steps at a smaller rate
            average.data.copy_(0.05 * param.data + 0.95 * average.data)

    return update


def products_in_a_state_dict(model: nn.Module) -> Update:
    averages = {name: value.clone() for name, value in model.state_dict().items()}

    def update() -> None:
        for name, value in model.state_dict().items():
            averages[name].mul_(1 - ONE_MINUS_DECAY).add_(value, alpha=ONE_MINUS_DECAY)

    return update


AVERAGES = {
    "clones": lambda model: clones(model, foreach=False),
    "clones foreach": lambda model: clones(model, foreach=True),
    "lerp of a copy": lerp_of_a_copy,
    "target network": target_network,
    "products in a state dict": products_in_a_state_dict,
}


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", "bf16-true,rounding=stochastic"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_in_16_bits_is_warned_of_once(policy, kind):
    model, optimizer = made(policy)
    update = AVERAGES[kind](model)
    with pytest.raises(DuotoneWarning, match=MESSAGE):
        train(model, optimizer, update, STEPS)
    # once for each optimizer
    train(model, optimizer, update, 10)


@pytest.mark.parametrize("policy", [None, "fp32", "bf16-mixed"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_in_float32_is_none_of_our_business(policy, kind):
    model, optimizer = made(policy)
    train(model, optimizer, AVERAGES[kind](model), STEPS)


def test_an_average_that_begins_later_is_found_too():
    model, optimizer = made()
    train(model, optimizer, lambda: None, 20)
    update = clones(model, foreach=False)
    with pytest.raises(DuotoneWarning, match=MESSAGE):
        train(model, optimizer, update, 20)


def test_masters_around_a_torch_optimizer():
    model, _ = made()
    optimizer = dt.MasterWeights(torch.optim.NAdam(model.parameters(), lr=1e-3))
    update = clones(model, foreach=False)
    with pytest.raises(DuotoneWarning, match=MESSAGE):
        train(model, optimizer, update, STEPS)


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])
def test_torchs_averaged_model_is_warned_of_when_it_is_made(policy):
    model, optimizer = made(policy)
    with pytest.warns(DuotoneWarning, match=f"AveragedModel copies a cast model to {MESSAGE}") as seen:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    assert [each.filename for each in seen] == [__file__]
    # and not a second time
    train(model, optimizer, lambda: averaged.update_parameters(model), STEPS)
    uncast, _ = made("bf16-mixed")
    AveragedModel(uncast)
    # parts with rules of their own are no models of their own
    with pytest.warns(DuotoneWarning, match=MESSAGE) as seen:
        AveragedModel(dt.cast(made(None)[0], "bf16; 1: output=float32"))
    assert len(seen) == 1


@pytest.mark.parametrize("module", ["timm.utils.model_ema", "ema_pytorch.ema_pytorch"])
def test_so_are_those_of_other_libraries(module):
    # a constructor of this form, in a module of this name
    namespace = {"__name__": module, "deepcopy": copy.deepcopy}
    exec("class Ema:\n    def __init__(self, model):\n        self.module = deepcopy(model)", namespace)
    model, _ = made()
    with pytest.warns(DuotoneWarning, match=f"copies a cast model to {MESSAGE}") as seen:
        namespace["Ema"](model)
    assert [each.filename for each in seen] == [__file__]


def follow(model: nn.Module) -> Update:
    copied = copy.deepcopy(model)
    return lambda: copied.load_state_dict(model.state_dict())


def follow_its_data(model: nn.Module) -> Update:
    copied = copy.deepcopy(model)

    def update() -> None:
        for own, param in zip(copied.parameters(), model.parameters(), strict=True):
            own.data.copy_(param.data)

    return update


def follow_in_full_precision(model: nn.Module) -> Update:
    target = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        with dt.full_precision(model), dt.full_precision(target):
            for average, param in zip(target.parameters(), model.parameters(), strict=True):
                average.lerp_(param, 0.05)

    return update


def follow_masters(model: nn.Module) -> Update:
    target = copy.deepcopy(model)

    def update() -> None:
        averages, masters = dt.master_weights(target), dt.master_weights(model)
        dt.load_master_weights(target, {name: averages[name].lerp(masters[name], 0.05) for name in masters})

    return update


def apply_to_a_target(model: nn.Module) -> Update:
    target, average = copy.deepcopy(model), dt.Average(model, decay=0.9)

    def update() -> None:
        average.update()
        with average.applied(target), torch.no_grad():
            target(torch.ones(1, 8))

    return update


def average_masters(model: nn.Module) -> Update:
    return dt.Average(model).update


def train_a_twin(model: nn.Module) -> Update:
    twin = copy.deepcopy(model)
    optimizer = dt.SGD(twin.parameters(), lr=1e-3, backend="reference")
    return lambda: train(twin, optimizer, lambda: None, 1)


def fill_a_buffer(model: nn.Module) -> Update:
    buffers = [torch.zeros_like(param).detach() for param in model.parameters()]
    return lambda: torch._foreach_add_(buffers, 1.0)


@pytest.mark.parametrize(
    "kind",
    [
        copy.deepcopy,
        follow,
        follow_its_data,
        follow_in_full_precision,
        follow_masters,
        apply_to_a_target,
        average_masters,
        train_a_twin,
        fill_a_buffer,
    ],
)
def test_what_is_no_average_is_not_warned_of(kind):
    model, optimizer = made()
    update = kind(model)
    train(model, optimizer, update if callable(update) and not isinstance(update, nn.Module) else lambda: None, STEPS)


def test_state_in_16_bits_and_gradients_that_stay_are_no_averages():
    model, _ = made("bf16,state=bfloat16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    optimizer.zero_grad = lambda: torch.optim.Optimizer.zero_grad(optimizer, set_to_none=False)
    train(model, optimizer, lambda: None, STEPS)


def test_the_device_is_waited_for_only_where_there_is_such_a_tensor(monkeypatch):
    # of a shape that no tensor of another test has
    model = dt.cast(nn.Linear(8, 23), "bf16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("values were read"))
    train(model, optimizer, lambda: None, STEPS)


def test_few_searches_are_made_in_a_process(monkeypatch):
    searched = []
    monkeypatch.setattr(foreign_averages.gc, "get_objects", lambda: searched.append(1) or [])
    for _ in range(foreign_averages._MOST_SCANS + 2):
        train(*made(), lambda: None, STEPS)
    assert len(searched) == foreign_averages._MOST_SCANS


def test_tensors_without_memory_are_passed_over():
    model, optimizer = made()
    weight = model[0].weight
    gathered = torch.zeros_like(weight).detach()
    gathered.untyped_storage().resize_(0)
    inside = []
    torch.func.vmap(lambda row: inside.append(row) or row)(torch.zeros(2, *weight.shape, dtype=weight.dtype))
    later = torch.zeros_like(weight).detach()

    def let_go() -> None:
        if optimizer.state and later.untyped_storage().nbytes():
            later.add_(1.0)
            later.untyped_storage().resize_(0)

    train(model, optimizer, lambda: None, foreign_averages._SCANS[0])
    train(model, optimizer, let_go, 8)
    assert inside[0].shape == weight.shape


AVERAGED = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "one by one": {"avg_fn": get_ema_avg_fn(0.9)},
    "with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "by itself": {},
}


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", "bf16-mixed"])
@pytest.mark.parametrize("kind", AVERAGED)
def test_torchs_averaged_model_of_before_the_cast_averages_masters(policy, kind):
    model, _ = made(None)
    model.register_buffer("count", torch.zeros(1))
    averaged = AveragedModel(model, **AVERAGED[kind])
    by_hand = AveragedModel(model, **AVERAGED[kind])
    dt.cast(model, policy)
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")

    def update() -> None:
        averaged.update_parameters(model)
        by_hand.update_parameters(dt.uncast(copy.deepcopy(model)))

    train(model, optimizer, update, 5)
    assert averaged.module[0].weight.dtype == torch.float32
    assert all(map(torch.equal, averaged.parameters(), by_hand.parameters()))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_its_own_parameters(copied):
    model, _ = made()
    twin = copied(model)
    twin[0] = nn.Linear(8, 16)
    assert next(twin.parameters()) is twin[0].weight
    assert all(param is model.get_parameter(name) for name, param in model.named_parameters())
    assert next(model.parameters()) is model[0].weight
    assert len(list(model.parameters(recurse=False))) == 0
    dt.uncast(model)
    assert "parameters" not in vars(model)
