"""Tables of raw addresses: formats, chunks, and when they are made anew."""

import numpy as np
import torch

from duotone.torch.kernels import Batch, table
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import GRAD, GROUP, MOMENT, NUMBER, NUMEL, STEP, TAIL, WEIGHT, Formats

from .grid import make_operand

FORMS = [
    (("bfloat16+tail", torch.bfloat16, 2, torch.float32), Formats("bfloat16+tail", "bfloat16", ("float32", "float32"))),
    (("float32", torch.float16, 0, torch.float32), Formats("float32", "float16", ())),
    (("float16+stochastic", torch.float32, 1, torch.bfloat16), Formats("float16+stochastic", "float32", ("bfloat16",))),
    (("float16", torch.float32, 1, torch.float32), Formats("float16", "float32", ("float32",))),
]


def test_there_is_one_table_for_each_form():
    operands = [make_operand(*FORMS[index % 4][0], 10 + index, index, index % 2) for index in range(8)]
    tables = table.tables_of(operands)
    assert [one.formats for one in tables] == [formats for _, formats in FORMS]
    for number, one in enumerate(tables):
        own = operands[number::4]
        assert one.parameters[:, WEIGHT].tolist() == [operand.weight.data_ptr() for operand in own]
        assert one.parameters[:, NUMBER].tolist() == [number, number + 4]
        assert one.parameters[:, GROUP].tolist() == [number % 2, number % 2]
        assert one.parameters[:, NUMEL].tolist() == [10 + number, 14 + number]
    assert tables[0].parameters[0, TAIL] == operands[0].tail.data_ptr()
    assert tables[0].parameters[0, MOMENT + 1] == operands[0].moments[1].data_ptr()
    assert not tables[0].parameters[:, MOMENT + 2].any()
    assert not tables[1].parameters[:, [TAIL, *range(MOMENT, STEP)]].any()


def test_chunks_cover_every_element_once():
    sizes = [0, 1, CHUNK, 0, 2 * CHUNK + 1, 5]
    operands = [make_operand(*FORMS[1][0], size, index) for index, size in enumerate(sizes)]
    (one,) = table.tables_of(operands)
    expected = [[1, 0], [2, 0], [4, 0], [4, CHUNK], [4, 2 * CHUNK], [5, 0]]
    assert one.chunks.tolist() == expected
    assert one.lengths.tolist() == [1, CHUNK, CHUNK, CHUNK, 1, 5]
    assert one.chunks.dtype == one.lengths.dtype == np.int64


def test_lengths_beyond_two_to_the_31():
    owners, starts, lengths = table._chunks(np.array([3, 2**40 + 1]))
    assert owners.size == 2 + 2**40 // CHUNK
    assert (owners[-1], starts[-1], lengths[-1]) == (1, 2**40, 1)
    assert (np.diff(starts[1:]) == CHUNK).all()


def test_a_table_is_made_anew_just_when_an_address_or_a_form_changes():
    operands = [make_operand(*FORMS[0][0], 100, index) for index in range(2)]
    first = table.tables_of(operands)
    assert table.tables_of(list(operands)) is first
    other = [operands[0], operands[1]._replace(grad=operands[1].grad.clone())]
    assert table.tables_of(other) is not first
    assert table.tables_of(operands[:1]) is not first
    # the same address read as another dtype
    read_as_fp16 = [operand._replace(grad=operand.grad.view(torch.float16)) for operand in operands]
    assert table.tables_of(read_as_fp16)[0].formats.grad == "float16"
    assert table.tables_of(operands) is first


def test_only_the_addresses_of_gradients_are_filled_in_anew():
    forms = [FORMS[0][0], FORMS[1][0], FORMS[0][0]]
    operands = [make_operand(*form, CHUNK + 1, index) for index, form in enumerate(forms)]
    blank, cache = [operand._replace(grad=None) for operand in operands], {}
    grads = [operand.grad for operand in operands]
    first = table.tables_of(Batch(blank, grads, cache))
    before = [one.parameters.copy() for one in first]
    elsewhere = [grad.clone() for grad in grads]
    moved = table.tables_of(Batch(blank, elsewhere, cache))
    for one, other, places in zip(first, moved, ([0, 2], [1]), strict=True):
        assert other.parameters[:, GRAD].tolist() == [elsewhere[place].data_ptr() for place in places]
        assert (one.parameters[:, WEIGHT:] == other.parameters[:, WEIGHT:]).all()
        assert (one.formats, one.chunks is other.chunks, one.lengths is other.lengths) == (other.formats, True, True)
    # what was handed out is as it was, and is handed out again
    assert all((one.parameters == copy).all() for one, copy in zip(first, before, strict=True))
    assert table.tables_of(Batch(blank, grads, cache)) is first
    assert table.tables_of(operands) is first


def test_gradients_that_moved_have_tables_of_their_own():
    grads = [torch.zeros(size, dtype=torch.bfloat16) for size in (7, CHUNK + 3)]
    first = table.grad_tables_of(grads)
    before = first[0].chunks.copy()
    elsewhere = [grad.clone() for grad in grads]
    (moved,) = table.grad_tables_of(elsewhere)
    address = elsewhere[1].data_ptr()
    assert moved.chunks.tolist() == [[elsewhere[0].data_ptr(), 7, 0], [address, CHUNK, 1], [address + 2 * CHUNK, 3, 2]]
    assert (first[0].chunks == before).all()
    assert table.grad_tables_of(grads) is first


def test_gradients_keep_their_place_whatever_their_dtype():
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    grads = [torch.zeros(size, dtype=dtype) for size, dtype in zip((CHUNK + 1, 7, 0), dtypes, strict=True)]
    whole, half = table.grad_tables_of(grads)
    address = grads[0].data_ptr()
    assert whole.dtype == "float32"
    assert whole.chunks.tolist() == [[address, CHUNK, 0], [address + 4 * CHUNK, 1, 1]]
    assert half.dtype == "bfloat16"
    assert half.chunks.tolist() == [[grads[1].data_ptr(), 7, 2]]


def test_no_gradient_has_no_table():
    assert table.grad_tables_of([]) == ()
    assert table.grad_tables_of([torch.zeros(0)])[0].chunks.size == 0
