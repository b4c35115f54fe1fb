"""Checksums of weights: what they see, for certain and by chance, and that compiled ones are vector code."""

import platform

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch

from duotone.torch.kernels import checksums
from duotone.torch.kernels.checksums import (
    CELL,
    FACTOR,
    changed_cells,
    elements_of,
    sums_of_cells,
    sums_of_each,
    unknown,
)
from duotone.torch.kernels.cpu import machine_code


def bits(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return weights of any bits, NaN and Inf among them."""
    drawn = np.random.default_rng(seed).integers(-(2**15), 2**15, shape, dtype=np.int16)
    return torch.from_numpy(drawn).view(torch.bfloat16)


@pytest.mark.parametrize("numel", [0, 1, 511, 512, 513, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_the_sums_that_the_module_says(numel, dtype):
    weight = bits(numel).view(dtype)
    values = weight.view(torch.int16).tolist()
    factors = [((2 * place + 1) * FACTOR + 2**15) % 2**16 - 2**15 for place in range(CELL)]
    expected = [
        sum(value * factor for value, factor in zip(values[start : start + CELL], factors, strict=False)) % 2**32 or 1
        for start in range(0, numel, CELL)
    ]
    assert [total % 2**32 for total in sums_of_cells(weight).tolist()] == expected
    assert unknown(weight).shape == (len(expected) + 1,)


@pytest.mark.parametrize("at_a_time", [CELL, 3 * CELL, 1 << 20])
def test_weights_that_are_read_together_or_in_pieces_have_the_same_sums(monkeypatch, at_a_time):
    weights = [bits(numel, seed=numel) for numel in (700, 0, 512, 1, 2000, 5, 3 * CELL)]
    # the sum of a cell with nothing but zeros in it
    weights.append(torch.zeros(CELL + 1, dtype=torch.float16))
    expected = [sums_of_cells(weight) for weight in weights]
    monkeypatch.setattr(checksums, "AT_A_TIME", at_a_time)
    found = [*map(sums_of_cells, weights), *sums_of_each(weights)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 2, strict=True))
    assert list(sums_of_each([])) == []


def test_no_change_of_one_element_and_no_exchange_of_two_is_missed():
    # the difference is a product of one of these factors and a change of bits, each below 2^16
    factors = ((2 * torch.arange(CELL) + 1) * FACTOR) % 2**16
    assert (factors % 2 == 1).all()
    assert factors.unique().numel() == CELL
    assert (2**16 - 1) ** 2 < 2**32
    weight = bits(CELL)
    known = torch.cat((sums_of_cells(weight), torch.zeros(1, dtype=torch.int32)))
    for place in (0, 7, CELL - 1):
        for change in (1, 2**15, -1):
            edited = weight.clone()
            edited.view(torch.int16)[place] += change
            assert changed_cells(edited, known).tolist() == [True]


def test_few_of_all_changes_are_missed():
    # 1 in 2^32 if they were random; two in 10^5 would have a chance of 3e-10
    generator = np.random.default_rng(1)
    weight = bits(1000, CELL).view(torch.int16)
    before = sums_of_cells(weight.flatten().view(torch.bfloat16))
    for count in (2, 3, 10, CELL):
        changes = np.zeros((1000, CELL), dtype=np.int16)
        for row in changes:
            row[generator.choice(CELL, count, replace=False)] = generator.choice((-1, 1), count)
        after = sums_of_cells((weight + torch.from_numpy(changes)).flatten().view(torch.bfloat16))
        assert (before == after).sum() <= 1


def test_what_is_unknown_is_not_compared():
    weight = torch.zeros(CELL + 1, dtype=torch.bfloat16)
    assert changed_cells(weight, unknown(weight)).tolist() == [False, False]
    # that of zeros is not the 0 that says so
    assert sums_of_cells(weight).tolist() == [1, 1]
    known = torch.tensor([1, 1, 0], dtype=torch.int32)
    weight[CELL] = 2.0
    assert changed_cells(weight, known).tolist() == [False, True]
    assert elements_of(torch.tensor([False, True]), CELL + 1).nonzero().tolist() == [[CELL]]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for instructions of x86")
def test_the_compiled_sum_multiplies_pairs_of_a_vector_at_once(monkeypatch):
    from duotone.torch.kernels.cpu.checksums import factor_table, fill_factors, sum_of_cell
    from duotone.torch.kernels.cpu.memory import read_i64, write_i64

    def kernel(job):
        factors = factor_table()
        fill_factors(factors)
        write_i64(job, 1, sum_of_cell(read_i64(job, 0), 0, CELL, factors))

    texts = []
    emit = llvm.TargetMachine.emit_object

    def emit_object(machine, module):
        texts.append(machine.emit_assembly(module))
        return emit(machine, module)

    monkeypatch.setattr(llvm.TargetMachine, "emit_object", emit_object)
    code = machine_code._compile(kernel)
    assert "pmaddwd" in texts[0]
    assert "pmulld" not in texts[0]
    weight = bits(CELL)
    job = torch.tensor([weight.data_ptr(), 0])
    machine_code.ctypes.CFUNCTYPE(None, machine_code.ctypes.c_int64)(machine_code._load(code))(job.data_ptr())
    assert job[1].item() == sums_of_cells(weight).item() % 2**32
