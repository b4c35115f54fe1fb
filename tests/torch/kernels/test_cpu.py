"""The compiled CPU kernels against the reference, bit for bit, over every form of storage and adversarial values."""

import math

import pytest
import torch

from duotone.torch.kernels import cpu, reference, table
from duotone.torch.kernels.cpu import threads
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
    step_both,
)

BOTH = (cpu, reference)
SPLIT = ("bfloat16+tail", torch.bfloat16, 2, torch.float32)
STOCHASTIC = ("bfloat16+stochastic", torch.bfloat16, 2, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pair(*sizes: int, form=SPLIT, group=lambda index: 0):
    """Return operands of these sizes, twice."""
    operands = [make_operand(*form, numel, index, group(index)) for index, numel in enumerate(sizes)]
    return operands, copy_of(operands)


def grads_for(operands, step: int):
    return [adversarial_grads(operand.weight.numel(), operand.number + 100 * step) for operand in operands]


COLUMNS = ("optimizer", "form", "grad", "moment")


@pytest.mark.parametrize(COLUMNS, pairs_of_cases())
def test_every_pair_of_forms_in_every_bit(optimizer, form, grad, moment):
    test_every_form_in_every_bit(optimizer, form, grad, moment)


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, [case for case in every_case() if case not in pairs_of_cases()])
def test_every_form_in_every_bit(optimizer, form, grad, moment):
    operands = pair(1000, 7, 0, 1, 3001, form=(form, grad, MOMENTS[optimizer], moment))
    for step in range(3):
        if step == 1:
            edit(*operands)
        step_both(BOTH, optimizer, operands, grads_for(operands[0], step))
        assert not differing(*operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [0, 1, 0x7FFF, -0x8000, -1, 0x1000, -0x1000, None])
def test_every_weight_with_edge_tails_is_decoded_and_encoded_alike(dtype, tail):
    # stale tails and masters that no encoding makes are among them
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**15), 2**15, weight.shape, generator=generator, dtype=torch.int32).to(torch.int16)
    tails = drawn if tail is None else torch.full_like(drawn, tail)
    form = (f"{str(dtype).removeprefix('torch.')}+tail", torch.float32, 0, torch.float32)
    for lr in (0.0, 1e-3):
        operand = make_operand(*form, weight.numel(), 0)
        operand = operand._replace(weight=weight.clone(), tail=tails.clone(), checksums=None)
        operands = [operand], copy_of([operand])
        step_both(
            BOTH, "sgd", operands, [torch.randn(weight.shape, generator=generator)], [SETTINGS["sgd"]._replace(lr=lr)]
        )
        assert not differing(*operands)


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_do_the_same_damage(optimizer, bad):
    operands = pair(100, form=("bfloat16+tail", torch.float32, MOMENTS[optimizer], torch.float32))
    grads = grads_for(operands[0], 0)
    grads[0][::7] = bad
    for _ in range(2):
        step_both(BOTH, optimizer, operands, grads)
        assert not differing(*operands)


@pytest.mark.parametrize("form", [SPLIT, STOCHASTIC], ids=["split", "stochastic"])
def test_tensors_of_several_chunks(form):
    operands = pair(3 * CHUNK + 5, CHUNK, 12, form=form)
    for step in range(2):
        edit(*operands)
        step_both(BOTH, "adamw", operands, grads_for(operands[0], step))
        assert not differing(*operands)


def test_groups_have_their_own_settings():
    settings = [
        SETTINGS["adamw"],
        SETTINGS["adamw"]._replace(lr=torch.tensor(0.3), maximize=True, seed=-5),
        SETTINGS["adamw"]._replace(beta1=0.0, beta2=0.0, eps=1e-3, weight_decay=0.0),
    ]
    forms = [SPLIT, STOCHASTIC, ("float32", torch.float32, 2, torch.float32)]
    operands = [make_operand(*forms[index % 3], 50 + index, index, index % 3) for index in range(9)]
    operands = operands, copy_of(operands)
    for step in range(3):
        step_both(BOTH, "adamw", operands, grads_for(operands[0], step), settings)
        assert not differing(*operands)


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_found_inf_changes_not_one_bit(optimizer):
    operands = pair(100, 0, 3, form=("bfloat16+tail", torch.float32, MOMENTS[optimizer], torch.float32))
    edit(*operands)
    step_both((cpu,), optimizer, operands[:1], grads_for(operands[0], 0), found_inf=True)
    assert not differing(*operands)


