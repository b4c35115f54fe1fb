"""Rounding and the master-weight codec as CUDA kernels compute them, exhaustively; `test_cuda.py` runs this."""

import numpy as np
import pytest
import torch

from duotone.torch.kernels import decode, encode
from duotone.torch.kernels.round_stochastically import round_stochastically

triton = pytest.importorskip("triton", reason="the cuda backend needs Triton")
tl = pytest.importorskip("triton.language")
from duotone.torch.kernels.cuda import formats  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
EVERY_16_BITS = np.arange(2**16, dtype=np.uint32)
# where the tail's sign and the rounding of BF16 turn
EDGES = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
BLOCK = 4096
DTYPES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# modules are not seen from inside a kernel, functions are
encode_tile, decode_tile = formats.encode, formats.decode
nearest_tile, stochastic_tile = formats.round_to_nearest, formats.round_stochastically


@triton.jit
def encode_kernel(masters, weights, tails, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight, tail = encode_tile(tl.load(masters + offsets), FORMAT)
    tl.store(weights + offsets, weight.to(tl.int16))
    tl.store(tails + offsets, tail.to(tl.int16))


@triton.jit
def decode_kernel(weights, tails, masters, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight, tail = tl.load(weights + offsets).to(tl.int32), tl.load(tails + offsets).to(tl.int32)
    tl.store(masters + offsets, decode_tile(weight, tail, FORMAT))


@triton.jit
def round_kernel(values, random, nearest, stochastic, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + offsets)
    tl.store(nearest + offsets, nearest_tile(value, FORMAT).to(tl.int16))
    tl.store(stochastic + offsets, stochastic_tile(value, tl.load(random + offsets), FORMAT).to(tl.int16))


def padded(tensor):
    """Return a tensor on the device with zeros behind it, up to a whole block."""
    return torch.nn.functional.pad(tensor, (0, -tensor.numel() % BLOCK)).to(DEVICE)


def run(kernel, *tensors, dtype):
    name = str(dtype).removeprefix("torch.")
    blocks = tensors[0].numel() // BLOCK
    kernel[(blocks,)](*tensors, FORMAT=name, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)


def same(own, expected):
    """Compare bits, but those of NaNs."""
    own = own[: expected.numel()].cpu().view(expected.dtype)
    integers = torch.int16 if own.element_size() == 2 else torch.int32
    return ((own.view(integers) == expected.view(integers)) | (own.isnan() & expected.isnan())).all()


def adversarial_values(dtype):
    """Return FP32 of every upper half, and FP16's numbers and ties with their neighbours; NaNs of all payloads."""
    drawn = np.random.default_rng(0).integers(0, 2**16, EVERY_16_BITS.size, np.uint32)
    bits = [(EVERY_16_BITS << 16) | low for low in (*EDGES, drawn)]
    if dtype == torch.float16:
        numbers = EVERY_16_BITS.astype(np.uint16).view(np.float16).astype(np.float64)
        numbers = np.unique(numbers[np.isfinite(numbers)])
        ties = (numbers[1:] + numbers[:-1]) / 2
        near = np.concatenate([numbers, ties]).astype(np.float32).view(np.uint32)
        # the grid of 2^-40 below 2^-16, and the ties between its points
        fixed = (np.arange(2**16) * 251 + 0.5) * 2.0**-40
        bits += [near, near + 1, near - 1, fixed.astype(np.float32).view(np.uint32)]
    return torch.from_numpy(np.concatenate(bits).astype(np.uint32).view(np.float32))


def fractions(values, dtype):
    """Return which part of 2^16 rounding down in magnitude discards, rounded down."""
    if dtype == torch.bfloat16:
        return values.view(torch.int32) & 0xFFFF
    exponent = torch.frexp(values).exponent.clamp(min=-13)
    scaled = torch.ldexp(values.double().abs().nan_to_num(0.0, 0.0), 11 - exponent)
    return ((scaled - scaled.floor()) * 2.0**16).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoding(dtype):
    masters = adversarial_values(dtype)
    weights, tails = (torch.empty(padded(masters).numel(), dtype=torch.int16, device=DEVICE) for _ in range(2))
    run(encode_kernel, padded(masters), weights, tails, dtype=dtype)
    expected_weights, expected_tails = encode(masters, dtype)
    assert same(weights, expected_weights)
    assert torch.equal(tails[: masters.numel()].cpu(), expected_tails)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_whatever_weight_and_tail(dtype):
    drawn = np.random.default_rng(1).integers(0, 2**16, (4, EVERY_16_BITS.size))
    tails = np.concatenate([np.full(EVERY_16_BITS.size, edge) for edge in EDGES] + [*drawn])
    tails = torch.from_numpy(tails.astype(np.uint16).view(np.int16))
    weights = torch.from_numpy(np.tile(EVERY_16_BITS, len(EDGES) + 4).astype(np.uint16).view(np.int16))
    masters = torch.empty(weights.numel(), device=DEVICE)
    run(decode_kernel, padded(weights), padded(tails), masters, dtype=dtype)
    assert same(masters, decode(weights.view(dtype), tails))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("above", [0, 1, 2, None])
def test_rounding(dtype, above):
    values = adversarial_values(dtype)
    if above is None:
        random = torch.randint(0, 2**16, values.shape, generator=torch.Generator().manual_seed(0))
    else:
        # the least bits that round up, and their neighbours
        random = (2**16 - fractions(values, dtype) - 1 + above).clamp(0, 2**16 - 1)
    random = random.to(torch.int32)
    nearest, stochastic = (torch.empty(padded(values).numel(), dtype=torch.int16, device=DEVICE) for _ in range(2))
    run(round_kernel, padded(values), padded(random), nearest, stochastic, dtype=dtype)
    assert same(nearest, values.to(dtype))
    assert same(stochastic, round_stochastically(values, dtype, random))
