"""Which backend runs: by device or by name, said once where it cannot, the same in any memory layout."""

import sys
import warnings

import pytest
import torch

import duotone.torch as dt
from duotone.errors import BackendError, DuotoneWarning
from duotone.torch import kernels
from duotone.torch.kernels import cpu, dispatch, reference

from .grid import SETTINGS, UPDATES, adversarial_grads, copy_of, differing, make_operand

FALSE, ONE = torch.tensor(False), torch.ones(())
ADAMW = UPDATES["adamw"]


@pytest.fixture
def broken_cpu(monkeypatch):
    """Make the compiled backend impossible to import, as if nothing had been tried yet."""
    monkeypatch.setitem(sys.modules, "duotone.torch.kernels.cpu", None)
    dispatch._tried.cache_clear()
    yield
    dispatch._tried.cache_clear()


def operands():
    return [make_operand("bfloat16+tail", torch.bfloat16, 2, torch.float32, 50, index) for index in range(2)]


def test_the_device_has_its_own(monkeypatch):
    called = []
    monkeypatch.setattr(cpu, "update", lambda *arguments: called.append("cpu"))
    monkeypatch.setattr(reference, "update", lambda *arguments: called.append("reference"))
    for backend in ("auto", "cpu", "reference"):
        kernels.update(ADAMW, operands(), [SETTINGS["adamw"]], ONE, FALSE, backend)
    assert called == ["cpu", "cpu", "reference"]
    called.clear()
    meta = [operand._replace(weight=operand.weight.to("meta")) for operand in operands()]
    kernels.update(ADAMW, meta, [SETTINGS["adamw"]], ONE, FALSE)
    assert called == ["reference"]


def test_where_it_does_not_work_that_is_said_once_and_the_bits_are_the_same(broken_cpu):
    own, other = operands(), operands()
    with pytest.warns(DuotoneWarning, match=r'the fused "cpu" kernels do not work here \(.*halted.*slower'):
        kernels.update(ADAMW, own, [SETTINGS["adamw"]], ONE, FALSE)
    reference.update(ADAMW, other, [SETTINGS["adamw"]], ONE, FALSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.update(ADAMW, own, [SETTINGS["adamw"]], ONE, FALSE)
        kernels.grad_stats([operand.grad for operand in own], ONE)
    reference.update(ADAMW, other, [SETTINGS["adamw"]], ONE, FALSE)
    assert not differing(own, other)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_one_that_was_asked_for_by_name_must_work(broken_cpu):
    before = operands()
    own = copy_of(before)
    with pytest.raises(BackendError, match=r'"cpu" does not work here: .*; mend that, or use backend "reference"'):
        kernels.update(ADAMW, own, [SETTINGS["adamw"]], ONE, FALSE, "cpu")
    assert not differing(own, before)


def test_one_of_another_device_is_refused():
    with pytest.raises(BackendError, match=r'"cuda" was asked for, but the tensors are on cpu; use backend "cpu"'):
        kernels.grad_stats([torch.ones(1)], ONE, "cuda")


@pytest.mark.parametrize("make", [dt.AdamW, dt.SGD, dt.Lion])
def test_an_unknown_name_is_refused_at_once(make):
    with pytest.raises(BackendError, match=r'no backend "gpu"; .*cpu'):
        make([torch.nn.Parameter(torch.ones(1))], backend="gpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_memory_layout_is_updated_in_place(backend):
    def image(*, seed: int) -> torch.Tensor:
        return adversarial_grads(2 * 3 * 4 * 5, seed).view(2, 3, 4, 5)

    def channels_last(value):
        return value.contiguous(memory_format=torch.channels_last)

    def strided(value):
        return torch.stack((value, value), dim=-1)[..., 0]

    layouts = [
        lambda value: value,
        channels_last,
        strided,
        lambda value: value.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    results = []
    for of_weight in layouts:
        for of_grad in layouts:
            operand = make_operand("bfloat16+tail", torch.float32, 2, torch.float32, 120, 1)
            shaped = operand._replace(
                weight=of_weight(operand.weight.view(2, 3, 4, 5)),
                tail=operand.tail.view(2, 3, 4, 5),
                grad=of_grad(image(seed=3)),
                moments=tuple(of_weight(moment.view(2, 3, 4, 5)) for moment in operand.moments),
                # these are of one order in memory
                checksums=None,
            )
            strides = shaped.weight.stride()
            kernels.update(ADAMW, [shaped], [SETTINGS["adamw"]], ONE, FALSE, backend)
            assert shaped.weight.stride() == strides
            results.append([tensor.contiguous().flatten() for tensor in (shaped.weight, shaped.tail, *shaped.moments)])
    assert len(results) == 16
    for result in results[1:]:
        assert all(
            torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(result, results[0], strict=True)
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_of_gradients_in_any_layout(backend):
    grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = grad.double().square().sum().item()
    for one in (grad, grad.t(), torch.stack((grad, grad), -1)[..., 0], grad[:1].expand(3, 8), grad[::2, 1::3]):
        total, _ = kernels.grad_stats([one], ONE, backend)
        assert total.item() == pytest.approx(one.double().square().sum().item(), rel=1e-12)
    assert kernels.grad_stats([grad], ONE, backend)[0].item() == pytest.approx(expected, rel=1e-12)
