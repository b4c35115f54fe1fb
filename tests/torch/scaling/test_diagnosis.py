"""Which gradients are not finite, under which names, in which order, and the sentence a run ends with."""

import copy
import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleCollapse, NonFiniteLoss
from duotone.loss_scale import LossScale
from duotone.torch.scaling.diagnosis import collapse_error, loss_at, non_finite_gradients, non_finite_loss_error

WITHOUT_NAME = "keep the part that overflows in FP32 by a rule, look for a division by 0"


def two_layers():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))


def with_gradients(model, *bad, value=math.inf):
    """Give every parameter a gradient, in which the named ones are not finite at one place."""
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        if name in bad:
            parameter.grad.view(-1)[-1] = value
    return model


@pytest.mark.parametrize("policy", ["fp16", "bf16", "fp16-mixed"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_names_are_those_of_the_cast_model(policy, value):
    model = with_gradients(dt.cast(two_layers(), policy), "0.bias", "1.0.weight", value=value)
    assert non_finite_gradients([dt.SGD(model.parameters())]) == (["0.bias", "1.0.weight"], 4)
    assert non_finite_gradients([dt.SGD(copy.deepcopy(model).parameters())]) == ([], 0)


def test_a_copy_of_a_cast_model_has_its_names():
    model = with_gradients(copy.deepcopy(dt.cast(two_layers(), "bf16")), "1.0.bias")
    assert non_finite_gradients([dt.SGD(model.parameters())]) == (["1.0.bias"], 4)


@pytest.mark.parametrize("several", [False, True])
def test_the_order_is_the_model_s_however_parameters_are_grouped(several):
    model = with_gradients(dt.cast(two_layers(), "bf16"), "0.bias", "1.0.weight")
    # decayed and other parameters are grouped apart in most training scripts: the weights come last here
    groups = [
        [param for param in model.parameters() if param.ndim == 1],
        [param for param in reversed(list(model.parameters())) if param.ndim == 2],
    ]
    optimizers = [dt.SGD(params) for params in groups[::-1]] if several else [dt.SGD([{"params": p} for p in groups])]
    assert non_finite_gradients(optimizers) == (["0.bias", "1.0.weight"], 4)


def test_names_that_the_optimizer_was_given_and_places():
    model = with_gradients(two_layers(), "0.weight", "1.0.bias")
    named = list(model.named_parameters())
    split = [{"params": named[:1]}, {"params": named[1:]}]
    assert non_finite_gradients([torch.optim.SGD(split)]) == (["0.weight", "1.0.bias"], 4)
    unnamed = [{"params": list(model.parameters())[:1]}, {"params": list(model.parameters())[1:]}]
    names = ["parameter 0 (3, 2)", "parameter 3 (1,)"]
    assert non_finite_gradients([torch.optim.SGD(unnamed)]) == (names, 4)


def test_parameters_without_a_gradient_do_not_count():
    model = with_gradients(two_layers(), "0.weight")
    model[1][0].bias.grad = None
    model[0].bias.grad = None
    assert non_finite_gradients([torch.optim.SGD(model.named_parameters())]) == (["0.weight"], 2)
    assert non_finite_gradients([]) == ([], 0)


@pytest.mark.parametrize(("value", "names"), [(math.inf, ["weight"]), (1.0, [])])
def test_a_sparse_gradient(value, names):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().mul(value).backward()
    assert non_finite_gradients([torch.optim.SGD(embedding.named_parameters())]) == (names, 1)


def test_what_a_sparse_gradient_sums_up_to_is_what_counts():
    embedding = nn.Embedding(2, 1, sparse=True)
    largest = torch.full((2, 1), 3e38)
    embedding.weight.grad = torch.sparse_coo_tensor([[1, 1]], largest, (2, 1))
    assert non_finite_gradients([torch.optim.SGD(embedding.named_parameters())]) == (["weight"], 1)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a"], "1 of 12 gradients are not finite (a); "),
        (["a", "b"], "2 of 12 gradients are not finite (a, b); "),
        (["a", "b", "c"], "3 of 12 gradients are not finite (a, b, c); "),
        ([*"abcdefghij"], "10 of 12 gradients are not finite (a, b, ..., j); "),
    ],
)
def test_a_few_names_are_shown_and_always_the_last(names, shown):
    error = collapse_error(names, 12, 50, 2.0**10, LossScale())
    assert isinstance(error, LossScaleCollapse)
    assert str(error).startswith(f"50 steps in a row were skipped, the last at loss scale 1024: {shown}{WITHOUT_NAME}")


def test_the_module_is_that_of_the_last_name_and_the_rule_can_be_followed():
    text = str(collapse_error(["0.weight", "1.0.weight"], 4, 17, 1.0, LossScale()))
    assert 'met the first in "1.0": keep that in FP32 by a rule, ' in text
    assert 'met the first in "1.0", or in what comes after it' in str(
        collapse_error(["0.weight", "1.0.weight"], 2, 17, 1.0, LossScale())
    )
    rule = text.split('by a rule, "')[1].split('"', maxsplit=1)[0]
    for policy in ("fp16", "fp16-mixed"):
        model = dt.cast(two_layers(), f"{policy}; {rule}")
        assert [param.dtype for param in model[1].parameters()] == [torch.float32] * 2
    assert "a rule" in str(collapse_error(["parameter 3 (64, 64)"], 4, 17, 1.0, LossScale()))
    assert "met the first" not in str(collapse_error(["parameter 3 (64, 64)"], 4, 17, 1.0, LossScale()))


@pytest.mark.parametrize(
    ("scale", "settings", "where"),
    [
        (1.0, LossScale(), "the last at loss scale 1, its floor: "),
        (2.0, LossScale(), "the last at loss scale 2: "),
        (8.0, LossScale.static(8.0), "the last at loss scale 8: "),
        (1.0, LossScale.none(), "the last at no loss scale: "),
    ],
)
def test_where_the_scale_was(scale, settings, where):
    assert where in str(collapse_error(["a"], 1, 50, scale, settings))


def test_a_loss_is_named_by_step_and_place():
    error = non_finite_loss_error(12, 3, 50)
    assert isinstance(error, NonFiniteLoss)
    assert str(error).startswith("50 steps in a row were skipped, and loss 3 of step 12 is not finite: ")
    assert loss_at(12, None) == "a loss of step 12 on another rank"
