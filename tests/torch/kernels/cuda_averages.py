"""The CUDA kernel of averages against the reference, bit for bit; `test_cuda.py` runs this as `cuda_grid.py`."""

from importlib import import_module

import pytest
import torch

from duotone.torch.kernels import reference
from duotone.torch.kernels.reference import CHUNK

from .average_operands import FORMATS, SHARES, batch_of, differing, make_average

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

# numpy, which the interpreter runs on, warns of what is meant to overflow
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def average_both(operands, share, *, skipped=False):
    """Return the averages of the kernel and of the reference after two updates."""
    own, expected = batch_of(*operands, device=DEVICE), batch_of(*operands)
    for _ in range(2):
        for backend, batch, device in (
            (import_module("duotone.torch.kernels.cuda"), own, DEVICE),
            (reference, expected, "cpu"),
        ):
            backend.average(batch, torch.tensor(share, device=device), torch.tensor(skipped, device=device))
    return own, expected


@pytest.mark.parametrize("share", SHARES)
def test_every_format(share):
    # a whole tile and a part of one, and what is smaller
    sizes = (520, 1, 300, 0, 7)
    assert not differing(*average_both([make_average(form, sizes[i], i) for i, form in enumerate(FORMATS)], share))


def test_two_chunks():
    assert not differing(*average_both([make_average("bfloat16+tail", CHUNK + 300, 1)], 0.25))


def test_a_skipped_step_changes_not_one_bit():
    operands = [make_average(form, 40, index) for index, form in enumerate(FORMATS)]
    own, _ = average_both(operands, 0.5, skipped=True)
    assert not differing(own, batch_of(*operands))


def test_addresses_need_no_alignment():
    def odd(tensor):
        return torch.cat((tensor.new_zeros(1), tensor))[1:]

    operand = make_average("float16+tail", 600, 5)
    own, expected = batch_of(operand, device=DEVICE), batch_of(operand)
    own = own._replace(operands=(type(operand)(*map(odd, own.operands[0])),))
    import_module("duotone.torch.kernels.cuda").average(
        own, torch.tensor(0.3, device=DEVICE), torch.tensor(False, device=DEVICE)
    )
    reference.average(expected, torch.tensor(0.3), torch.tensor(False))
    assert not differing(own, expected)
