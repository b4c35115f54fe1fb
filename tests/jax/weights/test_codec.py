"""The split codec in JAX: the bits of NumPy's reference and of duotone.torch, and that XLA leaves it as it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from duotone import rounding
from duotone.jax.weights import codec

from . import numpy_codec
from .masters_to_split import masters, pairs

DTYPES = ("bfloat16", "float16")

encode = jax.jit(codec.encode, static_argnames="dtype")
decode = jax.jit(codec.decode)


def split(values, dtype):
    weight, tail = encode(values, dtype=dtype)
    assert (weight.dtype, tail.dtype, weight.shape, tail.shape) == (dtype, jnp.int16, values.shape, values.shape)
    return np.asarray(weight).view(np.uint16), np.asarray(tail)


def joined(codes, tails, dtype):
    return np.asarray(decode(lax.bitcast_convert_type(codes, jnp.dtype(dtype)), tails))


def same_floats(ours, theirs):
    """Compare bits, and of NaN only that it is one: their payloads are the hardware's affair."""
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    kept = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[kept].view(np.uint32), theirs[kept].view(np.uint32))


@pytest.fixture(scope="module")
def values():
    return masters()


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_gives_numpys_bits(values, dtype):
    codes, tails = split(values, dtype)
    expected_codes, expected_tails = numpy_codec.encode(values, dtype)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(tails, expected_tails)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joining_gives_numpys_bits_whatever_the_tail(dtype):
    codes, tails = pairs()
    same_floats(joined(codes, tails, dtype), numpy_codec.decode(codes, tails, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_give_the_bits_of_duotone_torch(values, dtype):
    torch = pytest.importorskip("torch")
    kernels = pytest.importorskip("duotone.torch.kernels")
    weight, tail = kernels.encode(torch.from_numpy(values), getattr(torch, dtype))
    codes, tails = split(values, dtype)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(codes[number], weight.view(torch.int16).numpy().view(np.uint16)[number])
    np.testing.assert_array_equal(tails, tail.numpy())
    codes, tails = pairs()
    weight = torch.from_numpy(codes.view(np.int16)).view(getattr(torch, dtype))
    same_floats(joined(codes, tails, dtype), kernels.decode(weight, torch.from_numpy(tails)).numpy())


def test_bfloat16_keeps_every_bit(values):
    same_floats(joined(*split(values, "bfloat16"), "bfloat16"), values)


def test_float16_keeps_every_bit_from_two_to_the_minus_16_on_and_2_to_the_minus_41_below(values):
    finite = values[np.abs(values) < 65520.0]
    codes, tails = split(finite, "float16")
    weight, again = codes.view(np.float16), joined(codes, tails, "float16")
    exact = np.abs(weight) >= 2.0**-16
    assert 0.01 < exact.mean() < 0.99
    same_floats(again[exact], finite[exact])
    assert (np.abs(again[~exact].astype(np.float64) - finite[~exact]) <= 2.0**-41).all()
    assert (np.signbit(weight) == np.signbit(finite)).all()


@pytest.mark.parametrize(("dtype", "mode"), [("bfloat16", "ties_away"), ("float16", "nearest_even")])
def test_weights_are_the_nearest(values, dtype, mode):
    # but for FP16's ties of what was put on the grid of 2^-40
    compared = values[(np.abs(values) >= 2.0**-16) | (dtype == "bfloat16")]
    np.testing.assert_array_equal(split(compared, dtype)[0], rounding.encode(compared, dtype, mode=mode))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50, deadline=None)
@given(drawn=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8))
def test_any_bits_are_split_and_joined_as_numpy_does(dtype, drawn):
    values = np.array(drawn, np.uint32).view(np.float32)
    codes, tails = split(values, dtype)
    np.testing.assert_array_equal(codes, numpy_codec.encode(values, dtype)[0])
    same_floats(joined(codes, tails, dtype), numpy_codec.decode(*numpy_codec.encode(values, dtype), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (), (2, 3, 4)])
def test_any_shape_and_under_vmap(dtype, shape):
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    codes, tails = split(values, dtype)
    assert np.array_equal(joined(codes, tails, dtype), values)
    if shape:
        mapped = jax.vmap(lambda one: codec.decode(*codec.encode(one, dtype)))(values)
        np.testing.assert_array_equal(mapped, values)


def test_bits_are_the_same_in_x64_mode():
    values = np.float32([1.001, -3e-6, 0.1])
    with jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True):
        for dtype in DTYPES:
            np.testing.assert_array_equal(split(values, dtype)[0], numpy_codec.encode(values, dtype)[0])


def convert_based(master, dtype):
    """Return the weight and the tail as one would write them first, whose tail XLA may take for 0."""
    weight = master.astype(dtype)
    bits = lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.int32)
    return weight, (lax.bitcast_convert_type(master, jnp.int32) - bits).astype(jnp.int16)


def conversions_between_floats(function, *operands):
    """Return the conversions between floating formats in what XLA's optimiser leaves of a function."""
    text = jax.jit(function).lower(*operands).compile().as_text()
    dtype_of = dict(re.findall(r"%([\w.-]+)(?: =|:) (\w+)\[", text))
    floats = {"f32", "f16", "bf16"}
    found = re.findall(r"%([\w.-]+) = \w+\[[^\n]* convert\((?:\w+\[[^\n]*\] )?%([\w.-]+)\)", text)
    assert found, "no conversions at all: their spelling has changed"
    return [pair for pair in found if {dtype_of[name] for name in pair} <= floats]


@pytest.mark.parametrize("dtype", DTYPES)
def test_xla_finds_no_conversion_between_floats_to_take_away(dtype):
    """Pairs of them are all that its simplification of floats removes, on whatever device."""
    master = jnp.linspace(0.1, 2.0, 64)
    weight, tail = codec.encode(master, dtype)
    assert not conversions_between_floats(lambda master: codec.encode(master, dtype), master)
    assert not conversions_between_floats(codec.decode, weight, tail)
    assert not conversions_between_floats(lambda master: codec.decode(*codec.encode(master, dtype)), master)
    # the same check sees them in the tail that one would write first
    assert conversions_between_floats(lambda master: convert_based(master, dtype), master)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_codec_survives_an_xla_that_keeps_excess_precision(dtype):
    """Evaluate as if every rounding of a float to 16 bits were left out, which XLA may do."""

    def evaluated(jaxpr, *operands):
        values = dict(zip(jaxpr.invars, operands, strict=True))
        for equation in jaxpr.eqns:
            inputs = [atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars]
            if equation.params.get("new_dtype") == jnp.dtype(dtype) and inputs[0].dtype == jnp.float32:
                outputs = inputs
            elif called := equation.params.get("jaxpr") or equation.params.get("call_jaxpr"):
                outputs = evaluated(getattr(called, "jaxpr", called), *inputs)
            else:
                outputs = [equation.primitive.bind(*inputs, **equation.params)]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [values[atom] for atom in jaxpr.outvars]

    def tails(split):
        return np.asarray(evaluated(jax.make_jaxpr(lambda master: split(master, dtype)[1])(master).jaxpr, master)[0])

    master = jnp.linspace(0.1, 2.0, 64)
    assert not tails(convert_based).any()
    np.testing.assert_array_equal(tails(codec.encode), codec.encode(master, dtype)[1])
