"""A run whose loss is not finite ends with the name of the operation and the line where the first such value arose."""

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import NonFiniteLoss
from duotone.torch.watching.non_finite import NonFiniteSearch

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    """Overflows, divides 0 by 0, or does neither, in its second layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 4), Layer(how), how

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((2, 4), -torch.inf).triu(1)
        return self.second((self.first(x) + mask).softmax(-1)).mean()


class Layer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.how == "overflow":
            return (x.abs() + 1) * 60000 * 60000
        if self.how == "in place":
            return x.abs().mul_(0).log_().relu()
        return x.sub(x).div(x - x) if self.how == "divide" else x


FOUND = {
    "overflow": ("mul", 34),
    "in place": ("log_", 36),
    "divide": ("div", 37),
}


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
@pytest.mark.parametrize("how", FOUND)
def test_the_operation_and_its_line_are_found(how, policy):
    if (how, policy) == ("overflow", "bf16"):
        pytest.skip("BF16 holds it")
    search = NonFiniteSearch()
    dt.cast(Model(how), policy)(torch.ones(2, 4))
    name, line = FOUND[how]
    found = search.end()
    assert found is not None
    assert f'.{name} in module "second" at ' in found
    assert found.endswith(f"test_non_finite.py:{line}")


def test_products_that_overflow_are_named_as_they_were_called():
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "fp16")
    with torch.no_grad():
        model[1].weight.fill_(60000)
    search = NonFiniteSearch()
    model(torch.full((1, 4), 1000.0))
    assert 'linear in module "1" at ' in str(search.end())


def test_weights_and_inputs_are_named():
    model = Model("nothing")
    with torch.no_grad():
        model.second.linear.bias[1] = torch.nan
    search = NonFiniteSearch()
    model(torch.ones(2, 4))
    assert search.end() == 'the weight "second.linear.bias" is not finite'
    search = NonFiniteSearch()
    model(torch.full((2, 4), torch.nan))
    assert search.end() == "an input of Model is not finite"


def test_masks_and_finite_models_are_nothing_and_a_search_ends_by_itself():
    search = NonFiniteSearch()
    model = Model("nothing")
    for _ in range(20):
        model(torch.ones(2, 4))
    assert search.found is None
    assert not search._hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_the_error_says_it(patience):
    model = dt.cast(Model("divide"), "fp16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    scaler = dt.LossScaler("fp16", patience=patience)

    def train() -> None:
        for _ in range(9):
            scaler.backward(model(torch.ones(2, 4)))
            scaler.step(optimizer)
            optimizer.zero_grad()

    # one skipped step is too short for a search
    where = r'not the loss scale; the first such value arises in .*div in module "second" at .*:37; look at the data'
    with pytest.raises(NonFiniteLoss, match=where if patience > 1 else "not the loss scale; look at the data"):
        train()
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_search_ends_with_its_scaler():
    model = dt.cast(Model("divide"), "bf16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    scaler = dt.LossScaler("bf16", patience=2)
    scaler.backward(model(torch.ones(2, 4)))
    scaler.step(optimizer)
    assert torch.nn.modules.module._global_forward_pre_hooks
    del scaler
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_loss_that_is_finite_again_ends_the_search():
    model = dt.cast(Model("nothing"), "bf16")
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    scaler = dt.LossScaler("bf16", patience=2)
    for factor in (torch.inf, 1.0):
        scaler.backward(model(torch.ones(2, 4)) * factor)
        scaler.step(optimizer)
        optimizer.zero_grad()
    assert not torch.nn.modules.module._global_forward_pre_hooks
