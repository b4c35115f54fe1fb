"""Which optimizers can be wrapped, and that a wrapped one is not used by itself."""

import copy

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError

from .other_optimizers import Around, HoldsWeights


def test_an_optimizer_that_wraps_another_itself_is_fine():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    dt.MasterWeights(Around([weight], lr=0.25)).step()
    assert weight.tolist() == [0.75, 0.75]


def test_the_wrapped_optimizer_is_not_stepped_or_loaded_by_itself():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = dt.MasterWeights(torch.optim.NAdam([weight]))
    for made in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(
            OptimizerError, match=r"this NAdam is wrapped in MasterWeights.*step, save and load the Mas"
        ):
            made.optimizer.step()
        with pytest.raises(OptimizerError, match="this NAdam is wrapped in MasterWeights"):
            made.optimizer.load_state_dict(made.optimizer.state_dict())


def of_policy(policy: str) -> list[nn.Parameter]:
    return list(dt.cast(nn.Linear(2, 1), policy).parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.LBFGS(of_policy("bf16")), "LBFGS cannot be wrapped.*evaluates the model many times.*FP32"),
        (
            lambda: torch.optim.SparseAdam(of_policy("bf16")),
            r"SparseAdam cannot.*sparse gradients only; use torch\.optim",
        ),
        (lambda: HoldsWeights(of_policy("bf16")), "HoldsWeights cannot.*in its attribute names, outside of its param"),
        (lambda: dt.AdamW(of_policy("bf16")), "AdamW keeps FP32 masters already; use it as it is"),
        (lambda: dt.MasterWeights(torch.optim.SGD(of_policy("bf16"))), "MasterWeights keeps FP32 masters already"),
        (lambda: of_policy("bf16"), r"wraps a torch\.optim\.Optimizer, but this is a list; build one first"),
        (
            lambda: torch.optim.SGD([nn.Parameter(torch.ones(1).double())]),
            r"cannot update a parameter in torch\.float64",
        ),
        (
            lambda: torch.optim.SGD(of_policy("bf16,state=bf16")),
            r"the policy keeps moments in torch\.bfloat16, but SGD in MasterWeights keeps them in float32; use",
        ),
    ],
)
def test_what_cannot_be_wrapped_is_named(make, message):
    optimizer = make()
    with pytest.raises(OptimizerError, match=message):
        dt.MasterWeights(optimizer)
    if isinstance(optimizer, torch.optim.SGD):
        # it may still be used by itself
        optimizer.step()


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 3, sparse=True)
    optimizer = dt.MasterWeights(torch.optim.SGD([dense, embedding.weight], lr=1.0))
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match=r"takes no sparse gradients; use Embedding\(sparse=False\)"):
        optimizer.step()
    assert dense.tolist() == [1.0, 1.0]
