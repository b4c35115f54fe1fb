"""The stand-in beside torch.amp.GradScaler, step by step: with FP32 gradients, the same bits all the way."""

import copy
import math
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import duotone.torch as dt

KINDS = (torch.amp.GradScaler, dt.GradScaler)

MAKES = {
    "sgd": lambda params, **how: torch.optim.SGD(params, lr=0.1, momentum=0.9, **how),
    "sgd without momentum": lambda params, **how: torch.optim.SGD(params, lr=0.1, **how),
    "adam": lambda params, **how: torch.optim.Adam(params, lr=0.1, amsgrad=True, **how),
    "adamw": lambda params, **how: torch.optim.AdamW(params, lr=0.1, **how),
    "adagrad": lambda params, **how: torch.optim.Adagrad(params, lr=0.1, **how),
}
HOWS = {"plain": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def listed(optimizer):
    """Return weights, gradients and states as tensors."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for param in params for _, value in sorted(optimizer.state[param].items()) if value is not None]
    return [*params, *(param.grad for param in params), *states]


def check_same(same_bits, first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        if isinstance(one, torch.Tensor):
            assert same_bits(one, other)
        else:
            assert one == other


@pytest.fixture(autouse=True)
def _one_thread():
    # tensors are tiny here
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [*((make, torch.float32) for make in MAKES), ("adamw", torch.bfloat16), ("adamw", torch.float64)],
)
@pytest.mark.parametrize("how", HOWS)
def test_any_course_of_overflows_ends_in_the_same_bits(make, how, dtype, same_bits):
    choose = random.Random(f"{make} {how} {dtype}")
    torch.manual_seed(0)
    # neither powers of two nor above 1 all the time
    settings = {"init_scale": 1000.0, "growth_factor": 3.7, "backoff_factor": 0.3, "growth_interval": 2}
    shapes = [(5, 3), (7,), (), (2, 0)]
    begin = [torch.randn(shape, dtype=dtype) for shape in shapes]
    runs = []
    for kind in KINDS:
        params = [nn.Parameter(value.clone()) for value in begin]
        runs.append((kind("cpu", **settings), MAKES[make](params, **HOWS[how]), params))
    for step in range(30):
        # torch's fused SGD keeps memory that nobody wrote if its first step overflows
        overflow = choose.random() < 0.3 and step > 0
        values = [torch.randn(shape, dtype=dtype) for shape in shapes]
        if overflow:
            choose.choice(values[:2]).view(-1)[choose.randrange(5)] = choose.choice([math.inf, -math.inf, math.nan])
        unscale, set_scale, pickled = (choose.random() < rate for rate in (0.3, 0.1, 0.1))
        for place, (scaler, optimizer, params) in enumerate(runs):
            scale = scaler.scale(torch.ones(())).item()
            for param, value in zip(params, values, strict=True):
                param.grad = value * scale
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update(*([float(2 ** (step % 7))] if set_scale else []))
            if pickled:
                runs[place] = pickle.loads(pickle.dumps(scaler)), optimizer, params
        assert runs[0][0].state_dict() == runs[1][0].state_dict()
    check_same(same_bits, listed(runs[0][1]), listed(runs[1][1]))
    assert all(param.isfinite().all() for param in runs[1][2])


class Recipe:
    """A model, two optimizers, data, and what a training loop may do with a scaler."""

    def __init__(self, kind, how):
        torch.manual_seed(1)
        self.scaler = kind("cpu", init_scale=128.0, growth_interval=1)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
        self.optimizers = [
            torch.optim.AdamW(self.first.parameters(), lr=0.1, **HOWS[how]),
            torch.optim.SGD(self.second.parameters(), lr=0.1, **HOWS[how]),
        ]
        self.data = [(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(4)]

    def loss(self, number):
        x, y = self.data[number]
        return F.mse_loss(self.first(x), y)

    def end(self, number, *others):
        """Let the third iteration overflow, step and update."""
        if number == 2:
            self.first[1].weight.grad.detach().fill_(math.inf)
        for optimizer in (self.optimizers[0], *others):
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def plain(recipe, number):
    recipe.scaler.scale(recipe.loss(number)).backward()
    recipe.end(number)


def copied(recipe, number):
    plain(recipe, number)
    recipe.scaler = copy.deepcopy(recipe.scaler)


def through_the_graph(recipe, number):
    # gradients that could be differentiated again
    recipe.scaler.scale(recipe.loss(number)).backward(create_graph=True)
    recipe.end(number)


def clipping_scaled(recipe, number):
    recipe.scaler.scale(recipe.loss(number)).backward()
    nn.utils.clip_grad_norm_(recipe.first.parameters(), 0.2 * recipe.scaler.get_scale())
    recipe.end(number)


def clipping(recipe, number):
    recipe.scaler.scale(recipe.loss(number)).backward()
    recipe.scaler.unscale_(recipe.optimizers[0])
    nn.utils.clip_grad_norm_(recipe.first.parameters(), 0.2)
    recipe.end(number)


def penalty(recipe, number):
    loss = recipe.loss(number)
    grads = torch.autograd.grad(recipe.scaler.scale(loss), list(recipe.first.parameters()), create_graph=True)
    grads = [grad * (1.0 / recipe.scaler.get_scale()) for grad in grads]
    norm = torch.stack([grad.pow(2).sum() for grad in grads]).sum().sqrt()
    recipe.scaler.scale(loss + norm).backward()
    recipe.end(number)


def accumulation(recipe, number):
    recipe.scaler.scale(recipe.loss(number) / 2).backward()
    if number % 2:
        recipe.end(number)


def several(recipe, number):
    x, y = recipe.data[number]
    outputs = recipe.first(x), recipe.second(x)
    losses = [F.mse_loss(a * outputs[0] + b * outputs[1], y) for a, b in ((0.3, 0.7), (0.6, -0.4))]
    for loss in recipe.scaler.scale(losses):
        loss.backward(retain_graph=True)
    recipe.scaler.unscale_(recipe.optimizers[0])
    recipe.end(number, recipe.optimizers[1])


RECIPES = [plain, copied, through_the_graph, clipping_scaled, clipping, penalty, accumulation, several]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipes_of_torchs_manual_end_in_the_same_bits(recipe, how, same_bits):
    runs = [Recipe(kind, how) for kind in KINDS]
    for run in runs:
        for number in range(4):
            recipe(run, number)
    theirs, ours = runs
    assert theirs.scaler.state_dict() == ours.scaler.state_dict()
    # one overflow and three clean steps; with accumulation two steps, both clean
    assert ours.scaler.get_scale() == 128.0 * 4.0
    for one, other in zip(theirs.optimizers, ours.optimizers, strict=True):
        check_same(same_bits, listed(one), listed(other))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_training_ends_where_unscaled_training_does(how, unscale, same_bits):
    scaled, reference = Recipe(dt.GradScaler, how), Recipe(dt.GradScaler, how)
    reference.scaler = dt.GradScaler("cpu", enabled=False)
    for run in (scaled, reference):
        for number in range(4):
            run.scaler.scale(run.loss(number)).backward()
            if unscale:
                run.scaler.unscale_(run.optimizers[0])
            run.scaler.step(run.optimizers[0])
            run.scaler.update()
            run.optimizers[0].zero_grad()
    # the scales are powers of two, so nothing is rounded twice
    check_same(same_bits, listed(scaled.optimizers[0]), listed(reference.optimizers[0]))


@pytest.mark.parametrize("how", ["plain", "foreach"])
def test_sparse_embeddings_end_in_the_same_bits(how, same_bits):
    ends = []
    for kind in KINDS:
        torch.manual_seed(2)
        model = nn.Embedding(10, 3, sparse=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=how == "foreach")
        scaler = kind("cpu", init_scale=2.0**100, growth_interval=1)
        for step in range(6):
            # at first the sum overflows
            scaler.scale(model(torch.randint(10, (20,))).square().sum() * 1e8 ** (step < 2)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([model.weight, scaler.get_scale()])
    check_same(same_bits, *ends)


@pytest.mark.parametrize("policy", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("unscale", [False, True])
def test_duotones_optimizers_step_as_with_a_loss_scaler(policy, unscale, same_bits):
    ends = []
    for is_stand_in in (True, False):
        torch.manual_seed(3)
        model = dt.cast(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), policy)
        optimizer = dt.AdamW(model.parameters(), lr=0.01)
        scaler = dt.GradScaler("cpu", init_scale=2.0**12) if is_stand_in else dt.LossScaler("fp16", init_scale=2.0**12)
        for step in range(6):
            loss = F.cross_entropy(model(torch.randn(16, 8)), torch.randint(3, (16,)))
            scaler.scale(loss).backward()
            if step == 3:
                model[0].weight.grad[0, 0] = math.inf
            if is_stand_in and unscale:
                scaler.unscale_(optimizer)
                assert {param.grad.dtype for param in model.parameters()} <= {torch.float32, torch.bfloat16}
            scaler.step(optimizer)
            if is_stand_in:
                scaler.update()
                assert {param.grad.dtype for param in model.parameters()} == {p.dtype for p in model.parameters()}
            optimizer.zero_grad()
        assert all(param.grad_dtype == param.dtype for param in model.parameters())
        ends.append([*dt.master_weights(model, optimizer).values()])
        assert (scaler.get_scale() if is_stand_in else scaler.loss_scale.item()) == 2.0**11
    check_same(same_bits, *ends)
