"""Plain functions in cast models that torch.utils.checkpoint runs again: the same bits as without it."""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import duotone.torch as dt
from duotone.torch.casting.region import Region, RegionMode

KINDS = pytest.mark.parametrize("reentrant", [False, True])
HALVES = pytest.mark.parametrize("policy", ["bf16", "fp16"])


class Model(nn.Module):
    """Operations with rules in a method, which is no module, run by whatever is given."""

    def __init__(self, run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.inner, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.rand(5, 6))
        self.run = run

    def part(self, x: Tensor) -> Tensor:
        """Return what the method computes."""
        hidden = F.linear(x, self.up.weight, self.up.bias).exp()
        hidden = F.rms_norm(hidden * hidden.bfloat16().sum(-1, keepdim=True), (6,))
        # an index's gradient is a sum
        hidden = hidden + self.table[torch.tensor([0, 1, 1, 1])]
        with dt.keep_float32():
            wide = hidden @ self.inner.weight.T
        return self.inner(hidden).exp() + wide.square()

    def forward(self, x: Tensor) -> Tensor:
        """Return a sum."""
        return self.run(self.part, x).sum()


def gradients(policy: str, run, *, compiled: bool = False) -> list[Tensor]:
    model = dt.cast(Model(run), policy)
    torch.compiler.reset()
    data = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
    # a gradient of 1 is never rounded
    loss = (torch.compile(model, backend="aot_eager") if compiled else model)(data)
    (loss / 3).backward()
    assert _get_current_function_mode_stack() == []
    assert not torch.is_autocast_enabled("cpu")
    grads = data.grad, *(param.grad for param in model.parameters())
    return [loss, *(grad for grad in grads if grad is not None)]


def plainly(part, x: Tensor) -> Tensor:
    return part(x)


def nested(part, x: Tensor, reentrant: bool) -> Tensor:
    def outer(data: Tensor) -> Tensor:
        return checkpoint(part, data.exp(), use_reentrant=reentrant) * 1.5

    return checkpoint(outer, x, use_reentrant=reentrant)


def nested_plainly(part, x: Tensor) -> Tensor:
    return part(x.exp()) * 1.5


def selectively(part, x: Tensor) -> Tensor:
    def choose(context, operation, *args, **kwargs):
        saved = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    return checkpoint(part, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize(
    ("compiled", "reentrant", "policy"),
    [
        *((False, reentrant, policy) for reentrant in (False, True) for policy in ("bf16", "fp16")),
        (True, True, "bf16"),
        (True, False, "fp16"),
        pytest.param(True, True, "fp16", marks=pytest.mark.slow),
        pytest.param(True, False, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_checkpointed_method_has_the_same_gradients(compiled, reentrant, policy, same_bits):
    run = functools.partial(checkpoint, use_reentrant=reentrant)
    expected = gradients(policy, plainly, compiled=compiled)
    assert all(map(same_bits, gradients(policy, run, compiled=compiled), expected))


@HALVES
@KINDS
def test_one_inside_of_another(reentrant, policy, same_bits):
    expected = gradients(policy, nested_plainly)
    assert all(map(same_bits, gradients(policy, functools.partial(nested, reentrant=reentrant)), expected))


@HALVES
def test_a_choice_of_operations(policy, same_bits):
    assert all(map(same_bits, gradients(policy, selectively), gradients(policy, plainly)))


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_of_many_terms_does_not_stall(compiled, reentrant):
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            def part(x: Tensor) -> Tensor:
                return x + self.bias[torch.zeros(4000, dtype=torch.long)]

            return checkpoint(part, x, use_reentrant=reentrant).float().sum()

    torch.compiler.reset()
    model = dt.cast(Biased(), "bf16")
    (torch.compile(model, backend="eager") if compiled else model)(torch.zeros(4000, 1, requires_grad=True)).backward()
    # the nearest of BF16's to 4000; sums that are rounded after every term stay at 256
    assert model.bias.grad is not None
    assert model.bias.grad.item() == 4000


@KINDS
def test_a_mode_is_entered_once(reentrant):
    modes = []

    def run(part, x: Tensor) -> Tensor:
        def noting(x: Tensor) -> Tensor:
            result = part(x)
            modes.append([type(mode) for mode in _get_current_function_mode_stack()])
            return result.exp().sin()

        return checkpoint(noting, x, use_reentrant=reentrant)

    gradients("bf16", run)
    assert modes == [[RegionMode]] * 2


@KINDS
def test_what_a_function_enters_itself_does_not_hold_around_it(reentrant):
    seen = []

    def part(x: Tensor) -> Tensor:
        with Region(torch.bfloat16).on("cpu"):
            y = x.exp()
            with torch.no_grad():
                y.sin()
        seen.append(len(_get_current_function_mode_stack()))
        # torch.autocast's rule on a CPU is another than that of a region
        result = x.bfloat16().exp()
        seen.append(result.dtype)
        return (y + result).sin()

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = checkpoint(part, x, use_reentrant=reentrant)
    result.sum().backward()
    assert seen == [0, torch.bfloat16] * 2


@pytest.mark.parametrize(("policy", "reentrant"), itertools.product(["bf16", "fp16"], [False, True]))
def test_a_checkpointed_module_that_checkpoints(policy, reentrant, same_bits):
    found = []
    for run in (plainly, functools.partial(checkpoint, use_reentrant=reentrant)):
        model = dt.cast(nn.Sequential(Model(run)), policy)
        if run is not plainly:
            dt.checkpoint_activations(model, "0")
        model(torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()).backward()
        found.append([param.grad for param in model.parameters()])
    assert all(map(same_bits, *found))
