"""The machine code of the CUDA kernels, compiled ahead of time without a GPU: exact arithmetic and wide accesses."""

import re
from collections import Counter

import pytest

pytest.importorskip("triton", reason="the cuda backend needs Triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duotone.torch.kernels.cuda.averages import average_kernel
from duotone.torch.kernels.cuda.coefficients import coefficients_kernel
from duotone.torch.kernels.cuda.elements import update_kernel
from duotone.torch.kernels.cuda.launch import OPTIONS, average_constants_in, constants_in, constants_of
from duotone.torch.kernels.cuda.sums import squares_kernel, sums_kernel, total_kernel
from duotone.torch.kernels.table import Formats

from .grid import UPDATES

TYPES = {
    "parameters": "*i64",
    "chunks": "*i64",
    "settings": "*i64",
    "coefficients": "*i32",
    "grad_multiplier": "*fp32",
    "inverse_scale": "*fp32",
    "found_inf": "*i1",
    "share": "*fp32",
    "skipped": "*i1",
    "seen": "*i32",
    "mark": "i32",
    "values": "*fp64",
    "sums": "*fp64",
    "total": "*fp64",
    "count": "i32",
}
# optimizer, formats, and how many 4-byte words a thread moves at once: of loads, of stores; where there is a tail, the
# weights are loaded twice more for their checksums, 64 bytes a thread at once
WIDTHS = [
    ("adamw", Formats("bfloat16+tail", "bfloat16", ("float32",) * 2), {2: 3, 4: 10}, {2: 2, 4: 2}),
    ("adamw", Formats("bfloat16+tail", "bfloat16", ("bfloat16",) * 2), {4: 13}, {4: 4}),
    ("adamw", Formats("float16+tail", "float16", ("float32",) * 2), {2: 3, 4: 10}, {2: 2, 4: 2}),
    ("adamw", Formats("float32", "bfloat16", ("float32",) * 2), {2: 1, 4: 3}, {4: 3}),
    ("sgd", Formats("float32", "float32", ()), {4: 2}, {4: 1}),
    ("sgd", Formats("float16+stochastic", "float16", ("bfloat16",)), {4: 3}, {4: 2}),
    ("sgd", Formats("bfloat16", "bfloat16", ()), {4: 2}, {4: 1}),
    ("lion", Formats("bfloat16+stochastic", "float16", ("float32",)), {2: 2, 4: 1}, {2: 1, 4: 1}),
]


def instructions(kernel, architecture=90, **constants):
    """Return how often each instruction stands in a kernel's PTX, as it is launched."""
    types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*\.[\w.:]+)", compiled.asm["ptx"], re.MULTILINE))


def of_update(optimizer, formats, *, aligned=True, architecture=90):
    constants = constants_of(UPDATES[optimizer])[1] | constants_in(formats)
    return instructions(update_kernel, architecture, **constants, ALIGNED=aligned)


def widths(found, access):
    return {width: found[f"{access}.global.v{width}.b32"] for width in (2, 4) if found[f"{access}.global.v{width}.b32"]}


def inexact(found):
    """Return what rounds otherwise than the reference: flushed subnormals, approximations, fused products."""
    return {name for name in found if re.search(r"ftz|approx|\bfma|\bmad\.rn|div\.full", name)}


@pytest.mark.parametrize(("optimizer", "formats", "loads", "stores"), WIDTHS)
def test_updates_are_exact_and_their_accesses_wide(optimizer, formats, loads, stores):
    found = of_update(optimizer, formats)
    assert not inexact(found)
    assert (widths(found, "ld"), widths(found, "st")) == (loads, stores)
    # whatever moves between threads goes through shared memory: the sums of a cell, and nothing else
    assert formats.weight.endswith("+tail") or not [
        name for name in found if "shared" in name or name.startswith("bar")
    ]
    if optimizer == "adamw":
        assert {"div.rn.f32", "sqrt.rn.f32"} <= set(found)


@pytest.mark.parametrize("architecture", [80, 89, 100])
def test_other_architectures(architecture):
    found = of_update("adamw", Formats("float16+tail", "bfloat16", ("float32",) * 2), architecture=architecture)
    assert not inexact(found)
    assert widths(found, "st") == {2: 2, 4: 2}


def test_unaligned_addresses_are_accessed_element_by_element():
    found = of_update("adamw", Formats("bfloat16+tail", "bfloat16", ("float32",) * 2), aligned=False)
    assert not inexact(found)
    assert (widths(found, "ld"), widths(found, "st")) == ({}, {})


@pytest.mark.parametrize(("weight", "loads"), [("bfloat16+tail", {2: 2, 4: 1}), ("float32", {4: 2})])
def test_averages_are_exact_and_their_accesses_wide(weight, loads):
    constants = average_constants_in(Formats(weight, "float32", ("float32",)))
    found = instructions(average_kernel, **constants, ALIGNED=True)
    assert not inexact(found)
    # a compiler may unroll so small a loop
    (stores,) = widths(found, "st").values()
    assert (widths(found, "ld"), widths(found, "st")) == ({key: n * stores for key, n in loads.items()}, {4: stores})
    unaligned = instructions(average_kernel, **constants, ALIGNED=False)
    assert (widths(unaligned, "ld"), widths(unaligned, "st")) == ({}, {})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_coefficients_are_exact(optimizer):
    found = instructions(coefficients_kernel, **constants_of(UPDATES[optimizer])[0])
    assert not inexact(found)
    if optimizer == "adamw":
        assert {"div.rn.f64", "sqrt.rn.f64"} <= set(found)


@pytest.mark.parametrize(("name", "width"), [("float32", 8), ("bfloat16", 4), ("float16", 4)])
def test_sums_of_squares_are_wide(name, width):
    found = instructions(squares_kernel, FORMAT=name, WIDE=True)
    assert not inexact(found)
    assert widths(found, "ld") == {4: width}
    assert not widths(instructions(squares_kernel, FORMAT=name, WIDE=False), "ld")


@pytest.mark.parametrize("kernel", [sums_kernel, total_kernel])
def test_sums_of_sums_are_exact(kernel):
    assert not inexact(instructions(kernel))
