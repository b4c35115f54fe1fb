"""The split codec on Keras' tensors: the bits of NumPy's reference, and of duotone.torch and duotone.jax."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.jax.weights import numpy_codec
from tests.jax.weights.masters_to_split import masters, pairs

from duotone.keras import backends
from duotone.keras.weights import codec

DTYPES = codec.SPLIT_DTYPES


def run(function, *arguments):
    """Call a function of tensors, on JAX as one program: operations by themselves are compiled for each shape."""
    if keras.backend.backend() == "jax":
        import jax

        function = jax.jit(function)
    return function(*map(ops.convert_to_tensor, arguments))


def split(values, dtype):
    weight, tail = run(lambda master: codec.encode(master, dtype), values)
    assert [keras.backend.standardize_dtype(each.dtype) for each in (weight, tail)] == [dtype, "int16"]
    assert tuple(weight.shape) == tuple(tail.shape) == values.shape
    return ops.convert_to_numpy(backends.bits(weight)).view(np.uint16), ops.convert_to_numpy(tail)


def joined(codes, tails, dtype):
    codes = codes.view(np.int16)
    return ops.convert_to_numpy(run(lambda code, tail: codec.decode(backends.floats(code, dtype), tail), codes, tails))


def same_floats(ours, theirs):
    """Compare bits, and of NaN only that it is one: their payloads are the hardware's affair."""
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    kept = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[kept].view(np.uint32), theirs[kept].view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_gives_the_references_bits(dtype):
    values = masters()
    codes, tails = split(values, dtype)
    expected_codes, expected_tails = numpy_codec.encode(values, dtype)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(tails, expected_tails)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joining_gives_the_references_bits_whatever_the_tail(dtype):
    codes, tails = pairs()
    same_floats(joined(codes, tails, dtype), numpy_codec.decode(codes, tails, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (), (2, 3, 4)])
def test_any_shape(dtype, shape):
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.testing.assert_array_equal(joined(*split(values, dtype), dtype), values)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_give_the_bits_of_duotone_torch(dtype):
    torch = pytest.importorskip("torch")
    kernels = pytest.importorskip("duotone.torch.kernels")
    values = masters()
    weight, tail = kernels.encode(torch.from_numpy(values), getattr(torch, dtype))
    codes, tails = split(values, dtype)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(codes[number], weight.view(torch.int16).numpy().view(np.uint16)[number])
    np.testing.assert_array_equal(tails, tail.numpy())
    codes, tails = pairs()
    weight = torch.from_numpy(codes.view(np.int16)).view(getattr(torch, dtype))
    same_floats(joined(codes, tails, dtype), kernels.decode(weight, torch.from_numpy(tails)).numpy())


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorflows_graphs_and_xla_leave_the_bits_as_they_are(dtype, compiled):
    import tensorflow as tf

    values = masters()[::7]

    @tf.function(jit_compile=compiled)
    def both_ways(master):
        weight, tail = codec.encode(master, dtype)
        return backends.bits(weight), tail, codec.decode(weight, tail)

    codes, tails, again = (each.numpy() for each in both_ways(values))
    expected_codes, expected_tails = numpy_codec.encode(values, dtype)
    np.testing.assert_array_equal(codes.view(np.uint16), expected_codes)
    np.testing.assert_array_equal(tails, expected_tails)
    same_floats(again, numpy_codec.decode(expected_codes, expected_tails, dtype))


@pytest.mark.backends("jax")
@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_gives_the_bits_of_duotone_jax(dtype):
    ours = pytest.importorskip("duotone.jax.weights.codec")
    values = masters()[::7]
    weight, tail = ours.encode(values, dtype)
    codes, tails = split(values, dtype)
    np.testing.assert_array_equal(codes, np.asarray(weight).view(np.uint16))
    np.testing.assert_array_equal(tails, np.asarray(tail))
