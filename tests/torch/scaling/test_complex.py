"""Complex parameters beside Duotone's optimizers: the way that the refusal names, with both scalers and prepare."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError

POLICIES = ["bf16", "fp16", "bf16-mixed", "fp16-mixed", "fp32"]


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.linear(x).float()) * self.filter, n=8)


def real(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if not param.is_complex()]


@pytest.mark.parametrize("make", [dt.AdamW, lambda params: dt.MasterWeights(torch.optim.NAdam(params))])
def test_the_refusal_names_a_way(make):
    message = r"cannot update a parameter in torch\.complex64.*both to the scaler: scaler\.step\(optimizer, other\)"
    with pytest.raises(OptimizerError, match=message):
        make(dt.cast(Spectral(), "bf16").parameters())
    model = Spectral()
    with pytest.raises(OptimizerError, match=message):
        dt.prepare(model, torch.optim.AdamW(model.parameters()), "bf16")
    assert dt.policy_of(model) is None


def expected_filter(x: torch.Tensor, model: nn.Module, clip_norm: float) -> torch.Tensor:
    """Return what a step of SGD with a clipped true gradient makes of the filter."""
    gradient = torch.autograd.grad(model(x).square().mean(), model.filter)[0]
    factor = min(1.0, clip_norm / gradient.norm().item())
    return (model.filter - 0.1 * factor * gradient).detach()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_scaler_steps_both(policy):
    x, model = torch.randn(4, 8), Spectral()
    model, optimizer, scaler = dt.prepare(model, torch.optim.AdamW(real(model)), policy)
    expected = expected_filter(x, model, clip_norm=0.1)
    other = torch.optim.SGD([model.filter], lr=0.1)
    scaler.backward(model(x).square().mean())
    report = scaler.step(optimizer, other, clip_norm=0.1)
    assert not report.skipped
    assert (model.filter - expected).abs().max() < 1e-5
    before = model.filter.detach().clone()
    # what overflows is skipped whole
    model.filter.grad = torch.full_like(model.filter, complex(0.0, torch.inf))
    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer, other).skipped_each[1]
    assert torch.equal(model.filter, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_grad_scaler_steps_both(policy):
    x, model = torch.randn(4, 8), dt.cast(Spectral(), policy)
    optimizer, other = dt.AdamW(real(model)), torch.optim.SGD([model.filter], lr=0.1)
    scaler = dt.GradScaler("cpu", init_scale=2.0**10)
    expected = expected_filter(x, model, clip_norm=torch.inf)
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer), scaler.step(other), scaler.update()
    assert (model.filter - expected).abs().max() < 1e-5
    before = model.filter.detach().clone()
    model.filter.grad = torch.full_like(model.filter, complex(0.0, torch.inf))
    scaler.scale(torch.ones(()))
    scaler.step(other), scaler.update()
    assert torch.equal(model.filter, before)
    assert scaler.get_scale() == 2.0**9
