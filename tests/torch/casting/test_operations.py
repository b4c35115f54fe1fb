"""The operation table, all of it: every function in a region, against the cast written out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from duotone.errors import OperationError
from duotone.torch.casting.operation_table import functions_named
from duotone.torch.casting.products import is_sparse
from duotone.torch.casting.region import Region

from .op_by_hand import (
    CALLS,
    KINDS,
    NARROW,
    OWN_KERNEL,
    arguments,
    bits,
    by_hand,
    cast,
    dtypes,
    run,
    wide,
)
from .op_calls import Call

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
EVERY = pytest.mark.parametrize("name", [name for name, call in CALLS.items() if KINDS[call.name] != "refused"])
IN_PLACE = [
    name for name, call in CALLS.items() if call.function.__name__.endswith("_") and KINDS[call.name] == "widest"
]
WIDEST = [name for name, call in CALLS.items() if KINDS[call.name] == "widest" and name not in IN_PLACE]
INSIDE = [name for name, call in CALLS.items() if KINDS[call.name] == "float32_inside"]
pytestmark = pytest.mark.filterwarnings("ignore")


def check(name: str, operands: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """Compare one call in a region with the same by hand."""
    call = CALLS[name]
    kind = KINDS[call.name]
    expected = by_hand(call, *arguments(call, operands, device), dtype, device)
    with Region(dtype).on(device):
        got = run(call, *arguments(call, operands, device))
    if call.name == "linalg.lstsq":
        # LAPACK's answer depends on where memory lies
        torch.testing.assert_close(tuple(got), tuple(expected))
    else:
        assert bits(got) == bits(expected)
    # and what was expected is of the dtype that the table speaks of
    allowed = {"compute": dtype, "float32": torch.float32}.get(kind, operands)
    if call.name not in ("half", "bfloat16"):
        assert dtypes(got) <= {allowed, *([torch.complex64] if kind == "float32" else [])}


@EVERY
def test_every_function_is_seen_by_a_mode(name):
    # a function of Python that does not ask for modes would never come under its rule
    seen: list[Any] = []

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    given = arguments(CALLS[name], torch.float32)
    with Recording():
        run(CALLS[name], *given)
    # `@` is seen as the method
    assert not set(functions_named(CALLS[name].name)).isdisjoint(seen[:1])


@EVERY
def test_against_the_cast_by_hand(name):
    for dtype in NARROW:
        check(name, dtype, dtype, "cpu")
        check(name, torch.float32, dtype, "cpu")


@HALVES
@pytest.mark.parametrize(
    "name", [name for name in INSIDE if CALLS[name].name in OWN_KERNEL and CALLS[name].function is not F.instance_norm]
)
def test_kernels_that_are_left_to_torch_compute_in_float32(name, dtype):
    # at most one unit in the last place from the widened result: one rounding more, but no 16-bit arithmetic
    call = CALLS[name]
    if "norm" in name:
        # the weights of norms are FP32 in a cast model
        (x, *rest), kwargs = call.arguments.args, call.arguments.kwargs
        given = (x.to(dtype), *rest), kwargs
    else:
        given = arguments(call, dtype)
    got, exact = tree_leaves(run(call, *given)), tree_leaves(run(call, *wide(given)))
    for one, other in zip(got, exact, strict=True):
        ulp = torch.finfo(dtype).eps * other.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert ((one.float() - other).abs() <= ulp).all()


@HALVES
@pytest.mark.parametrize("sixteen_first", [True, False], ids=["16 and 32", "32 and 16"])
@pytest.mark.parametrize("name", WIDEST)
def test_mixed_operands_are_widened(name, sixteen_first, dtype):
    call = CALLS[name]

    def mixed() -> Any:
        count = 0

        def one(tensor: Tensor) -> Tensor:
            nonlocal count
            if tensor.dtype != torch.float32:
                return tensor.clone()
            count += 1
            return tensor.to(dtype, copy=True) if (count == 1) is sixteen_first else tensor.clone()

        return tree_map_only(Tensor, one, (call.arguments.args, call.arguments.kwargs))

    expected = run(call, *wide(mixed()))
    with Region(dtype).on("cpu"):
        assert bits(run(call, *mixed())) == bits(expected)


@HALVES
@pytest.mark.parametrize("wide_destination", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_writes_in_place_casts_to_the_destination(name, wide_destination, dtype):
    call = CALLS[name]
    (destination, *rest), kwargs = call.arguments.args, call.arguments.kwargs
    to, others = (torch.float32, dtype) if wide_destination else (dtype, torch.float32)
    rounded = cast((rest, kwargs), others)

    written = cast(destination, to)
    run(call, (written, *cast(rounded[0], to, (others,))), cast(rounded[1], to, (others,)))
    target = cast(destination, to)
    with Region(dtype).on("cpu"):
        run(call, (target, *rounded[0]), rounded[1])
    assert bits(target) == bits(written)
    assert not torch.equal(target, cast(destination, to))


@HALVES
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if KINDS[call.name] == "refused"])
def test_refused_operations_say_what_to_do(name, dtype):
    call = CALLS[name]
    (first, second), kwargs = arguments(call, torch.float32)
    with Region(dtype).on("cpu"):
        for args in ((first.to(dtype), second), (first, second.to(dtype))):
            with pytest.raises(
                OperationError, match=r"binary_cross_entropy on probabilities in .*16 is not safe"
            ) as caught:
                call.function(*args, **kwargs)
            assert "use binary_cross_entropy_with_logits" in str(caught.value)
            assert ".float()" in str(caught.value)
        got = call.function(first, second, **kwargs)
    assert bits(got) == bits(call.function(first, second, **kwargs))


def has_gradients(name: str) -> bool:
    call = CALLS[name]
    if KINDS[call.name] == "refused" or "running_mean" in call.arguments.kwargs:
        return False
    try:
        return bool(gradients(call, *arguments(call, torch.float32), run))
    except RuntimeError:
        return False


def gradients(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any) -> list[Tensor]:
    """Return the gradients of the operands that have one."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf.dtype != torch.float64]
    results = [leaf for leaf in tree_leaves(function(call, args, kwargs)) if isinstance(leaf, Tensor)]
    results = [result.abs() if result.is_complex() else result for result in results if result.requires_grad]
    results = [result.to_dense() if is_sparse(result) else result for result in results]
    if not results:
        return []
    total = sum(
        (result.float() * torch.linspace(0.5, 1.0, result.numel()).view(result.shape)).sum() for result in results
    )
    total.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


