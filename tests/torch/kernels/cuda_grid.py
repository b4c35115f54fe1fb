"""The CUDA kernels against the reference, bit for bit: what `test_cuda.py` runs in a process of its own.

On a GPU if there is one, else in Triton's interpreter, which has to be chosen before Triton is imported; CPU tensors
stand for CUDA tensors there. Sizes are small, since the interpreter takes tens of milliseconds for a tile.
"""

import math
from importlib import import_module

import numpy as np
import pytest
import torch

from duotone.torch.kernels import Edits, Operand, reference, table
from duotone.torch.kernels.philox import philox4x32
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.round_stochastically import round_stochastically

from .grid import (
    MOMENTS,
    SETTINGS,
    UPDATES,
    adversarial_grads,
    copy_of,
    differing,
    edit,
    every_case,
    make_operand,
    pairs_of_cases,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SPLIT = ("bfloat16+tail", torch.bfloat16, 2, torch.float32)
FORMS = {
    "float32": ("float32", torch.float32, 2, torch.float32),
    "split": SPLIT,
    "split float16": ("float16+tail", torch.float16, 2, torch.float32),
    "stochastic": ("bfloat16+stochastic", torch.bfloat16, 2, torch.bfloat16),
    "stochastic float16": ("float16+stochastic", torch.float16, 2, torch.bfloat16),
}

# numpy, which the interpreter runs on, warns of what is meant to overflow
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def launch():
    return import_module("duotone.torch.kernels.cuda.launch")


def moved(operands, device):
    """Return copies of operands on a device."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device, copy=True)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return [Operand(*map(move, operand)) for operand in operands]


def pair(*sizes, form=SPLIT, group=lambda index: 0):
    """Return operands of these sizes for the reference, and for the kernels."""
    operands = [make_operand(*form, numel, index, group(index)) for index, numel in enumerate(sizes)]
    return operands, moved(operands, DEVICE)


def grads_for(operands, step):
    return [adversarial_grads(operand.weight.numel(), operand.number + 100 * step) for operand in operands]


def step_both(optimizer, expected, own, grads, settings=None, *, found_inf=False):
    """Step both with the same gradients; the settings of the kernels may name tensors on the device."""
    settings = settings or ([SETTINGS[optimizer]],) * 2
    backend = import_module("duotone.torch.kernels.cuda")
    edits = []
    for module, operands, groups, device in (
        (reference, expected, settings[0], "cpu"),
        (backend, own, settings[1], DEVICE),
    ):
        for operand, grad in zip(operands, grads, strict=True):
            operand.grad.copy_(grad)
        scalars = torch.tensor(0.37, device=device), torch.tensor(found_inf, device=device)
        edits.append(Edits(torch.zeros((), dtype=torch.int32, device=device), 4))
        module.update(UPDATES[optimizer], operands, groups, *scalars, edits[-1])
    assert edits[0].seen.item() == edits[1].seen.item()


def differences(own, expected):
    return differing(moved(own, "cpu"), expected)


def step_and_compare(optimizer, operands, steps, settings=None):
    for step in range(steps):
        if step or steps == 1:
            edit(*operands)
        step_both(optimizer, *operands, grads_for(operands[0], step), settings)
        assert not differences(operands[1], operands[0])


COLUMNS = ("optimizer", "form", "grad", "moment")


@pytest.mark.parametrize(COLUMNS, pairs_of_cases())
def test_every_pair_of_forms(optimizer, form, grad, moment):
    test_every_form(optimizer, form, grad, moment)


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, [case for case in every_case() if case not in pairs_of_cases()])
def test_every_form(optimizer, form, grad, moment):
    # from the first step on; a whole tile and a part of one, or, since tiles take time, a part of one
    numel = 520 if grad == torch.float32 else 300
    step_and_compare(optimizer, pair(numel, form=(form, grad, MOMENTS[optimizer], moment)), 2)


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_maximize(optimizer):
    settings = [SETTINGS[optimizer]._replace(maximize=True)]
    operands = pair(40, form=("float16+tail", torch.float32, MOMENTS[optimizer], torch.float32))
    step_and_compare(optimizer, operands, 3, (settings, settings))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_sizes_around_a_tile(form):
    step_and_compare("adamw", pair(0, 1, 7, 1024, 1025, 3000, form=form), 1)


@pytest.mark.parametrize("form", [FORMS["split"], FORMS["stochastic"]], ids=["split", "stochastic"])
def test_more_than_one_chunk(form):
    step_and_compare("adamw", pair(CHUNK + 8200, form=form), 1)


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("form", ["bfloat16+tail", "float16+stochastic"])
@pytest.mark.parametrize("bad", [0x7F80_0000, -0x80_0000, 0x7FC1_2345], ids=["Inf", "-Inf", "NaN with a payload"])
def test_gradients_that_are_not_finite_do_the_same_damage(optimizer, form, bad):
    operands = pair(100, form=(form, torch.float32, MOMENTS[optimizer], torch.float32))
    grads = grads_for(operands[0], 0)
    grads[0].view(torch.int32)[::7] = bad
    for _ in range(2):
        step_both(optimizer, *operands, grads)
        assert not differences(operands[1], operands[0])


@pytest.mark.parametrize(
    ("optimizer", "lr_dtype"),
    [(name, torch.float32) for name in SETTINGS]
    + [("adamw", dtype) for dtype in (None, torch.float64, torch.bfloat16)],
)
def test_groups_have_their_own_settings(optimizer, lr_dtype):
    number = 0.3 if lr_dtype is None else torch.tensor(0.3, dtype=lr_dtype)
    base = SETTINGS[optimizer]
    groups = [base, base._replace(lr=number, maximize=True, seed=-5), base._replace(weight_decay=0.0, seed=2**70 + 1)]
    own = [*groups]
    if lr_dtype is not None:
        own[1] = groups[1]._replace(lr=number.to(DEVICE))
    forms = [(form, grad, MOMENTS[optimizer], moment) for form, grad, _, moment in FORMS.values()]
    operands = [make_operand(*forms[index % 5], 20 + index, index, index // 2 % 3) for index in range(7)]
    step_and_compare(optimizer, (operands, moved(operands, DEVICE)), 2, (groups, own))


def test_a_learning_rate_on_the_host_is_a_number():
    settings = [SETTINGS["lion"]._replace(lr=torch.tensor(0.3))]
    step_and_compare("lion", pair(10, form=("float32", torch.float32, 1, torch.float32)), 2, (settings, settings))


def test_a_learning_rate_on_the_device_is_read_in_every_step():
    rates = torch.tensor(0.1), torch.tensor(0.1, device=DEVICE)
    settings = tuple([SETTINGS["adamw"]._replace(lr=rate)] for rate in rates)
    operands = pair(30)
    for step, value in enumerate((0.1, 0.03, 0.0)):
        for rate in rates:
            rate.fill_(value)
        step_both("adamw", *operands, grads_for(operands[0], step), settings)
        assert not differences(operands[1], operands[0])


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_found_inf_changes_not_one_bit(optimizer):
    operands = pair(100, 0, 3, form=("bfloat16+tail", torch.float32, MOMENTS[optimizer], torch.bfloat16))
    edit(*operands)
    before = copy_of(operands[0])
    step_both(optimizer, *operands, grads_for(operands[0], 0), found_inf=True)
    assert not differences(operands[1], before)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_addresses_need_no_alignment(form):
    expected, own = pair(1000, 600, form=form)

    def odd(value):
        return torch.cat((value.new_zeros(1), value))[1:]

    # the first parameter alone, so that both kinds are there
    parts = {"weight": odd(own[0].weight), "grad": odd(own[0].grad), "moments": tuple(map(odd, own[0].moments))}
    own[0] = own[0]._replace(**parts, tail=None if own[0].tail is None else odd(own[0].tail))
    assert own[0].weight.data_ptr() % 16 == own[0].weight.element_size()
    step_and_compare("adamw", (expected, own), 2)


def test_no_operands_and_no_elements():
    nothing = torch.ones((), device=DEVICE), torch.tensor(False)
    import_module("duotone.torch.kernels.cuda").update(UPDATES["adamw"], [], [], *nothing)
    step_and_compare("sgd", pair(0, form=("float32", torch.float32, 0, torch.float32)), 1)


def test_random_bits_of_late_steps_and_parameters():
    operands = pair(30, form=FORMS["stochastic"])
    operands = tuple([own[0]._replace(number=2**30 - 1)] for own in operands)
    for own in operands:
        own[0].step.fill_(2**33 + 2**31 + 5)
    step_and_compare("adamw", operands, 2)


def test_elements_beyond_two_to_the_36(monkeypatch):
    # a parameter of which only the end is in memory, its address being that of an element that is not there
    first, numel = 2**36, 1000
    operand = make_operand("bfloat16+stochastic", torch.bfloat16, 0, torch.float32, numel, 3)
    operand.grad.copy_(torch.linspace(-1, 1, numel))
    lr, seed = 0.1, SETTINGS["sgd"].seed
    block = torch.arange(numel // 8) + first // 8
    words = philox4x32(
        (block & 0xFFFF_FFFF, block >> 32, operand.step, torch.tensor(3)), (seed & 0xFFFF_FFFF, seed >> 32)
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    random = torch.stack(halves, dim=-1).flatten().to(torch.int32)
    expected = round_stochastically(operand.weight.float() - operand.grad.float() * lr, torch.bfloat16, random)

    (own,) = moved([operand], DEVICE)
    (whole,) = table.tables_of([own])
    parameters = whole.parameters.copy()
    parameters[:, [table.GRAD, table.WEIGHT]] -= 2 * first
    parameters[:, table.NUMEL] += first
    late = whole._replace(parameters=parameters, chunks=whole.chunks + np.array([0, first]))
    monkeypatch.setattr(launch(), "tables_of", lambda operands: (late,))
    backend = import_module("duotone.torch.kernels.cuda")
    one, found_inf = torch.ones((), device=DEVICE), torch.tensor(False, device=DEVICE)
    backend.update(UPDATES["sgd"], [own], [SETTINGS["sgd"]._replace(lr=lr)], one, found_inf)
    assert torch.equal(own.weight.cpu().view(torch.int16), expected.view(torch.int16))


def stats(grads, inverse_scale):
    backend = import_module("duotone.torch.kernels.cuda")
    total, found_inf = backend.grad_stats(
        [grad.to(DEVICE) for grad in grads], torch.tensor(inverse_scale, device=DEVICE)
    )
    assert (total.dtype, total.shape, found_inf.dtype, found_inf.shape) == (torch.float64, (), torch.bool, ())
    return total.item(), found_inf.item()


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (31, 0, 32, 33), (1023, 1024, 1025), (CHUNK - 1, CHUNK, CHUNK + 1), (2 * CHUNK + 77, 8)]
)
def test_grad_stats(sizes):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    grads = [adversarial_grads(size, index).to(dtypes[index % 3]) for index, size in enumerate(sizes)]
    grads = [torch.where(grad.isfinite(), grad, 1.0) for grad in grads]
    total, found_inf = reference.grad_stats(grads, torch.tensor(0.3))
    assert stats(grads, 0.3) == (total.item(), found_inf.item())


def test_grad_stats_at_any_address():
    grad = adversarial_grads(1001, 0)[1:]
    grad = torch.where(grad.isfinite(), grad, 1.0).to(DEVICE)
    total, found_inf = reference.grad_stats([grad.cpu()], torch.tensor(0.5))
    assert stats([grad], 0.5) == (total.item(), found_inf.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [31, 4099])
def test_one_element_that_is_not_finite_is_found(dtype, bad, position):
    grad = torch.full((4100,), torch.finfo(dtype).max, dtype=dtype)
    grad[position] = bad
    assert stats([torch.ones(3, dtype=dtype), grad], 1.0)[1]


def test_large_finite_gradients_are_not_taken_for_an_overflow():
    assert stats([torch.full((4100,), torch.finfo(torch.float32).max)], 1.0) == (
        reference.grad_stats([torch.full((4100,), torch.finfo(torch.float32).max)], torch.tensor(1.0))[0].item(),
        False,
    )


@pytest.mark.parametrize("inverse_scale", [0.5, 0.1, 0.3, 0.7])
def test_more_chunks_than_a_chunk_has_elements(inverse_scale):
    sums = torch.rand(CHUNK + 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = torch.tensor(inverse_scale)
    expected = reference._chunk_sums(reference._chunk_sums(sums)) * inverse.double().square()
    total, found_inf = launch()._total(sums.to(DEVICE), inverse.to(DEVICE))
    assert total.item() == expected.item()
    assert not found_inf.item()
