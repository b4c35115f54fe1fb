"""What every optimizer does alike: skip, multiply, follow freezing and casting, and refuse what it cannot do."""

import copy
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.kernels import Rounding
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import Storage, set_storage, storage_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAMW = partial(dt.AdamW, lr=0.01)
NESTEROV = partial(dt.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
both = pytest.mark.parametrize("make", [ADAMW, NESTEROV, partial(dt.SGD, lr=0.01)], ids=["AdamW", "Nesterov", "SGD"])


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_found_inf_changes_not_one_bit(make_parameters, train, everything_in, same_everything, make, dtype, value):
    parameters = make_parameters(dtype)
    optimizer = make(parameters)
    train(optimizer, range(3))
    before = everything_in(optimizer)
    for parameter in parameters:
        parameter.grad.fill_(value)
    optimizer.step(found_inf=torch.tensor(True))
    assert same_everything(everything_in(optimizer), before)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skipped_step_might_as_well_not_have_been(
    make_parameters, train, everything_in, same_everything, make, dtype
):
    skipping, other = make(make_parameters(dtype)), make(make_parameters(dtype))
    # the first step of all, where bias correction begins, and one in between
    train(skipping, [99], found_inf=torch.tensor(True))
    for optimizer in (skipping, other):
        train(optimizer, range(2), found_inf=torch.tensor(False))
    train(skipping, [98], found_inf=torch.tensor(True))
    for optimizer in (skipping, other):
        train(optimizer, [2])
    assert same_everything(everything_in(skipping), everything_in(other))


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_multiplier_multiplies_in_float32(
    make_parameters, give_gradients, everything_in, same_everything, make, dtype
):
    multiplied, reference = make_parameters(dtype), make_parameters(dtype)
    multiplier = torch.tensor(0.3 * 2.0**-16)
    optimizers = make(multiplied), make(reference)
    for parameter in reference:
        parameter.grad_dtype = torch.float32
    for step in range(3):
        give_gradients(multiplied, step)
        give_gradients(reference, step)
        for parameter in reference:
            parameter.grad *= multiplier
        optimizers[0].step(grad_multiplier=multiplier)
        optimizers[1].step()
    assert same_everything(everything_in(optimizers[0]), everything_in(optimizers[1]))


@both
def test_one_optimizer_takes_every_dtype_and_group(make_parameters, give_gradients, same_bits, make):
    mixed = [make_parameters(dtype) for dtype in DTYPES]
    alone = [make_parameters(dtype) for dtype in DTYPES]
    together = make([{"params": parameters} for parameters in mixed])
    optimizers = [make(parameters) for parameters in alone]
    for step in range(3):
        for parameters in (*mixed, *alone):
            give_gradients(parameters, step)
        for optimizer in (together, *optimizers):
            optimizer.step()
    for one, other in zip(chain(*mixed), chain(*alone), strict=True):
        assert same_bits(read_master(one), read_master(other))


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(train, same_bits, make, dtype):
    generator = torch.Generator().manual_seed(0)
    square, image = (torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 5), (2, 3, 4, 5)))
    plain = nn.Parameter(square.t().contiguous()), nn.Parameter(image.clone())
    strided = (
        nn.Parameter(square.t()),
        nn.Parameter(image.contiguous(memory_format=torch.channels_last)),
    )
    assert not any(parameter.is_contiguous() for parameter in strided)
    for parameters in (plain, strided):
        train(make(parameters), range(3))
    for one, other in zip(plain, strided, strict=True):
        assert same_bits(read_master(one), read_master(other))
    assert not any(parameter.is_contiguous() for parameter in strided)


