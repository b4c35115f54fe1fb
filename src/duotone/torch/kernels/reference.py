"""The step's operations in plain torch: short, on any device, and the definition of every bit.

An update takes one operand per parameter, reads everything in its storage dtype, computes in FP32 with one rounding
per operation written in `updates`, and never waits for the device. When `found_inf` is true it writes back what it
read. What depends on hyper-parameters and step counts alone is computed in FP64 and rounded once to FP32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.torch.kernels.checksums import changed_cells, elements_of, sums_of_cells
from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.operands import AverageBatch, Edits, Operand, Rounding
from duotone.torch.kernels.philox import random_16_bits
from duotone.torch.kernels.round_stochastically import round_stochastically
from duotone.torch.kernels.updates.definition import Update

# sums run over chunks of 32 parts of 32 rows of 32 lanes, so that an order that suits every device is one order
PARTS = ROWS = LANES = 32
CHUNK = PARTS * ROWS * LANES


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Read every gradient once and return the sum of squares of the true gradient, and whether any is not finite.

    Args:
        grads: gradients in FP32, BF16 or FP16, of any shape, dense in memory, all on the device of `inverse_scale`;
            may be empty.
        inverse_scale: FP32, 0-d: 1 / loss_scale.

    Returns:
        `sum_of_squares`, FP64, 0-d, and `found_inf`, bool, 0-d. Squares are exact and summed in FP64, where no finite
        gradient overflows, so the flag is exactly "an Inf or a NaN is there".

    >>> total, found_inf = grad_stats([torch.tensor([2.0**100, 0.0])], torch.tensor(0.5))
    >>> total.sqrt().item() == 2.0**99, found_inf.item()
    (True, False)
    """
    sums = [_chunk_sums(_flat(grad).double().square()) for grad in grads]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=inverse_scale.device)
    while total.numel() != 1:
        total = _chunk_sums(total) if total.numel() else total.new_zeros(1)
    total = total.reshape(())
    return total * inverse_scale.double().square(), ~total.isfinite()


def _chunk_sums(values: Tensor) -> Tensor:
    """Return the sum of each chunk: rows in sequence, then parts and lanes by halves."""
    chunks = -(-values.numel() // CHUNK)
    padded = torch.nn.functional.pad(values, (0, chunks * CHUNK - values.numel())).view(chunks, PARTS, ROWS, LANES)
    sums = torch.zeros_like(padded[:, :, 0])
    for row in padded.unbind(2):
        sums = sums + row
    sums = sums.view(chunks, PARTS * LANES)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.view(chunks)


def update(
    definition: Update,
    operands: Sequence[Operand],
    settings: Sequence[Any],
    grad_multiplier: Tensor,
    found_inf: Tensor,
    edits: Edits | None = None,
) -> None:
    """Update weights, tails, moments and counters in place by one step of an optimizer.

    Args:
        definition: the optimizer's update.
        operands: the parameters, as the update's slots say.
        settings: of each parameter group, as `definition.settings`.
        grad_multiplier: FP32, 0-d; gradient times this is what the update sees.
        found_inf: bool, 0-d; if true nothing changes.
        edits: where to note that weights with a tail were changed since the last step; their masters are the weights
            as they are now, cell by cell.
    """
    for operand in operands:
        tail = None if operand.tail is None else _followed(operand, found_inf, edits)
        group = settings[operand.group]
        held = None if definition.counters is None else operand.counters
        counters = () if held is None else held.unbind()
        coefficients, counters = definition.coefficients(group, operand.step, counters)
        grad = _flat(operand.grad).float() * grad_multiplier
        moments = tuple(_flat(moment).float() for moment in operand.moments)
        master, moments = definition.apply(
            -grad if group.maximize else grad, _read_master(operand, tail), moments, coefficients
        )
        _write(operand, group.seed, master, moments, found_inf)
        if held is not None:
            _write_unless(found_inf, held, torch.stack(counters))


def average(batch: AverageBatch, share: Tensor, skipped: Tensor) -> None:
    """Move FP32 averages towards the masters: `average += (master - average) * share`, three operations, each rounded.

    With a share of 1 the average becomes the master itself, whatever it was. NaN and Inf of a master go into the
    average; -0 and subnormals are kept.

    Args:
        batch: the averages, of any memory layout.
        share: FP32, 0-d: what counts of the masters, 1 - decay.
        skipped: bool, 0-d; if true nothing changes.

    >>> from duotone.torch.kernels.operands import AverageOperand
    >>> operand = AverageOperand(torch.ones(2), None, torch.tensor([3.0, -1.0]))
    >>> average(AverageBatch((operand,), {}), torch.tensor(0.25), torch.tensor(False))
    >>> operand.average
    tensor([ 2.5000, -0.5000])
    """
    for weight, tail, kept in batch.operands:
        master = weight.detach().float() if tail is None else decode(weight.detach(), tail)
        moved = torch.where(share == 1.0, master, kept + (master - kept) * share)
        _write_unless(skipped, kept, moved)


def _flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements in the order of memory, which is the order of random bits and of sums."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _followed(operand: Operand, found_inf: Tensor, edits: Edits | None) -> Tensor:
    """Return the tail of an operand, with 0 where its weight was changed; that it was is noted."""
    assert operand.tail is not None
    tail = _flat(operand.tail)
    if operand.checksums is None:
        return tail
    changed = changed_cells(_flat(operand.weight), operand.checksums)
    if edits is not None:
        mark = torch.where(changed.any() & ~found_inf, edits.mark, 0).to(torch.int32)
        for marks in (edits.seen, operand.checksums[-1]):
            marks.bitwise_or_(mark)
    # there the weights are their own masters
    return tail.masked_fill(elements_of(changed, tail.numel()), 0)


def _read_master(operand: Operand, tail: Tensor | None) -> Tensor:
    weight = _flat(operand.weight)
    return weight.float() if tail is None else decode(weight, tail)


def _write(operand: Operand, seed: int, master: Tensor, moments: tuple[Tensor, ...], found_inf: Tensor) -> None:
    def random(stream: int) -> Tensor:
        return random_16_bits(master.numel(), seed=seed, step=operand.step, parameter=operand.number, stream=stream)

    weight = _flat(operand.weight)
    if operand.tail is not None:
        new_weight, new_tail = encode(master, weight.dtype)
        _write_unless(found_inf, _flat(operand.tail), new_tail)
    elif weight.dtype in SPLIT_DTYPES and operand.rounding == Rounding.STOCHASTIC:
        new_weight = round_stochastically(master, weight.dtype, random(0))
    else:
        new_weight = master.to(weight.dtype)
    _write_unless(found_inf, weight, new_weight)
    if operand.checksums is not None:
        _write_unless(found_inf, operand.checksums[:-1], sums_of_cells(weight))
    for stream, (target, moment) in enumerate(zip(operand.moments, moments, strict=True), start=1):
        is_whole = target.dtype == torch.float32
        new_moment = moment if is_whole else round_stochastically(moment, target.dtype, random(stream))
        _write_unless(found_inf, _flat(target), new_moment)
    _write_unless(found_inf, operand.step, operand.step + 1)


def _write_unless(found_inf: Tensor, target: Tensor, value: Tensor) -> None:
    target.copy_(torch.where(found_inf, target, value))
