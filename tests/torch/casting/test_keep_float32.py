"""Parts that stay in FP32: a block, a function, a method, a module."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.errors import PolicyError
from duotone.torch.casting.keep_float32 import is_kept_in_float32
from duotone.torch.casting.operation_table import kinds_by_name

from .op_by_hand import CALLS, KINDS, arguments, bits, dtypes, run, wide

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
POLICIES = pytest.mark.parametrize("policy", NARROW)


def inside(policy: str, function) -> list[object]:
    """Return what a function gives inside of a cast model, uncast."""
    results: list[object] = []

    class Model(nn.Module):
        def forward(self, data: Tensor) -> Tensor:
            results.append(function())
            return data

    dt.cast(Model(), policy)(torch.zeros(1))
    return results[0]


# --- a block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_every_listed_operation_runs_in_float32_in_a_block(dtype):
    for name, call in CALLS.items():
        if KINDS[call.name] in ("widest", "refused", "as_given") or call.name == "linalg.lstsq":
            continue
        # 16-bit statistics are written into, so they are not widened
        if call.function is F.batch_norm:
            continue
        expected = run(call, *wide(arguments(call, dtype)))
        with dt.keep_float32():
            got = run(call, *arguments(call, dtype))
        assert dtypes(got) <= {torch.float32, torch.complex64}, name
        assert bits(got) == bits(expected), name


@POLICIES
def test_a_block_in_a_cast_model(policy):
    half = torch.linspace(-1, 1, 9).view(3, 3).to(NARROW[policy])

    def function() -> tuple[Tensor, ...]:
        with dt.keep_float32():
            inner = half @ half, F.softmax(half, -1), F.linear(half, half), half.mean(), half + half
        return *inner, half @ half

    *got, given, after = inside(policy, function)
    assert [result.dtype for result in got] == [torch.float32] * 4
    assert torch.equal(got[0], half.float() @ half.float())
    # not listed
    assert given.dtype == NARROW[policy]
    assert after.dtype == NARROW[policy]


def test_a_block_refuses_what_is_not_safe_in_16_bits():
    assert kinds_by_name()["binary_cross_entropy"] == "refused"
    half = torch.full((2,), 0.5).bfloat16()
    with dt.keep_float32(), pytest.raises(RuntimeError, match="widen them with"):
        F.binary_cross_entropy(half, half)


def test_gradients_through_a_block_are_in_the_weights_dtype():
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    data = torch.full((1000, 1), 1.0, dtype=torch.bfloat16)
    with dt.keep_float32():
        (data @ weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.item() == 1000.0


def test_blocks_work_outside_of_everything_and_under_autocast():
    half = torch.ones(2, 2).bfloat16()
    with dt.keep_float32():
        assert (half @ half).dtype == torch.float32
        with dt.keep_float32():
            assert (half @ half).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        with dt.keep_float32():
            assert (half @ half).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert (half.float() @ half).dtype == torch.bfloat16
        assert (half.float() @ half).dtype == torch.bfloat16
    assert (half @ half).dtype == torch.bfloat16


def test_what_a_block_writes_into_is_written():
    norm, table = nn.BatchNorm1d(4).bfloat16(), nn.Embedding(4, 4, max_norm=0.1).bfloat16()
    with dt.keep_float32():
        norm(torch.full((3, 4), 5.0).bfloat16())
        table(torch.arange(4))
    assert norm.running_mean.tolist() == [0.5] * 4
    assert (table.weight.float().norm(dim=1) < 0.11).all()


# --- a function, a method


class WithMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[torch.dtype] = []

    @dt.keep_float32
    def head(self, hidden: Tensor, *, pair: tuple[Tensor, Tensor], count: Tensor) -> Tensor:
        """Say nothing."""
        self.seen.extend([hidden.dtype, pair[0].dtype, count.dtype])
        return self.linear(hidden) + pair[1].sigmoid()

    def forward(self, data: Tensor) -> Tensor:
        hidden = self.linear(data)
        result = self.head(hidden, pair=(hidden, hidden), count=torch.tensor([1]))
        self.seen.extend([hidden.dtype, result.dtype])
        return result


@POLICIES
def test_a_method_is_called_on_float32_and_gives_float32(policy):
    model = dt.cast(WithMethod(), policy)
    model(torch.ones(1, 3))
    wide = torch.float32
    assert model.seen == [wide, wide, torch.int64, NARROW[policy], wide]
    assert model.linear.weight.dtype == NARROW[policy]


def test_a_function_keeps_its_name_and_works_anywhere():
    @dt.keep_float32
    def half_life(data: Tensor, rest: list[Tensor]) -> tuple[Tensor, ...]:
        return data * 2, rest[0] @ rest[0]

    assert half_life.__name__ == "half_life"
    assert WithMethod.head.__doc__ == "Say nothing."
    half = torch.ones(2, 2).half()
    assert [result.dtype for result in half_life(half, [half])] == [torch.float32] * 2
    assert half_life(half.double(), [half])[0].dtype == torch.float64


@POLICIES
def test_a_function_that_fails_leaves_nothing_behind(policy):
    @dt.keep_float32
    def fails(data: Tensor) -> Tensor:
        raise ArithmeticError

    half = torch.ones(2, 2, dtype=NARROW[policy])

    def function() -> torch.dtype:
        with pytest.raises(ArithmeticError):
            fails(half)
        return (half @ half).dtype

    assert inside(policy, function) == NARROW[policy]


def test_custom_functions_and_operators_take_float32():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, data):
            return data * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    half = torch.ones(2).bfloat16().requires_grad_()
    got = dt.keep_float32(Twice.apply)(half)
    assert got.dtype == torch.float32
    got.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


# --- a module


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@POLICIES
def test_a_module_keeps_float32_weights_and_arithmetic(policy, same_bits):
    model, plain = net(), net()
    assert dt.keep_float32(model[2]) is model[2]
    assert is_kept_in_float32(model[2])
    seen: list[torch.dtype] = []
    model[2].register_forward_hook(lambda module, args, result: seen.extend([result.dtype]))
    dt.cast(model, policy)
    assert model[2].weight.dtype == torch.float32
    assert model[0].weight.dtype == NARROW[policy]
    # the same as by a rule
    dt.cast(plain, f"{policy};2: param=float32,compute=float32,output=float32")
    assert str(dt.policy_of(model)) == str(dt.policy_of(plain))
    data = torch.linspace(-1, 1, 6).view(2, 3)
    assert same_bits(model(data), plain(data))
    assert "2: param=float32,compute=float32,output=float32" in str(dt.policy_of(model))
    assert dt.Policy.parse(str(dt.policy_of(model))) == dt.policy_of(model)


def test_marks_are_kept_by_copies_and_by_casting_again():
    model = net()
    dt.keep_float32(model[2])
    model = copy.deepcopy(dt.cast(model, "bf16"))
    assert model[2].weight.dtype == torch.float32
    text = str(dt.policy_of(model))
    assert str(dt.policy_of(dt.cast(model, dt.policy_of(model)))) == text
    assert str(dt.policy_of(dt.cast(model, "bf16"))) == text
    assert dt.cast(dt.uncast(model), "fp16")[2].weight.dtype == torch.float32


def test_what_is_refused():
    model = dt.cast(net(), "bf16")
    with pytest.raises(PolicyError, match=r"this Linear is cast already; call keep_float32 before cast, or cast again"):
        dt.keep_float32(model[2])
    whole = dt.keep_float32(net())
    with pytest.raises(PolicyError, match='keep_float32 marks all of this Sequential; cast it to policy "fp32"'):
        dt.cast(whole, "bf16")
    assert whole[0].weight.dtype == torch.float32
    assert dt.cast(whole, "fp32")[0].weight.dtype == torch.float32


@POLICIES
def test_a_part_of_a_marked_module_stays_in_float32(policy):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    dt.keep_float32(model[1])
    dt.cast(model, policy)
    assert {param.dtype for param in model[1].parameters()} == {torch.float32}
    model(torch.ones(1, 3)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


# --- compiled


@dt.keep_float32
def kept_function(hidden: Tensor) -> Tensor:
    return hidden.sigmoid() * (hidden @ hidden.T).sum()


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, data: Tensor) -> Tensor:
        return kept_function(self.linear(data))


class WithBlock(WithFunction):
    def forward(self, data: Tensor) -> Tensor:
        hidden = self.linear(data)
        with dt.keep_float32():
            return F.softmax(self.linear(hidden), -1)


class WithModule(WithFunction):
    def __init__(self) -> None:
        super().__init__()
        self.kept = dt.keep_float32(nn.Linear(3, 3))

    def forward(self, data: Tensor) -> Tensor:
        return self.kept(self.linear(data))


@POLICIES
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("kind", [WithFunction, WithBlock, WithModule])
def test_parts_in_float32_compile_whole(kind, backend, policy, same_bits):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, data = dt.cast(kind(), policy), torch.linspace(-1, 1, 6).view(2, 3)
    expected = model(data)
    assert same_bits(torch.compile(model, fullgraph=True, backend=backend)(data), expected)


def test_parentheses_make_no_difference_to_a_decorator():
    half = torch.ones(2, dtype=torch.bfloat16)
    assert (
        dt.keep_float32()(torch.add)(half, half).dtype == dt.keep_float32(torch.add)(half, half).dtype == torch.float32
    )


@pytest.mark.parametrize("part", [torch.ones(1), "head", nn.Linear])
def test_what_is_neither_module_nor_function_is_refused(part):
    with pytest.raises(PolicyError, match="keep_float32 takes a module, a function or nothing, not"):
        dt.keep_float32(part)


def test_a_head_that_is_kept_gives_its_float32_results_away(same_bits):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 300))
    dt.keep_float32(model[1])
    y = dt.cast(model, "bf16")(torch.randn(8, 4))
    assert not torch.equal(y, y.bfloat16().float())
