"""Kinds of one's own: `op_rule` on functions and operators, and in a block of code."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import OperationError

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
POLICIES = pytest.mark.parametrize("policy", NARROW)
seen_dtypes: list[torch.dtype] = []


def seeing(a: Tensor, b: Tensor) -> Tensor:
    seen_dtypes.extend([a.dtype, b.dtype])
    return a + b


@torch.library.custom_op("duotone_tests::double", mutates_args=())
def double(a: Tensor) -> Tensor:
    return a * 2


@double.register_fake
def _(a: Tensor) -> Tensor:
    return torch.empty_like(a)


double.register_autograd(lambda ctx, grad: grad * 2)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a * a * a

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return 3 * a * a * grad


def fp32_and_narrow(policy: str) -> tuple[Tensor, Tensor]:
    values = torch.linspace(0.1, 1, 6)
    return values, values.flip(0).to(NARROW[policy])


class Calls(nn.Module):
    """Calls a function on its inputs as they are, whatever the border made of them."""

    def __init__(self, function, *inputs) -> None:
        super().__init__()
        self.function = function
        self.inputs = inputs

    def forward(self, _: Tensor) -> Tensor:
        return self.function(*self.inputs)


def inside(policy: str, function, *inputs):
    """Return what a function gives inside of a cast model, uncast."""
    results = []

    def kept(*args):
        results.append(function(*args))
        return torch.zeros(1)

    dt.cast(Calls(kept, *inputs), policy)(torch.zeros(1))
    return results[0]


# kind -> dtypes of operands that were FP32 and 16-bit; None is the policy's
KINDS = {
    "compute": (None, None),
    "float32": (torch.float32, torch.float32),
    "float32_inside": (torch.float32, None),
    "widest": (torch.float32, torch.float32),
    "as_given": (torch.float32, None),
}


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_gets_what_its_kind_says(kind, policy):
    first, second = (dtype or NARROW[policy] for dtype in KINDS[kind])
    seen_dtypes.clear()
    inside(policy, dt.op_rule(seeing, kind), *fp32_and_narrow(policy))
    assert seen_dtypes == [first, second]


def test_compute_gives_the_policys_dtype():
    product = dt.op_rule(torch.matmul, "compute")
    for policy, dtype in NARROW.items():
        assert inside(policy, product, torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_cast_models_a_kind_does_nothing(kind, policy):
    seen_dtypes.clear()
    dt.op_rule(seeing, kind)(*fp32_and_narrow(policy))
    assert seen_dtypes == [torch.float32, NARROW[policy]]


@POLICIES
def test_no_kinds_hold_inside_of_the_function(policy):
    def function(a: Tensor) -> tuple[torch.dtype, ...]:
        return a.exp().dtype, a.sum().dtype, (a @ a).dtype, torch.sigmoid(a).dtype

    half = torch.ones(2, 2, dtype=NARROW[policy])
    for kind in ("as_given", "float32_inside"):
        assert inside(policy, dt.op_rule(function, kind), half) == (NARROW[policy],) * 4
    assert inside(policy, dt.op_rule(function, "float32"), half) == (torch.float32,) * 4


@POLICIES
def test_kinds_hold_again_after_the_function_even_if_it_fails(policy):
    def fails(a: Tensor) -> Tensor:
        raise ArithmeticError

    def function(a: Tensor) -> Tensor:
        with pytest.raises(ArithmeticError):
            dt.op_rule(fails, "as_given")(a)
        return a.exp()

    assert inside(policy, function, torch.ones(2, dtype=NARROW[policy])).dtype == torch.float32


def test_operands_in_tuples_lists_and_by_name_are_cast():
    seen = []

    def function(pair, *, more, flag, count):
        seen.extend([pair[0].dtype, pair[1][0].dtype, more.dtype, count.dtype, flag])
        return more

    narrow = torch.ones(2).bfloat16()
    count = torch.tensor([1])
    inside("bf16", lambda: dt.op_rule(function, "float32")((narrow, [narrow]), more=narrow, flag="x", count=count))
    assert seen == [torch.float32, torch.float32, torch.float32, torch.int64, "x"]


def test_other_dtypes_are_left_alone():
    seen = []
    function = dt.op_rule(lambda *args: seen.extend(arg.dtype for arg in args), "float32")
    inside("bf16", function, torch.ones(1).bfloat16(), torch.ones(1).double(), torch.tensor([1j]), torch.tensor([1]))
    assert seen == [torch.float32, torch.float64, torch.complex64, torch.int64]
    assert inside("bf16", dt.op_rule(lambda: 7, "float32")) == 7


def test_a_function_keeps_its_name_and_may_be_a_method():
    class Reader:
        def read(self, a: Tensor) -> torch.dtype:
            return a.dtype

        read_wide = dt.op_rule(read, "float32")

    assert dt.op_rule(seeing, "float32").__name__ == "seeing"
    assert dt.op_rule(torch.exp, "float32").__name__ == "exp"
    half = torch.ones(1).bfloat16()
    assert inside("bf16", Reader().read_wide, half) == torch.float32


@POLICIES
@pytest.mark.parametrize("function", [double, Cube.apply, torch.ops.duotone_tests.double], ids=["op", "apply", "ops"])
def test_custom_operators_and_functions_run_under_kinds(function, policy):
    data = torch.linspace(0, 1, 5).to(NARROW[policy]).requires_grad_()
    assert inside(policy, function, data).dtype == NARROW[policy]
    got = inside(policy, dt.op_rule(function, "float32"), data)
    assert got.dtype == torch.float32
    assert torch.equal(got, function(data.float()))
    got.sum().backward()
    assert data.grad is not None
    assert data.grad.dtype == NARROW[policy]


relative = dt.op_rule(lambda a, b: (a - b) / b, "float32")
wide_double = dt.op_rule(double, "float32")


def with_own_kinds(hidden: Tensor) -> Tensor:
    return relative(hidden, hidden + 1) + wide_double(hidden)


def with_a_listed_function(hidden: Tensor) -> Tensor:
    with dt.op_rule({torch.exp: "as_given"}):
        return hidden.exp() + torch.exp(hidden)


def with_an_unlisted_function(hidden: Tensor) -> Tensor:
    with dt.op_rule({torch.sigmoid: "float32"}):
        return hidden.sigmoid()


wide_sigmoid = dt.op_rule(torch.sigmoid, "float32")


def with_one_function(hidden: Tensor) -> Tensor:
    with dt.op_rule(torch.exp, "as_given"):
        inside = hidden.exp()
    return inside + hidden.exp() + wide_sigmoid(hidden)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize(
    ("function", "policy"),
    [
        (with_own_kinds, "bf16"),
        (with_a_listed_function, "fp16"),
        pytest.param(with_own_kinds, "fp16", marks=pytest.mark.slow),
        pytest.param(with_a_listed_function, "bf16", marks=pytest.mark.slow),
        *(
            pytest.param(function, policy, marks=pytest.mark.slow)
            for function in (with_an_unlisted_function, with_one_function)
            for policy in NARROW
        ),
    ],
)
def test_kinds_of_ones_own_compile_whole(function, backend, policy, same_bits):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, data: Tensor) -> Tensor:
            return function(self.linear(data))

    torch.compiler.reset()
    torch.manual_seed(0)
    model, data = dt.cast(Model(), policy), torch.linspace(-1, 1, 6).view(2, 3)
    expected = model(data)
    assert same_bits(torch.compile(model, fullgraph=True, backend=backend)(data), expected)


# --- blocks


@POLICIES
def test_a_block_has_other_kinds_for_functions_methods_and_operators(policy):
    half = torch.linspace(0.1, 1, 4).to(NARROW[policy])

    def function() -> list[torch.dtype]:
        with dt.op_rule({torch.exp: "as_given", torch.Tensor.__pow__: "as_given", torch.sigmoid: "float32"}):
            inner = [torch.exp(half), half.exp(), half**2, 2**half, torch.pow(half, 2), half.sigmoid(), half.log()]
        return [result.dtype for result in (*inner, half.exp(), half.sigmoid())]

    narrow, wide = NARROW[policy], torch.float32
    assert inside(policy, function) == [narrow] * 5 + [wide, wide] + [wide, narrow]


@POLICIES
@pytest.mark.parametrize(
    "which", [torch.exp, torch.Tensor.exp, {torch.exp: "as_given"}], ids=["one", "method", "several"]
)
def test_a_block_may_be_for_one_function_or_for_several(which, policy):
    half = torch.ones(2).to(NARROW[policy])

    def function() -> list[torch.dtype]:
        with dt.op_rule(which) if isinstance(which, dict) else dt.op_rule(which, "as_given"):
            in_block = [torch.exp(half), half.exp(), half.log()]
        return [result.dtype for result in (*in_block, half.exp())]

    narrow, wide = NARROW[policy], torch.float32
    assert inside(policy, function) == [narrow, narrow, wide, wide]


def test_one_block_may_be_entered_again_and_its_function_called():
    half, narrow_exp = torch.ones(2).bfloat16(), dt.op_rule(torch.exp, "as_given")

    def function() -> list[torch.dtype]:
        with narrow_exp:
            with narrow_exp:
                first = half.exp()
            again = half.exp()
        return [result.dtype for result in (first, again, half.exp(), narrow_exp(half))]

    assert inside("bf16", function) == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    with pytest.raises(ArithmeticError), narrow_exp:
        raise ArithmeticError
    assert inside("bf16", half.exp).dtype == torch.float32


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_may_be_given_in_a_block(kind, policy):
    wide, narrow = fp32_and_narrow(policy)

    def function() -> torch.dtype:
        with dt.op_rule({torch.add: kind}):
            return torch.add(wide, narrow).dtype

    assert inside(policy, function) == (NARROW[policy] if kind == "compute" else torch.float32)


def test_the_inner_of_two_blocks_holds():
    half = torch.ones(2).bfloat16()

    def function() -> list[torch.dtype]:
        with dt.op_rule({torch.exp: "as_given", torch.log: "as_given"}):
            with dt.op_rule({torch.exp: "float32"}):
                inner = half.exp(), half.log()
            return [result.dtype for result in (*inner, half.exp())]

    assert inside("bf16", function) == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_a_block_around_a_model_is_inside_of_no_cast_model():
    # the model's own region is the inner one
    half = torch.ones(2).bfloat16()
    with dt.op_rule({torch.exp: "as_given"}):
        assert half.exp().dtype == torch.bfloat16
        assert inside("bf16", half.exp).dtype == torch.float32


def test_blocks_are_of_their_thread():
    half, found = torch.ones(2).bfloat16(), []

    def function() -> torch.dtype:
        with dt.op_rule({torch.exp: "as_given"}):
            thread = threading.Thread(target=lambda: found.append(inside("bf16", half.exp).dtype))
            thread.start()
            thread.join()
            return half.exp().dtype

    assert inside("bf16", function) == torch.bfloat16
    assert found == [torch.float32]


# --- where there is no cast model


def test_both_hold_under_torch_autocast():
    half = torch.ones(2, 2).bfloat16()
    function = dt.op_rule(torch.sigmoid, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert function(half).dtype == torch.float32
        assert dt.op_rule(torch.matmul, "as_given")(half.float(), half.float()).dtype == torch.float32
        with dt.op_rule({torch.sigmoid: "float32", torch.matmul: "as_given"}):
            assert half.sigmoid().dtype == torch.float32
            assert (half.float() @ half.float()).dtype == torch.float32
        with torch.autocast("cpu", enabled=False), dt.op_rule({torch.sigmoid: "float32"}):
            assert function(half).dtype == half.sigmoid().dtype == torch.bfloat16
    with dt.op_rule({torch.sigmoid: "float32"}):
        assert half.sigmoid().dtype == torch.bfloat16


def test_both_hold_in_keep_float32():
    half = torch.ones(2, 2).bfloat16()
    with dt.keep_float32():
        assert dt.op_rule(torch.sigmoid, "compute")(half).dtype == torch.float32
        assert dt.op_rule(torch.matmul, "as_given")(half, half).dtype == torch.bfloat16
        with dt.op_rule({torch.matmul: "as_given"}):
            assert (half @ half).dtype == torch.bfloat16


def test_what_is_refused():
    with pytest.raises(OperationError, match='an operation cannot be "half"; known: compute, '):
        dt.op_rule(seeing, "half")
    with pytest.raises(OperationError, match='cannot be "refused"'):
        dt.op_rule(seeing, "refused")
    with (
        pytest.raises(OperationError, match='cannot be "floats32"; did you mean float32'),
        dt.op_rule({torch.exp: "floats32"}),
    ):
        pass
    with pytest.raises(OperationError, match=r'give torch.exp, not its name or a class, or {torch.exp: "float32"}'):
        dt.op_rule("exp", "float32")
    with pytest.raises(OperationError, match="holds the kinds itself; leave out the second argument"):
        dt.op_rule({torch.exp: "float32"}, "float32")
    with pytest.raises(OperationError, match="op_rule needs the kind of the function"):
        dt.op_rule(torch.exp)
    for no_function_of_torch in (seeing, double, len):
        with (
            pytest.raises(
                OperationError, match=r"for a function of your own, call what op_rule\(function, kind\) returns"
            ),
            dt.op_rule({no_function_of_torch: "float32"}),
        ):
            pass


def test_a_model_with_own_kinds_may_be_copied():
    model = dt.cast(Calls(dt.op_rule(seeing, "float32"), *fp32_and_narrow("bf16")), "bf16")
    seen_dtypes.clear()
    copy.deepcopy(model)(torch.zeros(1))
    assert seen_dtypes == [torch.float32, torch.float32]
