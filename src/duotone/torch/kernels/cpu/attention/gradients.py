"""The gradients of attention in BF16, by blocks of queries and panels of keys; nothing of a row's length is kept.

Probabilities are computed again from scores and the rows' `shift` (see `outputs`): `P = 2^(factor * Q K^T - shift)`,
`dP = dO V^T`, `dS = P * (dP - rowsum(dO * O))`, `dQ = scale * dS K`, `dK = scale * dS^T Q`, `dV = P^T dO`
(Dao et al., https://arxiv.org/abs/2205.14135, algorithm 4). `P` and `dS` are rounded to BF16 for the products, all
sums are FP32. A thread computes a head of keys with all of its queries, so that each sum has one order.
"""

from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.attention.job import (
    CAUSAL,
    FACTOR,
    GRAD_KEY,
    GRAD_OUTPUT,
    GRAD_QUERY,
    GRAD_VALUE,
    HEADS,
    KEY,
    KEY_HEADS,
    KEYS,
    MEMORY,
    MEMORY_BYTES,
    OUTPUT,
    PARTS,
    PARTS_TAKEN,
    QUERIES,
    QUERY,
    SCALE,
    SHIFT,
    THREADS,
    VALUE,
    WIDTH,
    head_of,
)  # fmt: skip
from duotone.torch.kernels.cpu.attention.packing import copy_rows, pairer, turn
from duotone.torch.kernels.cpu.attention.sizes import BACKWARD_BLOCK as BLOCK
from duotone.torch.kernels.cpu.attention.sizes import KEY_TILE, LANES, PANEL, TILE
from duotone.torch.kernels.cpu.attention.vectors import multiplier, rows_back
from duotone.torch.kernels.cpu.formats import f32, i64, nearest_bf16, value_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_f64, read_i64, take_next, write_f32

_read_bf16 = value_reader("bfloat16", memory.GRAD)
_write_16 = memory.writer("u16", memory.WEIGHT)
_score = multiplier(TILE, PANEL, False)


