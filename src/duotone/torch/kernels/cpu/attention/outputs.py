"""Attention of BF16 by blocks of queries: `_softmax(scale * Q K^T) V`, and the log of each row's sum.

The softmax is taken over some keys at a time, in FP32, with the largest score so far (Milakov and Gimelshein,
https://arxiv.org/abs/1805.02867); probabilities before their division by the sum are rounded to BF16 for the product
with the values (Dao et al., https://arxiv.org/abs/2205.14135). What a causal mask hides is not multiplied but for the
ends of tiles. The log is to the base of 2: a probability is `2^(factor * score - shift)`, `factor = scale / log 2`.
"""

import math
from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.attention.job import (
    CAUSAL,
    FACTOR,
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
    SHIFT,
    SLICES,
    THREADS,
    VALUE,
    WIDTH,
    head_of,
)  # fmt: skip
from duotone.torch.kernels.cpu.attention.packing import copy_rows, pairer, turn
from duotone.torch.kernels.cpu.attention.sizes import BLOCK, CHUNK, LANES, PANEL, TILE
from duotone.torch.kernels.cpu.attention.vectors import multiplier, row_exp, row_max
from duotone.torch.kernels.cpu.formats import f32, i64, nearest_bf16
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_f64, read_i64, take_next, write_f32

_write_16 = memory.writer("u16", memory.WEIGHT)
_LOG_2 = f32(math.log(2.0))
_score = multiplier(TILE, PANEL, False)


