"""Checksums of 16-bit weights, by which a step notices what others have written into them since the last one.

A cell is `CELL` elements in the order of memory, the last one perhaps fewer. With weights and factors as signed 16-bit
integers, its checksum is `sum(weight[i] * factor[i]) mod 2^32`, where `factor[i] = (2 i + 1) * FACTOR mod 2^16` is odd
and another one for each place: no change of one element and no exchange of two leaves it as it was, and 1 in 2^32 or so
of all others. A checksum of 0 is stored as 1, for 0 says that it is not known, and then nothing is compared.

Checksums of a parameter are one int32 tensor: those of its cells, and behind them the marks of the steps that have
found a cell changed (`Edits.mark`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

CELL = 512
# 2^16 divided by the golden ratio, so that the factors of neighbours have little in common
FACTOR = 40503
# elements that are read at a time, a multiple of CELL: what is made of them stays in a CPU's cache
AT_A_TIME = 1 << 20


def unknown(weight: Tensor) -> Tensor:
    """Return the checksums of a weight of which nothing is known.

    >>> unknown(torch.zeros(513, dtype=torch.bfloat16))
    tensor([0, 0, 0], dtype=torch.int32)
    """
    return torch.zeros(-(-weight.numel() // CELL) + 1, dtype=torch.int32, device=weight.device)


def sums_of_cells(weight: Tensor) -> Tensor:
    """Return the checksum of each cell of a weight: int32, never 0.

    Args:
        weight: BF16 or FP16, 1-d, dense.

    >>> sums_of_cells(torch.tensor([0.0, 1.0], dtype=torch.bfloat16)), sums_of_cells(torch.zeros(0).half())
    (tensor([-155456128], dtype=torch.int32), tensor([], dtype=torch.int32))
    """
    if weight.is_cpu and weight.numel() > AT_A_TIME:
        return torch.cat(list(map(sums_of_cells, weight.split(AT_A_TIME))))
    bits = weight.view(torch.int16)
    whole = bits.numel() // CELL * CELL
    factors = _factors(weight.device)
    parts = [_dot(bits[:whole].view(-1, CELL), factors)]
    if whole < bits.numel():
        parts.append(_dot(bits[None, whole:], factors[: bits.numel() - whole]))
    sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    return sums.masked_fill_(sums == 0, 1)


def sums_of_each(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what `sums_of_cells` returns for each of some weights; small ones on one device are read together.

    >>> [sums.tolist() for sums in sums_of_each([torch.tensor([0.0, 1.0]).bfloat16(), torch.zeros(0).half()])]
    [[-155456128], []]
    """
    batch: list[Tensor] = []
    numel = 0
    for weight in weights:
        numel += weight.numel()
        if batch and (numel > AT_A_TIME or weight.device != batch[0].device):
            yield from _sums_together(batch)
            batch, numel = [], weight.numel()
        batch.append(weight)
    yield from _sums_together(batch)


def changed_cells(weight: Tensor, checksums: Tensor) -> Tensor:
    """Return for each cell of a weight, 1-d, whether it is known to have been another one: bool."""
    return is_other(sums_of_cells(weight), checksums)


def is_other(sums: Tensor, checksums: Tensor) -> Tensor:
    """Return for each of the cells with some sums, as `sums_of_cells` gives them, whether it was another one: bool."""
    known = checksums[:-1]
    return (known != 0) & (known != sums)


def elements_of(cells: Tensor, numel: int) -> Tensor:
    """Return what is given for each cell for each of its elements, of which there are `numel` in all."""
    return cells.repeat_interleave(CELL)[:numel]


def _sums_together(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(weights) < 2:
        return list(map(sums_of_cells, weights))
    # zeros add nothing to a checksum
    zeros = torch.zeros(CELL, dtype=torch.int16, device=weights[0].device)
    sizes = [weight.numel() for weight in weights]
    padded = [
        part
        for weight, numel in zip(weights, sizes, strict=True)
        for part in (weight.view(torch.int16), zeros[: -numel % CELL])
    ]
    return sums_of_cells(torch.cat(padded)).split([-(-numel // CELL) for numel in sizes])


def _dot(bits: Tensor, factors: Tensor) -> Tensor:
    # int32 wraps around, as it is meant to
    return bits.to(torch.int32).mul_(factors).sum(dim=1, dtype=torch.int32)


def _factors(device: torch.device) -> Tensor:
    places = torch.arange(CELL, dtype=torch.int32, device=device)
    return ((2 * places + 1) * FACTOR).to(torch.int16).to(torch.int32)