DIFFERENTIABLE = [name for name, call in CALLS.items() if name not in IN_PLACE and has_gradients(name)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_in_the_dtype_of_their_operand(name):
    call = CALLS[name]
    # what sums them in FP32, and rounds more than once, is tested where it stands
    rounded_otherwise = KINDS[call.name] == "float32_inside" or call.name == "scaled_dot_product_attention"
    for dtype in NARROW:

        def in_region(*given: Any, dtype: torch.dtype = dtype) -> Any:
            with Region(dtype).on("cpu"):
                return run(*given)

        def as_said(*given: Any, dtype: torch.dtype = dtype) -> Any:
            return by_hand(*given, dtype, "cpu")

        for operands in (dtype, torch.float32):
            got = gradients(call, *arguments(call, operands), in_region)
            expected = gradients(call, *arguments(call, operands), as_said)
            assert {grad.dtype for grad in got} == {operands}
            if rounded_otherwise:
                wide_got, wide_expected = [g.float() for g in got], [e.float() for e in expected]
                torch.testing.assert_close(wide_got, wide_expected, rtol=0.05, atol=0.05)
            else:
                assert bits(got) == bits(expected)


def test_most_operations_have_a_gradient():
    # a table whose calls had none would pass the test above
    assert len(DIFFERENTIABLE) > 300


BY_INDEX = ("index_add", "index_reduce", "scatter_add", "scatter_reduce")
MIXED_INSIDE = {
    "layer_norm": lambda x, weight: F.layer_norm(x, (6,), weight, weight),
    "rms_norm": lambda x, weight: F.rms_norm(x, (6,), weight),
    "group_norm": lambda x, weight: F.group_norm(x, 2, weight, weight),
    "batch_norm": lambda x, weight: F.batch_norm(x, None, None, weight, weight, training=True),
    "instance_norm": lambda x, weight: F.instance_norm(x.unsqueeze(-1).expand(4, 6, 2), weight=weight, bias=weight),
    "embedding_bag": lambda x, weight: F.embedding_bag(
        torch.arange(6)[None], x.T, mode="sum", per_sample_weights=weight[None]
    ),
    "index_add": lambda x, weight: x.index_add(0, torch.tensor([1, 1]), weight.expand(2, 6)),
    "index_reduce": lambda x, weight: x.index_reduce(0, torch.tensor([1, 1]), weight.expand(2, 6), "mean"),
    "scatter_add": lambda x, weight: x.scatter_add(0, torch.ones(2, 6, dtype=torch.int64), weight.expand(2, 6)),
    "scatter_reduce": lambda x, weight: x.scatter_reduce(
        0, torch.ones(2, 6, dtype=torch.int64), weight.expand(2, 6), "sum"
    ),
}


@HALVES
@pytest.mark.parametrize("wide_data", [False, True], ids=["16-bit data", "FP32 data"])
@pytest.mark.parametrize("name", MIXED_INSIDE)
def test_what_is_in_float32_inside_takes_mixed_operands_and_gives_the_dtype_of_its_data(name, wide_data, dtype):
    # FP32 weights of norms beside 16-bit data are what a cast model has; under torch.autocast all of these run
    of_data, of_weight = (torch.float32, dtype) if wide_data else (dtype, torch.float32)
    x = torch.linspace(-1, 1, 24).view(4, 6).cos().to(of_data)
    weight = torch.linspace(0.5, 2, 6).to(of_weight)
    exact = MIXED_INSIDE[name](x.float(), weight.float())
    with Region(dtype).on("cpu"):
        got = MIXED_INSIDE[name](x, weight)
    # sums by index take the widest for it, as autocast does
    of_data = torch.float32 if name in BY_INDEX else of_data
    assert got.dtype == of_data
    eps = torch.finfo(of_data).eps
    torch.testing.assert_close(got.float(), exact, rtol=eps, atol=2 * eps)


@HALVES
def test_the_statistics_of_a_norm_without_weights_are_float32(dtype):
    # a mean that 16 bits do not hold, beside a small deviation
    x = (1024 + 16 * torch.arange(24.0).view(2, 3, 4).remainder(5)).to(dtype)
    exact = F.instance_norm(x.float())
    with Region(dtype).on("cpu"):
        got = F.instance_norm(x), F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(got[0].float(), exact, rtol=0.01, atol=0.01)
    expected = F.batch_norm(x.float(), None, None, training=True)
    torch.testing.assert_close(got[1].float(), expected, rtol=0.01, atol=0.01)