def test_addresses_need_no_alignment():
    operands = pair(1000)
    shifted = copy_of(operands[0])
    for index, operand in enumerate(shifted):

        def odd(value):
            return torch.cat((value.new_zeros(1), value.flatten()))[1:].view(value.shape)

        moments = tuple(map(odd, operand.moments))
        shifted[index] = operand._replace(
            weight=odd(operand.weight), tail=odd(operand.tail), grad=odd(operand.grad), moments=moments
        )
        assert shifted[index].weight.data_ptr() % 4 == 2
    step_both(BOTH, "adamw", (shifted, operands[1]), grads_for(operands[1], 0))
    assert not differing(shifted, operands[1])


@pytest.mark.parametrize("pool", ["OpenMP", "Python"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_how_many_threads_there_are_changes_no_bit(monkeypatch, pool, count):
    if pool == "Python":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    operands = pair(5 * CHUNK + 1, 10, 20, CHUNK)
    step_both(BOTH, "adamw", operands, grads_for(operands[0], 0))
    assert not differing(*operands)
    grads = [operand.grad for operand in operands[0]]
    total, expected = (backend.grad_stats(grads, torch.tensor(0.5))[0].item() for backend in BOTH)
    assert total == expected


def test_openmp_is_torchs_own_where_there_is_one():
    openmp = threads._openmp()
    if openmp is None:
        pytest.skip("torch runs on another pool of threads here")
    assert openmp.__name__ == "GOMP_parallel"


def test_indices_beyond_two_to_the_31(monkeypatch):
    # all but the last chunk is never touched, so that the memory is never there
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    first, length = 2**31 + 2 * CHUNK, 1003
    whole = torch.empty(first + length, dtype=torch.bfloat16), torch.empty(first + length, dtype=torch.bfloat16)
    end = make_operand("bfloat16+stochastic", torch.bfloat16, 0, torch.float32, length, 1)
    whole[0][first:], whole[1][first:] = end.weight, adversarial_grads(length, 1)
    operand = end._replace(weight=whole[0], grad=whole[1])
    (rows,) = table.tables_of([operand])
    assert rows.chunks[-1].tolist() == [0, first]
    monkeypatch.setattr(
        cpu, "tables_of", lambda operands: (rows._replace(chunks=rows.chunks[-1:], lengths=rows.lengths[-1:]),)
    )
    cpu.update(UPDATES["sgd"], [operand], [SETTINGS["sgd"]], torch.ones(()), torch.tensor(False))

    blocks = first // 8 + torch.arange(length // 8 + 1)
    zero, seed = torch.zeros_like(blocks), SETTINGS["sgd"].seed
    counter = blocks & 0xFFFF_FFFF, blocks >> 32, zero + 4, zero + end.number
    words = philox4x32(counter, (seed & 0xFFFF_FFFF, seed >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten()
    exact = end.weight.float() - whole[1][first:].float() * 0.1
    expected = round_stochastically(exact, torch.bfloat16, halves[:length].int())
    assert torch.equal(whole[0][first:].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (31, 32, 33), (1023, 1024, 1025), (CHUNK - 1, CHUNK, CHUNK + 1), (3 * CHUNK + 77,)]
)
def test_grad_stats_in_every_bit(sizes):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    grads = [adversarial_grads(size, index).to(dtypes[index % 3]) for index, size in enumerate(sizes)]
    grads = [torch.where(grad.isfinite(), grad, 1.0) for grad in grads]
    inverse_scale = torch.tensor(2.0**-7)
    total, found_inf = cpu.grad_stats(grads, inverse_scale)
    expected, _ = reference.grad_stats(grads, inverse_scale)
    assert (total.dtype, total.shape) == (torch.float64, ())
    assert total.item() == expected.item()
    assert not found_inf.item()


def test_more_tensors_than_a_chunk_has_elements():
    grads = list((torch.arange(CHUNK + 10) % 7).float().unbind())
    total, _ = cpu.grad_stats(grads, torch.ones(()))
    assert total.item() == torch.stack(grads).double().square().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 31, 32, 1024, CHUNK - 1, CHUNK, 2 * CHUNK + 99])
def test_one_element_that_is_not_finite_is_found(dtype, bad, position):
    grad = torch.full((2 * CHUNK + 100,), torch.finfo(dtype).max, dtype=dtype)
    assert not cpu.grad_stats([grad], torch.ones(()))[1].item()
    grad[position] = bad
    assert cpu.grad_stats([torch.ones(3, dtype=dtype), grad], torch.ones(()))[1].item()
