"""How the stand-in for torch.amp.GradScaler steps optimizers of every kind, and that nothing waits for the device."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import duotone.torch as dt
from duotone.torch.optim import MasterOptimizer
from duotone.torch.scaling import scale_alarm

SCALERS = pytest.mark.parametrize("kind", [torch.amp.GradScaler, dt.GradScaler], ids=["torch", "duotone"])


def parameter(grad):
    made = nn.Parameter(torch.ones(3))
    made.grad = torch.full_like(made, grad)
    return made


def ready(kind=dt.GradScaler):
    """Return a scaler that has scaled a loss."""
    scaler = kind("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    return scaler


def weight_of(optimizer):
    return optimizer.param_groups[0]["params"][0]


class TakesScale(torch.optim.Optimizer):
    """An optimizer that takes the scale out by itself and keeps what it was given."""

    def __init__(self):
        super().__init__([parameter(grad=4.0)], {})
        self._step_supports_amp_scaling = True

    def step(self, closure=None):
        self.seen = self.grad_scale, self.found_inf
        return "stepped"


class TakesScaler(TakesScale):
    """One that wants the scaler itself."""

    def step(self, closure=None, *, grad_scaler=None):
        self.seen = grad_scaler
        assert not hasattr(self, "grad_scale")
        grad_scaler.unscale_(self)


@SCALERS
def test_optimizers_that_take_the_scale_out_themselves(kind):
    scaler, optimizer = ready(kind), TakesScale()
    optimizer.grad_scale = torch.tensor(3.0)
    assert scaler.step(optimizer) == "stepped"
    assert (optimizer.seen[0].item(), optimizer.seen[1].item()) == (12.0, 0.0)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    unscaled = TakesScale()
    scaler.unscale_(unscaled)
    scaler.step(unscaled)
    assert unscaled.seen[0] is None
    scaler.update()
    assert scaler._get_growth_tracker() == 1


@SCALERS
def test_optimizers_that_want_the_scaler(kind):
    scaler, optimizer = ready(kind), TakesScaler()
    with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself") as caught:
        assert scaler.step(optimizer) is None
    assert caught[0].filename == __file__
    assert optimizer.seen is scaler
    assert weight_of(optimizer).grad[0] == 1.0
    scaler.update()


@SCALERS
def test_an_optimizer_that_wants_the_scaler_has_to_check(kind):
    class Careless(TakesScaler):
        def step(self, closure=None, *, grad_scaler=None):
            pass

    scaler = ready(kind)
    with pytest.warns(FutureWarning):
        scaler.step(Careless())
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()


def test_after_a_failed_fused_step_its_scalars_are_gone():
    class Failing(TakesScale):
        def step(self, closure=None):
            raise OSError

    scaler, optimizer = ready(), Failing()
    with pytest.raises(OSError, match=r"^$"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")


@SCALERS
def test_step_hands_on_arguments_and_results(kind):
    class Asking(torch.optim.SGD):
        def step(self, closure=None, *, extra=0):  # type: ignore[override]
            super().step()
            return extra + 1

    scaler, clean, bad = ready(kind), Asking([parameter(grad=4.0)]), Asking([parameter(grad=math.inf)])
    # Accelerate gives None for the closure
    assert scaler.step(clean, None, extra=4) == 5
    assert scaler.step(bad, extra=4) is None


@SCALERS
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_break_after_unscaling_are_not_checked_again(kind, fused):
    scaler, optimizer = ready(kind), torch.optim.AdamW([parameter(grad=1.0)], lr=1.0, fused=fused)
    scaler.unscale_(optimizer)
    weight_of(optimizer).grad.fill_(math.nan)
    scaler.step(optimizer)
    scaler.update()
    assert weight_of(optimizer).isnan().all()


class Own(MasterOptimizer):
    """An optimizer of Duotone's that keeps what it was given."""

    given: dict

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None, **given):  # type: ignore[override]
        self.given = given
        return "stepped"


def test_duotones_optimizers_take_the_scale_out_themselves():
    scaler, optimizer = ready(), Own([parameter(grad=8.0)])
    assert scaler.step(optimizer, None) == "stepped"
    assert (optimizer.given["grad_multiplier"].item(), optimizer.given["found_inf"].item()) == (0.25, False)
    assert optimizer.given["found_inf"].dtype == torch.bool
    assert weight_of(optimizer).grad[0] == 8.0
    scaler.update()
    scaler.unscale_(optimizer)
    weight_of(optimizer).grad[0] = math.inf
    scaler.step(optimizer)
    assert optimizer.given["grad_multiplier"] is None
    assert not optimizer.given["found_inf"]
    scaler.update()
    scaler.step(optimizer)
    assert optimizer.given["found_inf"]
    scaler.update()
    assert scaler.get_scale() == 2.0


class Nowhere:
    """A way to the host on which nothing arrives."""

    def send(self, values):
        assert values.shape == (1,)

    def receive(self):
        return None


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", ["fused", "own", "plain"])
def test_nothing_waits_for_the_device(make, unscale, monkeypatch):
    monkeypatch.setattr(scale_alarm, "Readback", Nowhere)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    # where there are no values, reading one raises
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3, device="cuda", dtype=torch.float16 if make == "own" else torch.float32))
        optimizer = Own([param]) if make == "own" else torch.optim.AdamW([param], fused=make == "fused")
        scaler = dt.GradScaler()
        for _ in range(3):
            scaler.scale(torch.ones((), device="cuda"))
            param.grad = torch.ones_like(param, requires_grad=False)
            if unscale:
                scaler.unscale_(optimizer)
            if make == "plain":
                with pytest.raises(DataDependentOutputException):
                    scaler.step(optimizer)
                return
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scaler.update(8.0)
