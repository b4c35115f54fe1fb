"""Every norm in a cast model under vmap, batched gradients and the transforms of torch.func, against FP64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import duotone.torch as dt

# torch says so of RMSNorm on FP32 weights
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch, given": lambda: nn.BatchNorm1d(4).eval(),
    "batch, plain": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance, given": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
    "instance, plain": lambda: nn.InstanceNorm1d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "group, plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "layer": lambda: nn.LayerNorm(4),
    "layer, plain": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(4),
    "rms, plain": lambda: nn.RMSNorm(4, elementwise_affine=False),
}


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv1d(4, 4, 1), NORMS[name](), nn.Conv1d(4, 1, 1)
        self.is_of_rows = name.startswith(("layer", "rms"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(x.mT).mT if self.is_of_rows else self.norm(x))


class Case:
    """A model, its parameters and data, and functions of them."""

    def __init__(self, model: Model, x: Tensor) -> None:
        self.model, self.x, self.params = model, x, dict(model.named_parameters())

    def of_params(self, params: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, params, (self.x,))

    def loss(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, params, (x,)).square().sum()

    def of_weight(self, weight: Tensor) -> Tensor:
        return self.loss({**self.params, "first.weight": weight}, self.x)

    def two(self) -> dict[str, Tensor]:
        return {
            name: torch.stack([param.detach(), 1.5 * param.detach()]).requires_grad_()
            for name, param in self.params.items()
        }

    def each_row(self) -> tuple[Tensor, list[Tensor], Tensor]:
        y = self.model(self.x).flatten()
        return y, list(self.params.values()), torch.eye(len(y), dtype=y.dtype)


def batched_gradients(case: Case) -> Any:
    y, params, rows = case.each_row()
    return vmap(lambda row: torch.autograd.grad(y, params, row, retain_graph=True))(rows)


def batched_by_autograd(case: Case) -> Any:
    y, params, rows = case.each_row()
    return torch.autograd.grad(y, params, rows, is_grads_batched=True)


def ensemble(case: Case) -> Any:
    params = case.two()
    vmap(case.of_params)(params).square().sum().backward()
    return [param.grad for param in params.values()]


def with_tangents(case: Case) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(case.model(forward_ad.make_dual(case.x, case.x.roll(1)))).tangent


def twice(case: Case) -> Any:
    (once,) = torch.autograd.grad(case.loss(case.params, case.x), case.params["first.weight"], create_graph=True)
    return torch.autograd.grad(once.square().sum(), list(case.params.values()), allow_unused=True)


WAYS: dict[str, Callable[[Case], Any]] = {
    "vmap(autograd.grad)": batched_gradients,
    "is_grads_batched": batched_by_autograd,
    "jacobian": lambda case: jacobian(case.model, case.x, vectorize=True),
    "create_graph": twice,
    "tangents": with_tangents,
    "ensemble": ensemble,
    "vmap": lambda case: vmap(case.model)(torch.stack([case.x, case.x + 1])),
    "grad": lambda case: grad(case.loss)(case.params, case.x),
    "vmap(grad)": lambda case: vmap(lambda x: grad(case.loss)(case.params, x))(torch.stack([case.x, case.x.roll(1)])),
    "jacrev": lambda case: jacrev(case.of_params)(case.params),
    "jvp": lambda case: jvp(case.model, (case.x,), (case.x.roll(1),)),
    "hessian": lambda case: hessian(case.of_weight)(case.params["first.weight"]),
    "jacrev(jacrev)": lambda case: jacrev(jacrev(case.of_weight))(case.params["first.weight"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NORMS)
def test_it_is_near_float64(name, way):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    exact = [leaf for leaf in tree_leaves(WAYS[way](Case(Model(name).double(), x.double()))) if leaf is not None]
    size = sum(leaf.square().sum() for leaf in exact)
    for policy, unit in (("bf16", 2**-8), ("fp16", 2**-11)):
        got = [leaf for leaf in tree_leaves(WAYS[way](Case(dt.cast(Model(name), policy), x))) if leaf is not None]
        error = sum((one.double() - leaf).square().sum() for one, leaf in zip(got, exact, strict=True))
        assert (error / size).sqrt() < 6 * unit, policy


def test_running_statistics_do_not_change_inside_of_transforms():
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "bf16")
    params = {name: param.detach() for name, param in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in-place"):
        grad(lambda params: functional_call(model, params, (torch.randn(3, 4),)).sum())(params)


class Lookups(nn.Module):
    """What else has a gradient of Duotone's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([0, 2, 2])
        x = self.linear(self.table(x))
        x = x[rows] + x[rows, rows][:, None] + x.index_select(0, rows) + x.take_along_dim(rows[:, None], 0)
        return F.cross_entropy(x / (x.norm(dim=-1, keepdim=True) + 1e-8), rows)


@pytest.mark.parametrize("policy", ["bf16", "bf16,residual=compute", "fp16"])
def test_forward_mode_derivatives_go_through_lookups(policy):
    tokens = torch.tensor([1, 1, 5])

    def derivatives(model: nn.Module) -> tuple[Tensor, Tensor]:
        params = {name: param.detach() for name, param in model.named_parameters()}
        tangents = {name: torch.linspace(-1, 1, p.numel()).view_as(p).to(p.dtype) for name, p in params.items()}

        def loss(params: dict[str, Tensor]) -> Tensor:
            return functional_call(model, params, (tokens,))

        first = jvp(loss, (params,), (tangents,))[1]
        return first, hessian(loss)(params)["table.weight"]["linear.weight"]

    for got, exact in zip(derivatives(dt.cast(Lookups(), policy)), derivatives(Lookups().double()), strict=True):
        assert (got.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["layer", "batch", "rms"])
def test_compiled_gradients_are_those_of_the_norm(name):
    # torch's compiler takes no notice of a function's own backward pass inside of transforms
    torch.compiler.reset()
    case = Case(dt.cast(Model(name), "bf16"), torch.linspace(-1, 2, 60).view(3, 4, 5).cos())
    expected = grad(case.loss)(case.params, case.x)
    got = torch.compile(lambda: grad(case.loss)(case.params, case.x), backend="eager")()
    for param, of_param in expected.items():
        torch.testing.assert_close(got[param], of_param, rtol=0.02, atol=0.02)
