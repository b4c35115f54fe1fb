"""The updates on the CPU: one kernel per optimizer and form of storage, over the chunks of all of its parameters.

A kernel takes pieces of work from a common counter, so that it may run on any number of threads, and reads a
parameter's coefficients, which `coefficients` has computed before. The arithmetic is that of `reference`, operation
by operation.
"""

import math
from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.coefficients import COEFFICIENTS
from duotone.torch.kernels.cpu.formats import f32, i64, master_reader, master_writer, moment_writer, value_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_i64, take_next
from duotone.torch.kernels.cpu.random import TILE, fill_tile
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import GRAD, MOMENT1, MOMENT2, NUMBER, NUMEL, TAIL, WEIGHT, Form

# words of a job
COUNTER, PIECES, PIECE_COUNT, CHUNKS, PARAMETERS, COEFFICIENT_TABLE, DRAWS, COLUMNS = range(8)

_read_random = memory.reader("u16", memory.RANDOM)
_random_tiles = memory.stack(3 * 2 * TILE)


def kernel(optimizer: str, form: Form) -> Any:
    """Return the kernel of an optimizer (`adamw`, `sgd` or `lion`) for operands of a form."""
    elements = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}[optimizer](form)
    weight_is_random = form.weight.endswith("+stochastic")
    moments_are_random = form.moments == "bfloat16"
    # without random bits there is no reason to stop between
    tile = TILE if weight_is_random or moments_are_random else CHUNK

    @compiled
    def chunk(operand, coefficients, draw, start, stop, tiles):
        step, seed, index = read_i64(draw, 0), read_i64(draw, 1), read_i64(operand, NUMBER)
        while start < stop:
            end = min(start + tile, stop)
            if weight_is_random:
                fill_tile(tiles, start, end, seed, step, index)
            if moments_are_random:
                fill_tile(tiles + 2 * TILE, start, end, seed, step, index | (1 << 30))
                fill_tile(tiles + 4 * TILE, start, end, seed, step, index | (2 << 30))
            elements(operand, coefficients, tiles, i64(start), i64(end))
            start = end

    def run(job):
        tiles = _random_tiles()
        while True:
            piece = take_next(read_i64(job, COUNTER))
            if piece >= read_i64(job, PIECE_COUNT):
                break
            bounds = read_i64(job, PIECES)
            for number in range(read_i64(bounds, piece), read_i64(bounds, piece + 1)):
                row = read_i64(read_i64(job, CHUNKS), 2 * number)
                start = read_i64(read_i64(job, CHUNKS), 2 * number + 1)
                operand = read_i64(job, PARAMETERS) + 8 * read_i64(job, COLUMNS) * row
                coefficients = read_i64(job, COEFFICIENT_TABLE) + 4 * COEFFICIENTS * row
                draw = read_i64(job, DRAWS) + 16 * row
                chunk(operand, coefficients, draw, start, min(start + CHUNK, read_i64(operand, NUMEL)), tiles)

    return run


def _adamw(form: Form) -> Any:
    read_grad, read_master, write_master = _columns(form)
    read_exp_avg, write_exp_avg = _moment(form, memory.MOMENT1)
    read_exp_avg_sq, write_exp_avg_sq = _moment(form, memory.MOMENT2)

    @compiled
    def elements(operand, coefficients, random, start, stop):
        grad_address, weight, tail = read_i64(operand, GRAD), read_i64(operand, WEIGHT), read_i64(operand, TAIL)
        moment1, moment2 = read_i64(operand, MOMENT1), read_i64(operand, MOMENT2)
        multiplier, kept, step_size, eps = (
            read_f32(coefficients, 0),
            read_f32(coefficients, 1),
            read_f32(coefficients, 2),
            read_f32(coefficients, 3),
        )
        beta2, rest1, rest2 = read_f32(coefficients, 4), read_f32(coefficients, 5), read_f32(coefficients, 6)
        for i in range(start, stop):
            grad = read_grad(grad_address, i) * multiplier
            exp_avg = read_exp_avg(moment1, i)
            exp_avg = exp_avg + (grad - exp_avg) * rest1
            exp_avg_sq = read_exp_avg_sq(moment2, i) * beta2 + (grad * grad) * rest2
            master = read_master(weight, tail, i) * kept - (exp_avg / (math.sqrt(exp_avg_sq) + eps)) * step_size
            write_exp_avg(moment1, i, exp_avg, _read_random(random, TILE + i - start))
            write_exp_avg_sq(moment2, i, exp_avg_sq, _read_random(random, 2 * TILE + i - start))
            write_master(weight, tail, i, master, _read_random(random, i - start))

    return elements


