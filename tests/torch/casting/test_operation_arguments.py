"""Arguments of listed operations that a region leaves alone: other dtypes, `out=`, `dtype=`; and named operands."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from duotone.torch.casting.region import Region

from .op_by_hand import CALLS, KINDS, NARROW, arguments, bits, dtypes, run

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])

pytestmark = pytest.mark.filterwarnings("ignore")


@HALVES
@pytest.mark.parametrize("other", [torch.float64, torch.int64, torch.complex64])
def test_other_dtypes_are_left_alone(dtype, other):
    compared = set()
    for name, call in CALLS.items():
        if call.name == "linalg.lstsq" or (other == torch.int64 and call.name.endswith("_cell")):
            # not the same twice; FP32 results of integers
            continue
        try:
            expected = bits(run(call, *arguments(call, other)))
        except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError):
            # torch does not take them
            continue
        with Region(dtype).on("cpu"):
            got = bits(run(call, *arguments(call, other)))
        assert got == expected, name
        compared.add(KINDS[call.name])
    assert compared >= {"compute", "float32", "float32_inside", "widest"}
    assert ("refused" in compared) == (other == torch.float64)


@HALVES
def test_results_in_a_given_tensor_are_left_alone(dtype):
    compared = set()
    for name, call in CALLS.items():
        if call.name == "chain_matmul":
            # torch forgets its `out` where a mode is active
            continue
        args, kwargs = arguments(call, dtype)
        try:
            out = tree_map_only(Tensor, torch.zeros_like, run(call, args, kwargs))
            run(call, args, {**kwargs, "out": out})
        except (RuntimeError, TypeError, NotImplementedError, ValueError):
            # not in 16 bits, or no `out`
            continue
        target = tree_map_only(Tensor, torch.zeros_like, out)
        with Region(dtype).on("cpu"):
            run(call, args, {**kwargs, "out": target})
        assert bits(target) == bits(out), name
        compared.add(call.name)
    assert {"mm", "exp", "sum", "cumsum", "index_select", "cat", "where", "mean", "linalg.vector_norm"} <= compared


@HALVES
@pytest.mark.parametrize("asked", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dtype_that_is_asked_for_is_given(asked, dtype):
    for name, call in CALLS.items():
        args, kwargs = arguments(call, dtype)
        try:
            expected = run(call, args, {**kwargs, "dtype": asked})
        except (RuntimeError, TypeError):
            assert call.name not in ("sum", "cumsum", "mean", "softmax"), name
            continue
        if not dtypes(expected):
            # `@` has no such argument
            continue
        with Region(dtype).on("cpu"):
            got = run(call, args, {**kwargs, "dtype": asked})
        assert dtypes(got) == {asked}, name
        assert bits(got) == bits(expected), name


@HALVES
@pytest.mark.parametrize("function", [torch.sum, torch.nansum, torch.prod, torch.Tensor.sum])
def test_sums_have_the_bits_of_the_widened_sum(function, dtype):
    terms = (torch.linspace(0.9, 1.1, 70_001) if function is not torch.prod else torch.linspace(0.9, 1.1, 1001)).to(
        dtype
    )
    for dim in ({}, {"dim": 0}):
        with Region(dtype).on("cpu"):
            got = function(terms, **dim)
        assert bits(got) == bits(function(terms.float(), **dim))


@HALVES
@pytest.mark.parametrize("function", [torch.sum, torch.exp, torch.cumsum, torch.mean, torch.cat, torch.mm])
def test_operands_may_be_named(function, dtype):
    x = torch.ones(3, 3, dtype=dtype)
    named = {torch.cat: {"tensors": [x, x.float()]}, torch.mm: {"mat2": x}, torch.cumsum: {"dim": 0}}.get(function, {})
    first = {} if function is torch.cat else {"input": x}
    with Region(dtype).on("cpu"):
        got = function(**first, **named)
    expected = {torch.mm: dtype, torch.mean: dtype}.get(function, torch.float32)
    assert got.dtype == expected


UNLISTED = {
    "add": lambda x: x + x,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "dropout": F.dropout,
    "max": torch.amax,
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool3d": lambda x: F.max_pool3d(x, (1, 2, 2)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, (2, 2, 2)),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "pad by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad by replication": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
}


@HALVES
@pytest.mark.parametrize("name", UNLISTED)
def test_what_is_not_listed_runs_as_it_is_given(name, dtype):
    # torch.autocast casts some of these to FP32 on CPUs, where they had no 16-bit kernels once
    x = torch.linspace(-1, 1, 128).view(2, 4, 4, 4).to(dtype)
    torch.manual_seed(0)
    expected = UNLISTED[name](x)
    torch.manual_seed(0)
    with Region(dtype).on("cpu"):
        got = UNLISTED[name](x)
    assert got.dtype == dtype
    assert bits(got) == bits(expected)


@HALVES
def test_tensors_of_no_dimension_do_not_widen(dtype):
    # torch promotes by them no more than by numbers: a mask's fill, a factor that happens to be a tensor
    x, y, mask = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype), torch.tensor([True, False, True])
    number = torch.tensor(0.5)
    for function in (torch.where, torch.addcmul):
        args = (mask, x, number) if function is torch.where else (x, y, number)
        assert function(*args).dtype == dtype
        with Region(dtype).on("cpu"):
            assert function(*args).dtype == dtype, function
