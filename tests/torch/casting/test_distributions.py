"""Every class of torch.distributions with 16-bit parameters in a region: as in FP32, values and gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D

import duotone.torch as dt
from duotone.errors import OperationError
from duotone.torch.casting.region import Region
from duotone.torch.internals import autograd

from .op_by_hand import NARROW

pytestmark = pytest.mark.filterwarnings("ignore")


def positive(*shape: int, seed: int = 0, low: float = 0.25) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.6 + low


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(10 + seed))


def definite(size: int) -> Tensor:
    root = real(size, size) / 2
    return root @ root.mT + size * torch.eye(size)


TRIANGLE = torch.linalg.cholesky(definite(3))
TEMPERATURE = torch.tensor(0.75)
# how a distribution is made, and of what; a second one, for the divergence, of the same in another order of items
CLASSES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "Bernoulli": (D.Bernoulli, (positive(5),)),
    "Bernoulli, logits": (lambda x: D.Bernoulli(logits=x), (real(5),)),
    "Beta": (D.Beta, (positive(5) * 4, positive(5, seed=1) * 4)),
    "Binomial": (lambda p: D.Binomial(10, p), (positive(5),)),
    "Binomial, logits": (lambda x: D.Binomial(10, logits=x), (real(5),)),
    "Categorical": (D.Categorical, (positive(5, 4),)),
    "Categorical, logits": (lambda x: D.Categorical(logits=x), (real(5, 4),)),
    "Cauchy": (D.Cauchy, (real(5), positive(5))),
    "Chi2": (D.Chi2, (positive(5) * 8,)),
    "ContinuousBernoulli": (D.ContinuousBernoulli, (torch.tensor([0.1, 0.2, 0.8, 0.9, 0.95]),)),
    "Dirichlet": (D.Dirichlet, (positive(5, 4) * 4,)),
    "Exponential": (D.Exponential, (positive(5),)),
    "FisherSnedecor": (D.FisherSnedecor, (positive(5) * 9, positive(5, seed=1) * 20)),
    "Gamma": (D.Gamma, (positive(5) * 2, positive(5, seed=1))),
    "Geometric": (D.Geometric, (positive(5),)),
    "Geometric, logits": (lambda x: D.Geometric(logits=x), (real(5),)),
    "Gumbel": (D.Gumbel, (real(5), positive(5))),
    "HalfCauchy": (D.HalfCauchy, (positive(5),)),
    "HalfNormal": (D.HalfNormal, (positive(5),)),
    "Independent": (lambda m, s: D.Independent(D.Normal(m, s), 1), (real(5, 4), positive(5, 4))),
    "InverseGamma": (D.InverseGamma, (positive(5) * 4, positive(5, seed=1))),
    "Kumaraswamy": (D.Kumaraswamy, (positive(5) + 1, positive(5, seed=1) + 1)),
    "LKJCholesky": (lambda x: D.LKJCholesky(3, x), (positive(2),)),
    "Laplace": (D.Laplace, (real(5), positive(5))),
    "LogNormal": (D.LogNormal, (real(5), positive(5))),
    "LogisticNormal": (D.LogisticNormal, (real(5, 3), positive(5, 3))),
    "LowRankMultivariateNormal": (
        D.LowRankMultivariateNormal,
        (real(5, 4), real(5, 4, 2, seed=1), positive(5, 4)),
    ),
    "MixtureSameFamily": (
        lambda x, m, s: D.MixtureSameFamily(D.Categorical(logits=x), D.Normal(m, s)),
        (real(5, 3), real(5, 3, seed=1), positive(5, 3)),
    ),
    "Multinomial": (lambda p: D.Multinomial(10, p), (positive(5, 4),)),
    "MultivariateNormal": (D.MultivariateNormal, (real(3), definite(3))),
    "MultivariateNormal, triangle": (lambda m, t: D.MultivariateNormal(m, scale_tril=t), (real(3), TRIANGLE)),
    "MultivariateNormal, precision": (
        lambda m, p: D.MultivariateNormal(m, precision_matrix=p),
        (real(3), definite(3)),
    ),
    "NegativeBinomial": (D.NegativeBinomial, (positive(5) * 5, positive(5, seed=1))),
    "Normal": (D.Normal, (real(5), positive(5))),
    "OneHotCategorical": (D.OneHotCategorical, (positive(5, 4),)),
    "OneHotCategoricalStraightThrough": (lambda x: D.OneHotCategoricalStraightThrough(logits=x), (real(5, 4),)),
    "Pareto": (D.Pareto, (positive(5), positive(5, seed=1) * 4 + 2)),
    "Poisson": (D.Poisson, (positive(5) * 6,)),
    "RelaxedBernoulli": (lambda x: D.RelaxedBernoulli(TEMPERATURE, logits=x), (real(5),)),
    "RelaxedOneHotCategorical": (lambda x: D.RelaxedOneHotCategorical(TEMPERATURE, logits=x), (real(5, 4),)),
    "StudentT": (D.StudentT, (positive(5) * 6 + 2, real(5), positive(5, seed=1))),
    "TransformedDistribution": (
        lambda m, s: D.TransformedDistribution(D.Normal(m, s), [D.TanhTransform(cache_size=1)]),
        (real(5) / 2, positive(5) / 2),
    ),
    "Uniform": (lambda low, size: D.Uniform(low, low + size), (real(5), positive(5))),
    "VonMises": (D.VonMises, (real(5), positive(5) * 4)),
    "Weibull": (D.Weibull, (positive(5), positive(5, seed=1) + 1)),
    "Wishart": (lambda x: D.Wishart(torch.tensor(5.0), x), (definite(3),)),
}
WHAT = ("sample", "log_prob", "entropy", "mean", "variance", "kl")
# off by more than a few roundings, and why
MORE = {
    ("ContinuousBernoulli", "variance"): "differences of 16-bit probabilities that cancel, as under torch.amp",
    ("LowRankMultivariateNormal", "log_prob"): "differences of products, each in 16 bits, as under torch.amp",
    ("LowRankMultivariateNormal", "kl"): "the same",
}
# whose values add up to 1, or are triangles of such, which rounded ones do not
IN_FLOAT32 = ("Beta", "Dirichlet", "LKJCholesky", "LogisticNormal", "RelaxedOneHotCategorical")


def ask(make: Callable[..., Any], given: tuple[Tensor, ...], context: Any, value: Tensor) -> dict[str, Any]:
    """Return what a distribution answers, with gradients, where torch has an answer."""
    leaves = [each.clone().requires_grad_() for each in given]
    answers: dict[str, Any] = {}
    with context():
        one = make(*leaves)
        other = make(*(each.flip(0) if each.shape[0] == 5 else each for each in given))
        torch.manual_seed(0)
        calls: dict[str, Callable[[], Tensor]] = {
            "sample": lambda: one.rsample() if one.has_rsample else one.sample(),
            "log_prob": lambda: one.log_prob(value),
            "entropy": one.entropy,
            "mean": lambda: one.mean,
            "variance": lambda: one.variance,
            "kl": lambda: D.kl_divergence(one, other),
        }
        for what in WHAT:
            try:
                answer = calls[what]()
            except NotImplementedError as error:
                # a kernel that is missing is no such thing
                if "not implemented for" in str(error):
                    raise
                continue
            grads = ()
            if isinstance(answer, Tensor) and answer.requires_grad:
                grads = torch.autograd.grad(answer.float().sum(), leaves, allow_unused=True, retain_graph=True)
            answers[what] = answer, grads
    return answers


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CLASSES)
def test_it_answers_as_in_float32(name, dtype):
    make, given = CLASSES[name]
    torch.manual_seed(1)
    value = make(*given).sample()
    value = value.to(dtype).float() if value.is_floating_point() and name not in IN_FLOAT32 else value
    narrow = value.to(dtype) if value.is_floating_point() and name not in IN_FLOAT32 else value
    rounded = tuple(each.to(dtype).float() for each in given)
    exact = ask(make, rounded, nullcontext, value)
    got = ask(make, tuple(each.to(dtype) for each in given), lambda: Region(dtype).on("cpu"), narrow)
    assert got.keys() == exact.keys()
    for what, (answer, grads) in exact.items():
        if what == "sample" or (name, what) in MORE:
            # draws of another dtype are other draws
            assert got[what][0].isfinite().all()
            assert all(grad is None or grad.isfinite().all() for grad in got[what][1])
            continue
        for one, other in zip((got[what][0], *got[what][1]), (answer, *grads), strict=True):
            assert (one is None) is (other is None)
            if one is None or not other.isfinite().all():
                continue
            assert (one.float() - other).norm() <= 12 * torch.finfo(dtype).eps * (other.norm() + 0.1), what


def test_a_sample_of_a_dirichlet_distribution_is_that_of_float32():
    concentration = (positive(4, 3) * 5).bfloat16().requires_grad_()
    wide = concentration.detach().float().requires_grad_()
    torch.manual_seed(0)
    with Region(torch.bfloat16).on("cpu"):
        got = D.Dirichlet(concentration).rsample()
    torch.manual_seed(0)
    expected = D.Dirichlet(wide).rsample()
    assert torch.equal(got, expected)
    weights = torch.linspace(-1, 1, 3)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(concentration.grad, wide.grad.bfloat16())


def test_a_sample_without_a_gradient_needs_none():
    with Region(torch.float16).on("cpu"):
        x = D.Beta(torch.ones(3).half(), torch.ones(3).half()).sample()
    assert x.dtype == torch.float32
    assert not x.requires_grad


def test_a_gradient_that_torch_does_not_let_be_taken_is_refused(monkeypatch):
    monkeypatch.setattr(autograd, "_draw", None)
    concentration = torch.ones(3).half().requires_grad_()
    with Region(torch.float16).on("cpu"), pytest.raises(OperationError, match=r"no gradient in float16 here.*x\.float"):
        D.Dirichlet(concentration).rsample()


def test_a_policy_of_two_numbers_trains():
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = nn.functional.softplus(self.linear(x)).add(1).unbind(-1)
            beta = D.Beta(a, b)
            action = beta.rsample()
            return (beta.log_prob(action) * (action - 0.5) + 0.01 * beta.entropy()).mean()

    for policy in ("bf16", "fp16"):
        torch.manual_seed(0)
        model = dt.cast(Policy(), policy)
        model(torch.randn(8, 4)).backward()
        assert model.linear.weight.grad.isfinite().all()
        assert model.linear.weight.grad.abs().sum() > 0
