"""The kernel of averages: the reference against NumPy, the compiled one against the reference, bit for bit."""

import math

import numpy as np
import pytest
import torch

from duotone.torch import kernels
from duotone.torch.kernels import AverageOperand, cpu, decode, reference, table
from duotone.torch.kernels.reference import CHUNK

from .average_operands import FORMATS, SHARES, batch_of, differing, make_average

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NOT_SKIPPED = torch.tensor(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", SHARES)
def test_the_reference_is_three_rounded_operations(form, share):
    before = make_average(form, 3000, 1)
    batch = batch_of(before)
    reference.average(batch, torch.tensor(share), NOT_SKIPPED)
    weight, tail, kept = before
    master = (weight.float() if tail is None else decode(weight, tail)).numpy()
    expected = master if share == 1.0 else kept.numpy() + (master - kept.numpy()) * np.float32(share)
    own = batch.operands[0].average.numpy()
    same = (own.view(np.int32) == expected.view(np.int32)) | (np.isnan(own) & np.isnan(expected))
    assert same.all()
    # weight and tail are read only
    assert torch.equal(batch.operands[0].weight.view(torch.uint8), weight.view(torch.uint8))
    assert tail is None or torch.equal(batch.operands[0].tail, tail)


@pytest.mark.parametrize("share", SHARES)
def test_the_compiled_kernel_in_every_bit(share):
    operands = [make_average(FORMATS[index % 5], size, index) for index, size in enumerate((1000, 7, 0, 1, 3001) * 2)]
    operands.append(make_average("bfloat16+tail", 2 * CHUNK + 5, 11))
    own, expected = batch_of(*operands), batch_of(*operands)
    for _ in range(3):
        cpu.average(own, torch.tensor(share), NOT_SKIPPED)
        reference.average(expected, torch.tensor(share), NOT_SKIPPED)
        assert not differing(own, expected)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_a_skipped_step_changes_not_one_bit(backend):
    operands = [make_average(form, 100, index) for index, form in enumerate(FORMATS)]
    own, before = batch_of(*operands), batch_of(*operands)
    backend.average(own, torch.tensor(1.0), torch.tensor(True))
    assert not differing(own, before)


@pytest.mark.parametrize("backend", [cpu, reference])
def test_the_first_share_takes_the_master_whatever_was_there(backend):
    values = torch.tensor([1.0, -0.0, 1e-45, math.inf])
    kept = torch.tensor([math.inf, math.nan, -3.0e38, -math.inf])
    batch = batch_of(AverageOperand(values, None, kept))
    backend.average(batch, torch.tensor(1.0), NOT_SKIPPED)
    assert torch.equal(batch.operands[0].average.view(torch.int32), values.view(torch.int32))


def test_one_table_for_each_format_made_once():
    batch = batch_of(*[make_average(FORMATS[index % 2], 10 + index, index) for index in range(4)])
    tables = table.average_tables_of(batch)
    assert [one.formats.weight for one in tables] == ["float32", "bfloat16+tail"]
    for number, one in enumerate(tables):
        own = batch.operands[number::2]
        assert one.parameters[:, table.WEIGHT].tolist() == [operand.weight.data_ptr() for operand in own]
        assert one.parameters[:, table.MOMENT].tolist() == [operand.average.data_ptr() for operand in own]
        assert one.parameters[:, table.NUMEL].tolist() == [10 + number, 12 + number]
    assert table.average_tables_of(batch) is tables


def test_layouts_of_every_kind_through_the_dispatch():
    image = make_average("bfloat16+tail", 2 * 3 * 4 * 5, 3)
    shaped = AverageOperand(
        *[tensor.view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for tensor in image]
    )
    strided = AverageOperand(*[tensor[::2] for tensor in make_average("bfloat16+tail", 50, 4)])
    # a tail in another order than its weight
    mixed = shaped._replace(tail=shaped.tail.contiguous())
    for operand in (shaped, strided, mixed):
        own, expected = batch_of(operand), batch_of(operand)
        kernels.average(own, torch.tensor(0.3), NOT_SKIPPED, "cpu")
        kernels.average(expected, torch.tensor(0.3), NOT_SKIPPED, "reference")
        assert torch.equal(own.operands[0].average, expected.operands[0].average)
    # the tensors themselves, with the strides that they have
    operand = strided._replace(average=strided.average.clone())
    kernels.average(kernels.AverageBatch((operand,), {}), torch.tensor(1.0), NOT_SKIPPED, "cpu")
    assert torch.equal(operand.average, decode(operand.weight, operand.tail))
