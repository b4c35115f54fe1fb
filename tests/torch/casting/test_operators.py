"""The operation table through `torch.ops.aten`: every overload in a region, against the Python function of its name."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from duotone.errors import OperationError
from duotone.torch.casting.operation_table import overloads_named
from duotone.torch.casting.region import Region

from .op_by_hand import CALLS, KINDS, NARROW, arguments, bits, dtypes, run
from .op_calls import Call

pytestmark = pytest.mark.filterwarnings("ignore")
# torch.ops.aten has something else under these names
NOT_THE_SAME = {
    "tensor": "makes a tensor of one number, of a dtype of its own",
    "__getitem__": "reads lists, dicts and text",
}
# LAPACK's answer depends on where memory lies
CLOSE = ("linalg.lstsq",)


def overloads(name: str) -> Iterator[tuple[Call, Call]]:
    """Yield a call of a function, and of each overload of its operator that takes the same arguments."""
    for call in CALLS.values():
        for overload in overloads_named(name) if call.name == name else ():
            same = Call(name, overload, call.arguments)
            try:
                run(same, *arguments(call, torch.float32))
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue
            yield call, same


def first(result: Any) -> Any:
    # an operator may give more than its function, indices for instance
    return result[0] if isinstance(result, tuple) else result


def same_outside(call: Call, overload: Call) -> bool:
    """Return whether arguments mean the same to both: operands may be reversed, and defaults are others."""
    given = arguments(call, torch.float32), arguments(call, torch.float32)
    return bits(first(run(overload, *given[0]))) == bits(first(run(call, *given[1])))


NAMES = [
    name for name, kind in KINDS.items() if kind != "refused" and name not in NOT_THE_SAME and next(overloads(name), 0)
]


def test_most_operations_have_an_operator():
    assert len(NAMES) > 280


@pytest.mark.parametrize("name", NAMES)
def test_every_overload_runs_as_its_function(name):
    for call, overload in overloads(name):
        comparable = name not in CLOSE and same_outside(call, overload)
        for dtype in NARROW:
            for operands in (dtype, torch.float32):
                with Region(dtype).on("cpu"):
                    expected = run(call, *arguments(call, operands))
                    got = run(overload, *arguments(call, operands))
                assert dtypes(first(got)) == dtypes(first(expected)), overload.function
                if comparable:
                    assert bits(first(got)) == bits(first(expected)), overload.function


def test_a_refused_operator_says_so_by_its_function():
    p = torch.full((2,), 0.5, dtype=torch.bfloat16)
    for operator in (torch.ops.aten.binary_cross_entropy, torch.ops.aten.binary_cross_entropy.default):
        with (
            Region(torch.bfloat16).on("cpu"),
            pytest.raises(OperationError, match=r"^binary_cross_entropy on probabilities"),
        ):
            operator(p, p)


def test_what_writes_into_a_given_tensor_is_left_alone():
    x, out = torch.linspace(-1, 1, 4).bfloat16(), torch.empty(4, dtype=torch.bfloat16)
    with Region(torch.bfloat16).on("cpu"):
        torch.ops.aten.exp.out(x, out=out)
    assert torch.equal(out, torch.exp(x))


@pytest.mark.parametrize("dtype", NARROW)
def test_operators_of_modules_that_call_them_alone(dtype):
    # code that an exporter wrote calls operators
    weight, bias = torch.ones(3, 4).to(dtype), torch.ones(3)
    x = torch.linspace(-1, 1, 8).view(2, 4)

    def run_by(space: Any) -> list[Tensor]:
        y = space.linear(x, weight, bias)
        return [y, space.softmax(y, -1), space.log_softmax(y, -1), space.layer_norm(y, [3]), space.exp(y)]

    class Functions:
        linear, layer_norm = staticmethod(torch.nn.functional.linear), staticmethod(torch.nn.functional.layer_norm)
        softmax, log_softmax, exp = torch.softmax, torch.log_softmax, torch.exp

    with Region(dtype).on("cpu"):
        assert bits(run_by(torch.ops.aten)) == bits(run_by(Functions))