@both
def test_parameters_without_a_gradient_are_left_alone(make_parameters, train, everything_in, same_everything, make):
    parameters = make_parameters(torch.bfloat16)
    optimizer = make(parameters)
    train(optimizer, range(2))
    before = everything_in(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert same_everything(everything_in(optimizer), before)


@both
def test_a_weight_frozen_at_the_cast_is_its_own_first_master(train, same_bits, make):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    dt.cast(model, "bf16")
    whole = nn.Parameter(model.weight.detach().float())
    optimizer = make(model.parameters())
    train(optimizer, range(2))
    assert same_bits(model.weight.float(), whole)
    assert storage_of(model.weight).tail is None
    model.weight.requires_grad_(True)
    model.bias.requires_grad_(False)
    bias = read_master(model.bias)
    model.bias.grad = None
    train(optimizer, range(5))
    train(make([whole]), range(5))
    assert same_bits(read_master(model.weight), whole)
    assert same_bits(read_master(model.bias), bias)


@both
def test_a_cast_after_the_optimizer_was_built_is_followed(train, same_bits, make):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = copy.deepcopy(model)
    optimizers = make(model.parameters()), make(reference.parameters())
    for policy in ("bf16", "fp32", "bf16"):
        dt.cast(model, policy)
        for optimizer in optimizers:
            train(optimizer, range(3))
    assert same_bits(dt.master_weights(model, optimizers[0])["weight"], reference.weight)


def test_stochastic_rounding_follows_seed_step_and_parameter(train):
    def run(seed: int, steps: int) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        for parameter in parameters:
            set_storage(parameter, Storage(rounding=Rounding.STOCHASTIC))
        # the same gradient everywhere, so that random bits alone tell elements apart
        optimizer = dt.SGD(parameters, lr=2.0**-9, seed=seed)
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return parameters

    first, second = run(seed=0, steps=1)
    # half of the 1000 elements move; hoeffding: a right rounder moves 103 more or fewer with probability 1e-9 at most
    assert abs((torch.stack((first, second)) != 1.0).sum() - 500) < 104
    assert torch.equal(first, run(seed=0, steps=1)[0])
    for other in (second, run(seed=1, steps=1)[0]):
        assert not torch.equal(first, other)
    # steps draw anew: with the same bits each time, an element would move at every step or at none
    assert len(set(run(seed=0, steps=4)[0].tolist())) > 2


@both
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_inside_a_compiled_function_is_the_same(same_bits, make, scaled):
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(500))
        weight.grad = torch.randn(500)
        optimizer, scaler = make([weight]), dt.LossScaler("bf16")

        def step(optimizer=optimizer, scaler=scaler):
            return scaler.step(optimizer, clip_norm=1.0).grad_norm if scaled else optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            run()
        weights.append(weight)
    assert same_bits(*weights)


@both
def test_scalars_may_be_numbers(same_bits, make):
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(3)
    make(weights[:1]).step(grad_multiplier=0.5, found_inf=False)
    make(weights[1:]).step(grad_multiplier=torch.tensor(0.5), found_inf=torch.tensor(0.0))
    assert same_bits(*weights)
    assert weights[0][0] != 1.0
    make(weights[:1]).step(found_inf=True)
    assert same_bits(*weights)


@both
def test_a_gradient_that_is_only_noted_as_negated_has_its_sign(make):
    moved = []
    for sign in (1.0, -1.0):
        weight = nn.Parameter(torch.ones(1))
        grad = torch.complex(torch.zeros(1), torch.ones(1))
        weight.grad = (grad.conj() if sign < 0 else grad).imag
        assert weight.grad.is_neg() == (sign < 0)
        make([weight]).step()
        moved.append(weight.item() - 1.0)
    assert moved[0] < 0.0 < moved[1]


@both
def test_a_seed_may_be_of_numpy(make):
    optimizer = make([nn.Parameter(torch.ones(1))], seed=np.int64(5))
    assert type(optimizer.param_groups[0]["seed"]) is int


@both
def test_tied_parameters_are_updated_once(same_bits, make):
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    dt.cast(tied, "bf16")
    whole = nn.Parameter(read_master(tied[0].weight))
    optimizers = make(tied.parameters()), make([whole])
    for _ in range(3):
        tied(torch.ones(1, 4)).sum().backward()
        whole.grad = tied[0].weight.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad()
    assert same_bits(read_master(tied[1].weight), whole)


@both
def test_a_closure_recomputes_the_gradients_first(make):
    parameter = nn.Parameter(torch.ones(2))

    def closure() -> torch.Tensor:
        loss = (3.0 * parameter).sum()
        loss.backward()
        return loss

    optimizer = make([parameter])
    assert optimizer.step(closure).item() == 6.0
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert (parameter < 1.0).all()
    for arguments in ({"found_inf": torch.tensor(False)}, {"grad_multiplier": torch.ones(())}):
        with pytest.raises(OptimizerError, match="the closure changed the gradients after the scaler had read them"):
            optimizer.step(closure, **arguments)
        # as Lightning gives one to every step in manual optimization
        before = parameter.tolist()
        assert optimizer.step(lambda: torch.tensor(7.0), **arguments).item() == 7.0
        assert parameter.tolist() != before


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_gradients_are_refused(make, dtype):
    model = nn.Embedding(4, 3, sparse=True).to(dtype)
    model(torch.tensor([1])).sum().backward()
    before = read_master(model.weight)
    with pytest.raises(OptimizerError, match=r"takes no sparse gradients; use Embedding\(sparse=False\)"):
        make(model.parameters()).step()
    assert torch.equal(read_master(model.weight), before)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(make, dtype):
    good, bad = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).to(dtype))
    message = f"cannot update a parameter in {dtype}; allowed are float32, bfloat16 and float16"
    with pytest.raises(OptimizerError, match=message):
        make([good, bad])
    optimizer = make([good])
    with pytest.raises(OptimizerError, match=message):
        optimizer.add_param_group({"params": [bad]})
    assert [group["params"] for group in optimizer.param_groups] == [[good]]


def test_gradients_are_let_go_of_or_filled_with_zeros():
    weight = nn.Parameter(torch.ones(2))
    optimizer = dt.AdamW([weight, nn.Parameter(torch.ones(1))])
    weight.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert weight.grad.tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert weight.grad is None