def _sgd(form: Form) -> Any:
    read_grad, read_master, write_master = _columns(form)
    has_momentum = form.moments != "none"
    read_buffer, write_buffer = _moment(form, memory.MOMENT1)

    @compiled
    def elements(operand, coefficients, random, start, stop):
        grad_address, weight, tail = read_i64(operand, GRAD), read_i64(operand, WEIGHT), read_i64(operand, TAIL)
        moment1 = read_i64(operand, MOMENT1)
        multiplier, lr, weight_decay = read_f32(coefficients, 0), read_f32(coefficients, 1), read_f32(coefficients, 2)
        momentum, undamped = read_f32(coefficients, 3), read_f32(coefficients, 4)
        decays, nesterov, is_first = (
            read_f32(coefficients, 5) != f32(0.0),
            read_f32(coefficients, 6) != f32(0.0),
            read_f32(coefficients, 7) != f32(0.0),
        )
        for i in range(start, stop):
            grad = read_grad(grad_address, i) * multiplier
            master = read_master(weight, tail, i)
            if decays:
                grad = grad + master * weight_decay
            if has_momentum:
                buffer = read_buffer(moment1, i) * momentum + grad * undamped
                if is_first:
                    buffer = grad
                write_buffer(moment1, i, buffer, _read_random(random, TILE + i - start))
                looked_ahead = grad + buffer * momentum
                grad = buffer
                if nesterov:
                    grad = looked_ahead
            write_master(weight, tail, i, master - grad * lr, _read_random(random, i - start))

    return elements


def _lion(form: Form) -> Any:
    read_grad, read_master, write_master = _columns(form)
    read_exp_avg, write_exp_avg = _moment(form, memory.MOMENT1)

    @compiled
    def elements(operand, coefficients, random, start, stop):
        grad_address, weight, tail = read_i64(operand, GRAD), read_i64(operand, WEIGHT), read_i64(operand, TAIL)
        moment1 = read_i64(operand, MOMENT1)
        multiplier, lr, kept = read_f32(coefficients, 0), read_f32(coefficients, 1), read_f32(coefficients, 2)
        beta1, rest1 = read_f32(coefficients, 3), read_f32(coefficients, 4)
        beta2, rest2 = read_f32(coefficients, 5), read_f32(coefficients, 6)
        for i in range(start, stop):
            grad = read_grad(grad_address, i) * multiplier
            exp_avg = read_exp_avg(moment1, i)
            direction = exp_avg * beta1 + grad * rest1
            # a NaN stays one
            if direction > f32(0.0):
                direction = f32(1.0)
            elif direction < f32(0.0):
                direction = f32(-1.0)
            elif direction == f32(0.0):
                direction = f32(0.0)
            master = read_master(weight, tail, i) * kept - direction * lr
            write_exp_avg(moment1, i, exp_avg * beta2 + grad * rest2, _read_random(random, TILE + i - start))
            write_master(weight, tail, i, master, _read_random(random, i - start))

    return elements


def _columns(form: Form) -> tuple[Any, Any, Any]:
    return value_reader(form.grad, memory.GRAD), master_reader(form.weight), master_writer(form.weight)


def _moment(form: Form, stream: int) -> tuple[Any, Any]:
    dtype = "float32" if form.moments == "none" else form.moments
    return value_reader(dtype, stream), moment_writer(dtype, stream)
