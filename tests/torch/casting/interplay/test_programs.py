"""Casting in programs that torch makes of code: compiled whole without recompiling, exported, traced by each tracer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import duotone.torch as dt

from .computation import (
    LABELS,
    NARROW,
    TOKENS,
    Results,
    assert_right,
    by_hand,
    cast_model,
    compute,
    data,
    gradients,
    weights,
)

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
# of what is compiled, which takes a second
ONE_FAST = pytest.mark.parametrize("dtype", [NARROW[0], pytest.param(NARROW[1], marks=pytest.mark.slow)])
POLICIES = pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])


class Counting:
    """A compiler that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@ONE_FAST
def test_compiled_once_for_all_calls(dtype):
    torch.compiler.reset()
    counting = Counting()
    compiled = torch.compile(dt.autocast("cpu", dtype)(compute), backend=counting, fullgraph=True)
    want = by_hand(dtype, data(), *weights())
    for _ in range(3):
        assert_right(compiled(data(), *weights()), want, dtype)
    assert counting.graphs == 1


def test_a_cast_model_is_compiled_once_for_all_steps():
    torch.compiler.reset()
    counting, model = Counting(), dt.cast(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "bf16")
    expected, compiled = model(data()), torch.compile(model, backend=counting, fullgraph=True)
    for _ in range(3):
        got = compiled(data())
        got.square().sum().backward()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert counting.graphs == 1


def test_code_that_is_compiled_runs_by_the_rules_of_where_it_is_called():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: (x @ x.T, x.bfloat16().exp(), x.half().sum()), backend="eager", fullgraph=True)
    for _ in range(2):
        assert [each.dtype for each in compiled(data())] == [torch.float32, torch.bfloat16, torch.float16]
        for dtype in NARROW:
            with dt.autocast("cpu", dtype):
                assert [each.dtype for each in compiled(data())] == [dtype, torch.float32, torch.float32]
    with dt.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert [each.dtype for each in compiled(data())] == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@ONE_FAST
def test_gradients_of_what_is_compiled(backend, dtype):
    torch.compiler.reset()
    cast = dt.autocast("cpu", dtype)(compute)
    expected = gradients(cast)
    for got, want in zip(gradients(torch.compile(cast, backend=backend, fullgraph=True)), expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.005)


def test_one_program_for_any_number_of_rows():
    torch.compiler.reset()
    model, counting = dt.cast(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "bf16"), Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for rows in (4, 7, 9):
        expected = torch.autograd.grad(model(data(rows)).square().sum(), list(model.parameters()))
        grads = torch.autograd.grad(compiled(data(rows)).square().sum(), list(model.parameters()))
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert counting.graphs == 1


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x[None], (3, 2), 1),
    "MaxPool2d with places": lambda x: nn.MaxPool2d(2, return_indices=True)(x[None])[0],
    "Tensor.unfold": lambda x: x.unfold(0, 3, 1),
    "unfold": lambda x: F.unfold(x[None, None], 2),
    "pad": lambda x: F.pad(x, (1, 1), mode="replicate"),
}


PAD = pytest.param(
    "pad", marks=pytest.mark.xfail(reason="compiled, torch's autocast decides: the result is FP32", strict=True)
)


@pytest.mark.parametrize("name", [PAD if name == "pad" else name for name in WINDOWS])
def test_windows_are_compiled_whole(name, same_bits):
    torch.compiler.reset()
    function = dt.autocast("cpu", torch.bfloat16)(WINDOWS[name])
    x = data().bfloat16().requires_grad_()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert same_bits(compiled(x), function(x))


@ONE_FAST
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_right_anywhere(strict, dtype, same_bits):
    class Casting(nn.Module):
        def forward(self, x: Tensor, *operands: Tensor) -> Results:
            with dt.autocast("cpu", dtype):
                return compute(x, *operands)

    operands = [each.detach() for each in (data(), *weights())]
    program = torch.export.export(Casting(), tuple(operands), strict=strict).module()
    want = by_hand(dtype, *operands)
    assert_right(program(*operands), want, dtype)
    # in a region of another format, too: its casts stand in it
    with torch.no_grad():
        plain = program(*operands)
    assert all(same_bits(plain[name], each) for name, each in program(*operands).items())


@POLICIES
def test_an_exported_cast_model_is_right(policy):
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Softmax(-1))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(x).exp().sum(-1)

    model = dt.cast(Gives(), policy).eval()
    program = torch.export.export(model, (data(),)).module()
    torch.testing.assert_close(program(data()), model(data()), rtol=0, atol=0)


@HALVES
@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_a_graph_of_kernels(tracing_mode, dtype):
    operands = [each.detach() for each in (data(), *weights())]

    def cast(*each: Tensor) -> Results:
        # not decorated itself: a tracer would take over what stands for arguments that are not given
        with dt.autocast("cpu", dtype):
            return compute(*each)

    graph = make_fx(cast, tracing_mode=tracing_mode)(*operands, TOKENS, LABELS)
    assert_right(graph(*operands, TOKENS, LABELS), by_hand(dtype, *operands), dtype)


@pytest.mark.filterwarnings("ignore")
@POLICIES
def test_a_trace_of_a_cast_model(policy):
    model = dt.cast(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Softmax(-1), nn.Linear(6, 2)), policy).eval()
    traced = torch.jit.trace(model, (data(),))
    torch.testing.assert_close(traced(data() * 2), model(data() * 2), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@HALVES
def test_a_trace_of_a_region(dtype):
    def function(x: Tensor) -> Tensor:
        with dt.autocast("cpu", dtype):
            return (F.linear(x, x).exp().sum(-1) + F.softmax(x, -1).sum(-1)).log()

    with torch.no_grad():
        traced = torch.jit.trace(function, (data(),), check_trace=False)
        got, expected = traced(data() * 2), function(data() * 2)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_symbolic_trace_of_a_plain_model_is_cast(same_bits):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
    traced = symbolic_trace(plain)
    expected = dt.cast(plain, "bf16")(data())
    assert same_bits(dt.cast(traced, "bf16")(data()), expected)


def test_code_generated_by_a_tracer_keeps_results(same_bits):
    model = cast_model("bf16")
    expected = model(data())
    assert same_bits(torch.compiler.disable(model)(data()), expected)
    assert same_bits(torch.no_grad()(model)(data()), expected)