def kernel(columns: int) -> Any:
    """Return the kernel for heads whose width is a multiple of `columns`."""
    block, pair_up = _blocker(columns), pairer(columns)

    def run(job):
        thread = take_next(i64(job + 8 * THREADS))
        keys, queries, width = read_i64(job, KEYS), read_i64(job, QUERIES), read_i64(job, WIDTH)
        key_heads = read_i64(job, KEY_HEADS)
        group = read_i64(job, HEADS) // key_heads
        padded = i64((keys + PANEL - 1) // PANEL * PANEL)
        scale, one = f32(read_f64(job, SCALE)), f32(1.0)
        turned_keys = i64(read_i64(job, MEMORY) + thread * read_i64(job, MEMORY_BYTES))
        turned_values = i64(turned_keys + padded * 2 * width)
        paired_keys = i64(turned_values + padded * 2 * width)
        grad_keys = i64(paired_keys + padded * 2 * width)
        grad_values = i64(grad_keys + padded * 4 * width)
        packed = (turned_keys, turned_values, paired_keys, grad_keys, grad_values)
        spare = i64(grad_values + padded * 4 * width)
        size = i64(BLOCK * 2 * width)
        scratch = (
            spare, i64(spare + size), i64(spare + 2 * size), i64(spare + 3 * size), i64(spare + 4 * size),
            i64(spare + 6 * size + 8 * BLOCK), i64(spare + 6 * size),
        )  # fmt: skip
        numbers = (width, keys, padded, read_i64(job, CAUSAL), f32(read_f64(job, FACTOR)))
        while True:
            part = take_next(i64(job + 8 * PARTS_TAKEN))
            if part >= read_i64(job, PARTS):
                break
            batch, key_head = part // key_heads, part % key_heads
            key, value = head_of(job, KEY, batch, key_head), head_of(job, VALUE, batch, key_head)
            turn(key, read_i64(job, KEY + 3), keys, width // 2, turned_keys)
            turn(value, read_i64(job, VALUE + 3), keys, width // 2, turned_values)
            pair_up(key, read_i64(job, KEY + 3), keys, padded, width, paired_keys)
            for place in range(2 * padded * width):
                write_f32(grad_keys, i64(place), f32(0.0))
            for head in range(key_head * group, key_head * group + group):
                for first in range(0, queries, BLOCK):
                    block(job, batch, head, i64(first), i64(min(BLOCK, queries - first)), packed, scratch, numbers)
            into = head_of(job, GRAD_KEY, batch, key_head)
            _write_rows(grad_keys, keys, width, scale, into, read_i64(job, GRAD_KEY + 3))
            into = head_of(job, GRAD_VALUE, batch, key_head)
            _write_rows(grad_values, keys, width, one, into, read_i64(job, GRAD_VALUE + 3))

    return run


def _blocker(columns: int) -> Any:
    add_panel, pair_up = _adder(columns), pairer(columns)

    @compiled
    def block(job, batch, head, first, rows, packed, scratch, numbers):
        queries, grads, paired_queries, paired_grads, grad_queries, _, state = scratch
        width, keys, _, causal, _ = numbers
        query_bytes, grad_bytes = read_i64(job, QUERY + 3), read_i64(job, GRAD_OUTPUT + 3)
        output_bytes = read_i64(job, OUTPUT + 3)
        query = i64(head_of(job, QUERY, batch, head) + first * query_bytes)
        grad = i64(head_of(job, GRAD_OUTPUT, batch, head) + first * grad_bytes)
        output = i64(head_of(job, OUTPUT, batch, head) + first * output_bytes)
        shifts = i64(head_of(job, SHIFT, batch, head) + first * 4)
        copy_rows(query, query_bytes, rows, BLOCK, width // 2, queries)
        copy_rows(grad, grad_bytes, rows, BLOCK, width // 2, grads)
        pair_up(queries, i64(2 * width), BLOCK, BLOCK, width, paired_queries)
        pair_up(grads, i64(2 * width), BLOCK, BLOCK, width, paired_grads)
        for row in range(BLOCK):
            shift, delta = f32(0.0), f32(0.0)
            if row < rows:
                shift = read_f32(shifts, i64(row))
                delta = _delta(i64(grads + row * 2 * width), i64(output + row * output_bytes), width)
            write_f32(state, i64(2 * row), shift)
            write_f32(state, i64(2 * row + 1), delta)
        for place in range(BLOCK * width):
            write_f32(grad_queries, i64(place), f32(0.0))
        limit = keys
        if causal:
            limit = min(keys, first + rows)
        for key in range(0, limit, PANEL):
            add_panel(first, rows, i64(key), packed, scratch, numbers)
        target = i64(head_of(job, GRAD_QUERY, batch, head) + first * read_i64(job, GRAD_QUERY + 3))
        _write_rows(grad_queries, rows, width, f32(read_f64(job, SCALE)), target, read_i64(job, GRAD_QUERY + 3))

    return block


def _adder(columns: int) -> Any:
    """Return a compiled function that adds what a block and a panel have to do with each other to three gradients."""
    add, add_key = multiplier(TILE, columns, True), multiplier(KEY_TILE, columns, True)

    @compiled
    def add_panel(first, rows, key, packed, scratch, numbers):
        _, _, paired_keys, grad_keys, grad_values = packed
        _, _, paired_queries, paired_grads, grad_queries, scores, _ = scratch
        width, _, padded, causal, _ = numbers
        _, rounded, chance_pairs, slope_pairs = _places(scores)
        top, height = _slopes(first, rows, key, packed, scratch, numbers)
        for column in range(0, width, columns):
            for row in range(top, height, TILE):
                # two numbers of 64 keys each: no end is cut off, since what is beyond is zero
                pairs = PANEL // 2
                if causal:
                    pairs = min(pairs, (first + row + TILE - key + 1) // 2)
                add(
                    i64(rounded + row * PANEL * 2), i64(2 * PANEL), i64(4),
                    i64(paired_keys + column * padded * 2 + key // 2 * columns * 4),
                    i64(grad_queries + (row * width + column) * 4), i64(4 * width), i64(pairs),
                )  # fmt: skip
            for place in range(0, PANEL, KEY_TILE):
                start = i64(top)
                if causal:
                    start = i64(max(top, key + place - first) // 2 * 2)
                pairs = i64((height - start) // 2)
                offset = column * BLOCK * 2 + start // 2 * columns * 4
                into = ((key + place) * width + column) * 4
                a = start // 2 * PANEL * 4 + place * 4
                if pairs > 0:
                    add_key(
                        i64(chance_pairs + a), i64(4), i64(4 * PANEL), i64(paired_grads + offset),
                        i64(grad_values + into), i64(4 * width), pairs,
                    )  # fmt: skip
                    add_key(
                        i64(slope_pairs + a), i64(4), i64(4 * PANEL), i64(paired_queries + offset),
                        i64(grad_keys + into), i64(4 * width), pairs,
                    )  # fmt: skip

    return add_panel


@compiled
def _slopes(first, rows, key, packed, scratch, numbers):
    """Write probabilities and gradients of scores of a block and a panel; return the first row and the last."""
    turned_keys, turned_values, _, _, _ = packed
    queries, grads, _, _, _, scores, state = scratch
    width, keys, _, causal, factor = numbers
    slopes, rounded, chance_pairs, slope_pairs = _places(scores)
    height = (rows + TILE - 1) // TILE * TILE
    top = i64(0)
    if causal:
        # the first tile with a row that sees the first key
        top = i64(max(0, key - first) // TILE * TILE)
    for row in range(top, height, TILE):
        a, c = row * 2 * width, row * PANEL * 4
        _score(
            i64(queries + a), i64(2 * width), i64(4), i64(turned_keys + key * 2 * width),
            i64(scores + c), i64(4 * PANEL), i64(width // 2),
        )  # fmt: skip
        _score(
            i64(grads + a), i64(2 * width), i64(4), i64(turned_values + key * 2 * width),
            i64(slopes + c), i64(4 * PANEL), i64(width // 2),
        )  # fmt: skip
    for row in range(top, height, 2):
        visible = min(PANEL, keys - key)
        above, below = visible, visible
        if causal:
            above = min(visible, max(0, first + row + 1 - key))
            below = min(visible, max(0, first + row + 2 - key))
        if row >= rows:
            above = 0
        if row + 1 >= rows:
            below = 0
        line, half = row * PANEL * 4, row * PANEL * 2
        rows_back(
            (
                i64(scores + line), i64(scores + line + 4 * PANEL), i64(slopes + line),
                i64(slopes + line + 4 * PANEL), i64(rounded + half), i64(rounded + half + 2 * PANEL),
                i64(chance_pairs + half), i64(slope_pairs + half), i64(above), i64(below),
            ),
            i64(PANEL // LANES),
            (
                factor, read_f32(state, i64(2 * row)), read_f32(state, i64(2 * row + 2)),
                read_f32(state, i64(2 * row + 1)), read_f32(state, i64(2 * row + 3)),
            ),
        )  # fmt: skip
    return top, height


@compiled
def _places(scores):
    """Return where what comes of scores lies: gradients of probabilities, those of scores, and pairs of both."""
    slopes = i64(scores + BLOCK * PANEL * 4)
    rounded = i64(slopes + BLOCK * PANEL * 4)
    chance_pairs = i64(rounded + BLOCK * PANEL * 2)
    return slopes, rounded, chance_pairs, i64(chance_pairs + BLOCK * PANEL * 2)


@compiled
def _write_rows(source, rows, width, scale, target, row_bytes):
    for row in range(rows):
        into, line = i64(target + row * row_bytes), i64(source + row * width * 4)
        for column in range(width):
            _write_16(into, i64(column), nearest_bf16(f32(read_f32(line, i64(column)) * scale)))


@compiled
def _delta(left, right, width):
    # in eight sums, as vectors add them
    total = f32(0.0)
    for column in range(width):
        total = f32(total + f32(_read_bf16(left, i64(column)) * _read_bf16(right, i64(column))))
    return total
