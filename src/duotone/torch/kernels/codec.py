"""The split master-weight codec: a 16-bit weight and a 16-bit tail that together are the FP32 master.

BF16: `tail = bits & 0xffff`, `weight = (bits >> 16) + (tail >> 15)`, which is round to nearest, ties away from zero.
FP16: `tail = bits(master) - bits(float32(weight))` with the weight rounded to nearest even, exact for
|weight| >= 2^-16; below that, where FP16's spacing of 2^-24 leaves more than 16 bits behind, the master is kept as
`weight + tail * 2^-40`, within 2^-41. This module defines the bits that every backend must produce.

Whatever outside code writes into a weight, decoding follows it and makes no NaN of it: a tail that cannot belong to its
weight is ignored. Arithmetic is on int32 bit patterns, so FP32 subnormals are exact whatever the flush-to-zero mode.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SPLIT_DTYPES = (torch.bfloat16, torch.float16)

_MAGNITUDE = 0x7FFF_FFFF
_INFINITY = 0x7F80_0000
# 2^-16 in FP32: the smallest |weight| in FP16 whose tail is a difference of bit patterns
_FP16_EXACT = 0x3780_0000
_FP16_UNIT = 2.0**-40
# elements that a CPU encodes at a time: what is made on the way stays in its caches
_PIECE = 1 << 16


def encode(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split FP32 masters into resident weights and their tails.

    Args:
        master: FP32, any shape and layout.
        dtype: `torch.bfloat16` or `torch.float16`.

    Returns:
        The weights in `dtype`, the nearest to the masters, and the tails in int16, both shaped like `master`. NaN
        becomes a quiet NaN with tail 0; Inf, -0 and subnormals are kept exactly. A finite master
        that rounds to Inf keeps its value in BF16; in FP16, whose tail cannot hold it, it becomes Inf (`cast`
        refuses such a weight beforehand).

    >>> weight, tail = encode(torch.tensor([1.0, 1.0 + 2**-8, 1.001]), torch.bfloat16)
    >>> weight.tolist(), tail.tolist()
    ([1.0, 1.0078125, 1.0], [0, -32768, 8389])
    >>> decode(weight, tail).tolist()
    [1.0, 1.00390625, 1.0010000467300415]
    """
    encode_piece = _encode_bfloat16 if dtype == torch.bfloat16 else _encode_float16
    # small ones, which are many, at no call
    if master.numel() <= _PIECE or not _has_pieces(master):
        return encode_piece(master)
    weight, tail = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    _by_pieces(encode_piece, (master,), (weight, tail))
    return weight, tail


def decode(weight: Tensor, tail: Tensor) -> Tensor:
    """Join resident weights and their tails into the FP32 masters; the inverse of `encode`.

    Args:
        weight: BF16 or FP16, any shape and layout.
        tail: int16, shaped like `weight`.

    Returns:
        FP32 masters. A weight that was edited since its tail was made decodes to a value that rounds back to the
        edited weight, or lies half-way to its neighbour; +-0, Inf and NaN decode to themselves when the tail cannot
        be theirs.
    """
    decode_piece = _decode_bfloat16 if weight.dtype == torch.bfloat16 else _decode_float16
    if weight.numel() <= _PIECE or not _has_pieces(weight, tail):
        return decode_piece(weight, tail)
    master = torch.empty_like(weight, dtype=torch.float32)
    _by_pieces(lambda *piece: (decode_piece(*piece),), (weight, tail), (master,))
    return master


def _has_pieces(*tensors: Tensor) -> bool:
    """Return whether tensors are contiguous ones on a CPU, of which pieces are what lies in one place."""
    return all(each.is_cpu and each.is_contiguous() for each in tensors) and not torch.compiler.is_compiling()


@torch.no_grad()
def _by_pieces(
    function: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], results: tuple[Tensor, ...]
) -> None:
    """Fill results with what an elementwise function makes of large tensors, piece by piece."""
    pieces = [tensor.detach().view(-1).split(_PIECE) for tensor in (*given, *results)]
    for piece in zip(*pieces, strict=True):
        made = function(*piece[: len(given)])
        for target, value in zip(piece[len(given) :], made, strict=True):
            target.copy_(value)


def _encode_bfloat16(master: Tensor) -> tuple[Tensor, Tensor]:
    bits = master.view(torch.int32)
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    # in place where memory is new: for large weights, its first touch takes longer than the arithmetic.
    # (bits >> 16) + (tail >> 15)
    high = (bits + 0x8000).bitwise_right_shift_(16).to(torch.int16)
    # rounding could carry a NaN's significand into the sign, so a NaN is made quiet and leaves no tail
    high = torch.where(is_nan, (bits >> 16).to(torch.int16).bitwise_or_(0x40), high)
    return high.view(torch.bfloat16), bits.to(torch.int16).masked_fill_(is_nan, 0)


def _decode_bfloat16(weight: Tensor, tail: Tensor) -> Tensor:
    plain = weight.view(torch.int16).to(torch.int32) << 16
    # (weight - (tail >> 15)) << 16 | tail is this sum, the tail taken as a signed number
    joined = plain + tail
    # a zero cannot have been rounded up to, nor an infinity down to: such a tail belongs to an earlier weight, and
    # with it just these two would become a NaN
    is_nan = (joined & _MAGNITUDE) > _INFINITY
    return torch.where(is_nan, plain, joined).view(torch.float32)


def _encode_float16(master: Tensor) -> tuple[Tensor, Tensor]:
    bits = master.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    nearest = master.to(torch.float16)
    # below 2^-16 the master is first put on the grid of 2^-40, then split as an integer of that unit
    small = magnitude < _FP16_EXACT
    units = torch.where(small, master * 2.0**40, 0.0).round().to(torch.int32)
    high_units = (units + 0x8000) >> 16
    fixed = (high_units.to(torch.float32) * 2.0**-24).copysign(master).to(torch.float16)
    weight = torch.where(small, fixed, nearest)
    weight_bits = weight.to(torch.float32).view(torch.int32)
    tail = torch.where((weight_bits & _MAGNITUDE) < _FP16_EXACT, units - (high_units << 16), bits - weight_bits)
    return weight, tail.masked_fill((weight_bits & _MAGNITUDE) >= _INFINITY, 0).to(torch.int16)


def _decode_float16(weight: Tensor, tail: Tensor) -> Tensor:
    plain = weight.to(torch.float32)
    bits = plain.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    difference = tail.to(torch.int32)
    joined = (bits + difference).view(torch.float32)
    # a tail that leads to another weight was made for another weight
    exact = torch.where(joined.to(torch.float16) == weight, joined, plain)
    fixed = plain + difference.to(torch.float32) * _FP16_UNIT
    master = torch.where(magnitude < _FP16_EXACT, fixed, exact)
    return torch.where((difference == 0) | (magnitude >= _INFINITY), plain, master)
