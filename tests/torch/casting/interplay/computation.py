"""What the tests of this folder compute: an operation of each kind, as user code writes it and with every cast by hand.

The casts by hand are the reference: they know nothing of Duotone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt

NARROW = [torch.bfloat16, torch.float16]
ROWS, WIDTH = 4, 6
TOKENS = torch.tensor([0, 3, 3, 1])
LABELS = torch.tensor([0, 2, 5, 1])
NAMES = ("product", "operator", "normal", "chances", "exponential", "total", "joined", "beside", "spread", "loss")
Results = dict[str, Tensor]


def data(rows: int = ROWS) -> Tensor:
    """Return FP32 values that 16 bits do not hold."""
    return torch.linspace(-1, 1, rows * WIDTH).view(rows, WIDTH) / 3


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return a matrix, a scale, and a table to look up in."""
    values = (
        torch.linspace(-0.7, 0.9, WIDTH * WIDTH).view(WIDTH, WIDTH).sin(),
        torch.linspace(0.4, 1.7, WIDTH),
        torch.linspace(1, 0.3, 4 * WIDTH).view(4, WIDTH).cos(),
    )
    return [value.to(dtype).requires_grad_() for value in values]


def compute(
    x: Tensor, weight: Tensor, scale: Tensor, table: Tensor, tokens: Tensor = TOKENS, labels: Tensor = LABELS
) -> Results:
    """Call an operation of each kind, through functions, methods and operators."""
    product = F.linear(x, weight)
    operator = product @ weight.T
    normal = F.layer_norm(product, (WIDTH,), scale)
    chances = product.softmax(-1)
    exponential = torch.exp(operator)
    total = normal.sum(-1)
    joined = torch.cat([exponential, chances])
    beside = product * 2 + F.embedding(tokens, table)
    spread = (product.square().mean(-1) + 1e-6).rsqrt()
    loss = F.cross_entropy(operator, labels) + joined.mean() + total.square().mean() + spread.log().mean()
    results = (product, operator, normal, chances, exponential, total, joined, beside, spread, loss)
    return dict(zip(NAMES, results, strict=True))


def by_hand(dtype: torch.dtype, x: Tensor, weight: Tensor, scale: Tensor, table: Tensor) -> Results:
    """Compute the same with the casts written out, products rounded once from FP32's."""

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        return (left.to(dtype).float() @ right.to(dtype).float().T).to(dtype)

    product = multiply(x, weight)
    operator = multiply(product, weight)
    normal = F.layer_norm(product.float(), (WIDTH,), scale.float()).to(dtype)
    chances = product.float().softmax(-1).to(dtype)
    exponential = operator.float().exp()
    total = normal.float().sum(-1)
    joined = torch.cat([exponential, chances.float()])
    beside = product * 2 + table[TOKENS]
    spread = (product.float().square().mean(-1) + 1e-6).rsqrt()
    logits = operator.float()
    loss = F.cross_entropy(logits, LABELS) + joined.mean() + total.square().mean() + spread.log().mean()
    results = (product, operator, normal, chances, exponential, total, joined, beside, spread, loss)
    return dict(zip(NAMES, results, strict=True))


class Model(nn.Module):
    """The computation with parameters; gives its loss and keeps the results beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale, self.table = (nn.Parameter(each.detach()) for each in weights())
        self.results: Results = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss of rows of data."""
        results = compute(x, self.weight, self.scale, self.table)
        self.results = {name: result.detach() for name, result in results.items()}
        return results["loss"] + results["beside"].square().mean()


def cast_model(policy: str) -> Model:
    """Return a model in a policy whose embeddings give what they hold, as in autocast."""
    return dt.cast(Model(), f"{policy},residual=compute")


def loss_of(results: Results) -> Tensor:
    """Return a scalar that every weight has a part in."""
    return results["loss"] + results["beside"].square().mean()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, units: float = 2.0) -> None:
    """Check dtype and shape, and that values are within some units of a 16-bit format's last place."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=units * torch.finfo(dtype).eps, atol=units * torch.finfo(dtype).eps / 8)


def assert_right(got: Results, want: Results, dtype: torch.dtype) -> None:
    """Check every result's dtype, and its values up to the last place."""
    assert {name: each.dtype for name, each in got.items()} == {name: each.dtype for name, each in want.items()}
    for name in NAMES:
        assert_close(got[name].detach(), want[name].detach(), dtype)


def gradients(run: Callable[..., Results]) -> list[Tensor]:
    """Return the gradients of the data and the weights of what `run` computes of them."""
    leaves = [data().requires_grad_(), *weights()]
    # checkpoints of one kind know no torch.autograd.grad
    loss_of(run(*leaves)).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def exact_gradients() -> list[Tensor]:
    """Return those of FP64."""
    leaves = [each.detach().double().requires_grad_() for each in (data(), *weights())]
    return list(torch.autograd.grad(loss_of(compute(*leaves)), leaves))
