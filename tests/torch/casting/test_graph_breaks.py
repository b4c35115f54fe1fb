"""Compiled cast models whose graphs break: the bits, dtypes and gradients of eager execution, wherever they break."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import duotone.torch as dt
from duotone.torch.casting.tracing import not_by_itself

SLOW = pytest.mark.slow
TOKENS = torch.arange(26).view(2, 13) % 13


def break_here(x: Tensor, how: str) -> Tensor:
    if how == "graph_break":
        torch._dynamo.graph_break()
    elif how == "print":
        print(end="")  # noqa: T201
    elif how == "item":
        x = x * float(x.float().abs().sum().item() > 0)
    return x


class Block(nn.Module):
    """A block that breaks among operations with rules, or inside of one of the ways to say which rules hold."""

    def __init__(self, how: str, where: str) -> None:
        super().__init__()
        self.norm, self.mix, self.up = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.how, self.where = how, where

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream, `[batch, tokens, 16]`."""
        hidden = self.mix(self.norm(x))
        if self.where == "module":
            x = break_here(x, self.how)
        x = x + hidden.exp().tanh().to(x.dtype)
        if self.where == "keep_float32":
            with dt.keep_float32():
                wide = break_here(x, self.how) @ self.up.weight
                assert wide.dtype == torch.float32
            x = x + wide.tanh().to(x.dtype)
        if self.where == "op_rule":
            with dt.op_rule({torch.exp: "as_given"}):
                x = break_here(x, self.how).exp().tanh()
        return x + self.up(x).softmax(-1) * x.mean(-1, keepdim=True)


class Model(nn.Module):
    """Two blocks and a loss over positions and tokens."""

    def __init__(self, how: str, where: str) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(13, 16), nn.Embedding(13, 16)
        self.blocks = nn.ModuleList([Block(how, where), Block(how, where)])
        self.head = nn.Linear(16, 13)
        self.how, self.where = how, where

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and loss."""
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
            if self.where == "between":
                x = break_here(x, self.how)
        logits = self.head(x)
        log_probabilities = logits.log_softmax(-1)
        if self.where == "loss":
            log_probabilities = break_here(log_probabilities, self.how)
        return logits, F.nll_loss(log_probabilities.flatten(0, 1), tokens.flatten()) + logits.exp().sum() / 1000


def results(model: nn.Module, run) -> list[Tensor]:
    model.zero_grad()
    logits, loss = run(TOKENS)
    loss.backward()
    return [logits, loss, *(param.grad for param in model.parameters())]


def make(policy: str, how: str, where: str) -> Model:
    torch.manual_seed(0)
    return dt.cast(Model(how, where), policy)


def assert_same_compiled(model: nn.Module, same_bits, rtol: float = 0.0) -> None:
    torch.compiler.reset()
    expected = results(model, model)
    compiled = torch.compile(model, backend="eager")
    # the second call runs what the first one compiled
    for got in (results(model, compiled), results(model, compiled)):
        assert all(map(same_bits, got[:2], expected[:2]))
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            assert other.isfinite().all()
            assert (one.float() - other.float()).norm() <= rtol * other.float().norm()
    assert _get_current_function_mode_stack() == []
    assert not torch.is_autocast_enabled("cpu")


# gradients in FP16 are sums in another order under a tracer, breaks or not
ORDER = 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("where", "how"),
    [("module", "print"), pytest.param("between", "graph_break", marks=SLOW), pytest.param("loss", "item", marks=SLOW)],
)
def test_a_break_changes_no_bit(where, how, same_bits):
    assert_same_compiled(make("bf16", how, where), same_bits)


@pytest.mark.parametrize(
    ("policy", "rtol"),
    [("fp16", ORDER), pytest.param("bf16-mixed", 0.0, marks=SLOW), pytest.param("fp32", 0.0, marks=SLOW)],
)
def test_every_policy(policy, rtol, same_bits):
    assert_same_compiled(make(policy, "item", "module"), same_bits, rtol)


@pytest.mark.parametrize("where", ["keep_float32", pytest.param("op_rule", marks=SLOW)])
def test_inside_of_other_rules(where, same_bits):
    assert_same_compiled(make("bf16", "graph_break", where), same_bits)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "rtol"), [("bf16", 0.0), ("fp16", ORDER)])
def test_checkpointed_blocks(policy, rtol, same_bits):
    model = make(policy, "graph_break", "module")
    assert_same_compiled(dt.checkpoint_activations(model, "blocks.*"), same_bits, rtol)


@pytest.mark.slow
def test_a_part_under_its_own_rule(same_bits):
    model = make("bf16; blocks.1: param=float32,compute=float32", "print", "module")
    assert_same_compiled(model, same_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, same_bits):
    def compute(x: Tensor) -> Tensor:
        with dt.autocast("cpu", dtype):
            y = x @ x.T
            torch._dynamo.graph_break()
            places = torch.arange(y.shape[0], device=y.device)
            return y.exp() + y.sum() + places

    torch.compiler.reset()
    x = torch.linspace(-1, 1, 16).view(4, 4)
    assert same_bits(torch.compile(compute, backend="eager")(x), compute(x))
    assert _get_current_function_mode_stack() == []
    assert not torch.is_autocast_enabled("cpu")


def test_what_comes_between_breaks_is_compiled():
    torch.compiler.reset()
    sizes = []

    def count(graph, inputs):
        sizes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch.compile(make("bf16", "graph_break", "between"), backend=count)(TOKENS)
    # two blocks with the head, or parts of them, and no operation by itself
    assert sizes
    assert max(sizes) >= 8


def test_a_function_is_traced_from_outside_alone():
    @not_by_itself
    def is_traced() -> bool:
        return torch.compiler.is_compiling()

    assert not torch.compile(is_traced, backend="eager")()

    def outside() -> bool:
        return is_traced()

    assert torch.compile(outside, backend="eager", fullgraph=True)()