def kernel(columns: int) -> Any:
    """Return the kernel for heads whose width is a multiple of `columns`."""
    weigh_values, pack = _weigher(columns), _packer(columns)

    @compiled
    def block(job, batch, head, first, rows, turned, paired, scratch, numbers):
        width, _, causal, _ = numbers
        tiles = i64((rows + TILE - 1) // TILE)
        row_bytes = read_i64(job, QUERY + 3)
        query = i64(head_of(job, QUERY, batch, head) + first * row_bytes)
        copy_rows(query, row_bytes, rows, i64(tiles * TILE), i64(width // 2), scratch[0])
        limit = read_i64(job, KEYS)
        if causal:
            limit = i64(min(limit, first + rows))
        for start in range(0, limit, CHUNK):
            end = i64(min(limit, start + CHUNK))
            _score_keys(first, tiles, i64(start), end, turned, scratch, numbers)
            weigh_values(first, tiles, i64(start), end, paired, scratch, numbers)
        _write_block(job, batch, head, first, rows, scratch, numbers)

    def run(job):
        thread = take_next(i64(job + 8 * THREADS))
        keys, queries, width = read_i64(job, KEYS), read_i64(job, QUERIES), read_i64(job, WIDTH)
        heads, key_heads, slices = read_i64(job, HEADS), read_i64(job, KEY_HEADS), read_i64(job, SLICES)
        padded = i64((keys + PANEL - 1) // PANEL * PANEL)
        turned = i64(read_i64(job, MEMORY) + thread * read_i64(job, MEMORY_BYTES))
        paired = i64(turned + padded * 2 * width)
        spare = i64(paired + padded * 2 * width)
        scores = i64(spare + BLOCK * 2 * width)
        chances = i64(scores + BLOCK * 4 * CHUNK)
        output = i64(chances + BLOCK * 2 * CHUNK)
        scratch = (spare, scores, chances, output, i64(output + BLOCK * 4 * width))
        numbers = (width, padded, read_i64(job, CAUSAL), f32(read_f64(job, FACTOR)))
        blocks, packed = i64((queries + BLOCK - 1) // BLOCK), i64(-1)
        while True:
            part = take_next(i64(job + 8 * PARTS_TAKEN))
            if part >= read_i64(job, PARTS):
                break
            batch, head, part_of_head = i64(part // slices // heads), i64(part // slices % heads), part % slices
            key_head = i64(head // (heads // key_heads))
            if packed != batch * key_heads + key_head:
                packed = i64(batch * key_heads + key_head)
                pack(job, batch, key_head, padded, turned, paired)
            # a query sees more the later it is: every slice gets blocks of all kinds
            for number in range(part_of_head, blocks, slices):
                first = i64(number * BLOCK)
                rows = i64(min(BLOCK, queries - first))
                block(job, batch, head, first, rows, turned, paired, scratch, numbers)

    return run


@compiled
def _softmax(line, into, state, output, row, visible, vectors, is_first, factor, width):
    """Take the softmax of a row over some keys; the state is the largest score so far and the sum."""
    largest, total = row_max(line, visible, vectors), f32(0.0)
    if not is_first:
        before, total = read_f32(state, i64(2 * row)), read_f32(state, i64(2 * row + 1))
        largest = max(before, largest)
        if largest != before:
            share = f32(math.exp(f32(f32(f32(before - largest) * factor) * _LOG_2)))
            total = f32(total * share)
            for column in range(width):
                place = i64(row * width + column)
                write_f32(output, place, f32(read_f32(output, place) * share))
    total = f32(total + row_exp(line, into, visible, vectors, factor, f32(largest * factor)))
    write_f32(state, i64(2 * row), largest)
    write_f32(state, i64(2 * row + 1), total)


@compiled
def _score_keys(first, tiles, start, end, turned, scratch, numbers):
    """Multiply a block of queries by some keys, past tiles that a causal mask hides."""
    queries, scores, _, _, _ = scratch
    width, _, causal, _ = numbers
    for key in range(start, end, PANEL):
        for tile in range(tiles):
            if not causal or key <= first + tile * TILE + TILE - 1:
                a, c = tile * TILE * 2 * width, tile * TILE * 4 * CHUNK + (key - start) * 4
                _score(
                    i64(queries + a), i64(2 * width), i64(4), i64(turned + key * 2 * width),
                    i64(scores + c), i64(4 * CHUNK), i64(width // 2),
                )  # fmt: skip


@compiled
def _write_block(job, batch, head, first, rows, scratch, numbers):
    _, _, _, output, state = scratch
    width, _, _, factor = numbers
    row_bytes = read_i64(job, OUTPUT + 3)
    shifts = head_of(job, SHIFT, batch, head)
    target = head_of(job, OUTPUT, batch, head)
    for row in range(rows):
        largest, total = read_f32(state, i64(2 * row)), read_f32(state, i64(2 * row + 1))
        shift = f32(f32(largest * factor) + f32(f32(math.log(total)) / _LOG_2))
        write_f32(shifts, i64(first + row), shift)
        inverse = f32(f32(1.0) / total)
        into = i64(target + (first + row) * row_bytes)
        for column in range(width):
            value = f32(read_f32(output, i64(row * width + column)) * inverse)
            _write_16(into, i64(column), nearest_bf16(value))


def _weigher(columns: int) -> Any:
    put, add = multiplier(TILE, columns, False), multiplier(TILE, columns, True)

    @compiled
    def weigh_values(first, tiles, start, end, paired, scratch, numbers):
        """Take the softmax over some keys, and add their values weighed."""
        _, scores, chances, output, state = scratch
        width, padded, causal, factor = numbers
        for tile in range(tiles):
            # keys that the tile's last query sees
            seen = end - start
            if causal:
                seen = min(seen, first + tile * TILE + TILE - start)
            vectors = i64((seen + LANES - 1) // LANES)
            for row in range(tile * TILE, tile * TILE + TILE):
                visible = i64(seen)
                if causal:
                    visible = i64(min(seen, first + row + 1 - start))
                line, into = i64(scores + row * 4 * CHUNK), i64(chances + row * 2 * CHUNK)
                if visible > 0:
                    _softmax(line, into, state, output, row, visible, vectors, start == 0, factor, width)
                else:
                    # zeros
                    row_exp(line, into, i64(0), i64(max(0, vectors)), factor, f32(0.0))
            a, pairs = i64(chances + tile * TILE * 2 * CHUNK), i64((seen + 1) // 2)
            for column in range(0, width, columns):
                b = i64(paired + column * padded * 2 + start // 2 * columns * 4)
                c = i64(output + (tile * TILE * width + column) * 4)
                if start == 0:
                    put(a, i64(2 * CHUNK), i64(4), b, c, i64(4 * width), pairs)
                elif pairs > 0:
                    add(a, i64(2 * CHUNK), i64(4), b, c, i64(4 * width), pairs)

    return weigh_values


def _packer(columns: int) -> Any:
    pair_up = pairer(columns)

    @compiled
    def pack(job, batch, key_head, padded, turned, paired):
        keys, width = read_i64(job, KEYS), read_i64(job, WIDTH)
        key_bytes, value_bytes = read_i64(job, KEY + 3), read_i64(job, VALUE + 3)
        turn(head_of(job, KEY, batch, key_head), key_bytes, keys, i64(width // 2), turned)
        pair_up(head_of(job, VALUE, batch, key_head), value_bytes, keys, padded, width, paired)

    return pack
