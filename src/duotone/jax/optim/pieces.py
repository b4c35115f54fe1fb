"""The update of 16-bit weights in place and in pieces: what XLA's compilers for CPUs and TPUs do not do by themselves.

    for each piece:  (weight, tail, moments)[piece] = update((weight, tail, moments, gradient)[piece])

For GPUs XLA makes one kernel of a parameter's update, which reads everything once and writes in its place. For CPUs it
makes a kernel of each result, and keeps what they share in memory: 6 to 12 bytes for each parameter, more than 16-bit
weights save. Here a loop updates pieces that fit a cache, each in its place; nothing else exists for more than a piece
at a time, and a step that is skipped touches nothing. What the optimizer's program allows decides: see `elementwise`.
On a TPU a kernel does it, see `tpu_kernel`.

With several devices in a process nothing says, when a program is traced, which arrays are sharded; XLA's own program
stands then.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duotone.jax import internals
from duotone.jax.optim import tpu_kernel
from duotone.jax.optim.elementwise import Part, find_parts, flattened, run_for
from duotone.jax.weights.codec import TAIL_DTYPE

# of all parameters in a step: one of 64, so that all that lies between takes a fraction of a byte for each parameter;
# but not so few that the loop itself takes long
_PIECES = 64
_SMALLEST_PIECE = 1 << 14
# places are 32-bit integers
LARGEST_SIZE = 1 << 30
# XLA's CPU compiler has no moves of BF16: around every slice it converts the whole array to FP32 and back. So a section
# of BF16 weights is moved as integers, which takes memory, at most for this fraction of all parameters
_LARGEST_SECTION = 0.375
_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def are_possible() -> bool:
    """Return whether updates can run in pieces: in a process with one device, a CPU, outside of any mesh."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty


def kernels_are_possible() -> bool:
    """Return whether updates can run as kernels: in a process with one device, a TPU, outside of any mesh."""
    return jax.default_backend() == "tpu" and jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty


def update_in_pieces(function: Callable[[Any], tuple[Any, Any]], moved: Any, is_due: jax.Array) -> tuple[Any, Any]:
    """Return `function(moved)`, computed in pieces where that saves memory.

    Args:
        function: returns what takes the place of `moved`, a pytree of one structure with it, and anything else.
        moved: weights, tails and an optimizer's state.
        is_due: bool, 0-d: whether `function` changes `moved` at all. XLA must not see that it is a constant.

    Returns:
        What `function` returns; numbers may differ in their last bits.
    """
    leaves, structure = jax.tree.flatten(moved)
    are_kernels = kernels_are_possible()
    if not (are_possible() or are_kernels) or all(map(internals.is_concrete, leaves)):
        return function(moved)
    if not any(map(_is_split, leaves)):
        return function(moved)
    program, (new, rest) = jax.make_jaxpr(function, return_shape=True)(moved)
    if jax.tree.structure(new) != structure:
        return function(moved)
    called, constants = internals.opened(program)
    operands = [*constants, *leaves]
    flat, captured = internals.opened(jax.make_jaxpr(functools.partial(_run, called))(*operands))
    pays = tpu_kernel.is_suited if are_kernels else _pays
    plan = _Plan(flat, len(captured) + len(constants), len(leaves), pays)
    if not plan.parts:
        return function(moved)
    run = {"tpu": plan.run_in_kernels} if are_kernels else {"cpu": plan.run_in_pieces}
    results = _either(plan, run, called, is_due, [*captured, *operands])
    return structure.unflatten(results[: len(leaves)]), jax.tree.structure(rest).unflatten(results[len(leaves) :])


def piece_length(total: int) -> int:
    """Return how many elements a piece has, of so many in all."""
    return max(_SMALLEST_PIECE, total // _PIECES)


def batches(things: Sequence[Any], sizes: Sequence[int], largest: int) -> list[list[Any]]:
    """Return things in their order, in lists that are not larger together than `largest`, or of one thing.

    >>> batches("abcd", [1, 2, 2, 9], 4)
    [['a', 'b'], ['c'], ['d']]
    """
    found: list[list[Any]] = []
    room = 0
    for thing, size in zip(things, sizes, strict=True):
        if size > room or not found:
            found.append([])
            room = largest
        found[-1].append(thing)
        room -= size
    return found


class _Plan:
    """What of a program runs in pieces.

    Attributes:
        jaxpr: an open one without calls.
        parts: those of its results that do.
        olds: for each part, the operands whose places its results take.
        total: how many elements the parts have together.
    """

    def __init__(self, jaxpr: Any, first: int, count: int, pays: Callable[[Part], bool]) -> None:
        variables = (*jaxpr.constvars, *jaxpr.invars)[first : first + count]
        old = [_type(variable) for variable in variables]
        is_paired = [place < count and _type(each) == old[place] for place, each in enumerate(jaxpr.outvars)]
        self.jaxpr = jaxpr
        # what a program prints or calls belongs to its place among the rest
        found = [] if jaxpr.effects else find_parts(jaxpr, is_paired)
        self.parts = [part for part in found if pays(part)]
        self.olds = [[variables[place] for place in part.results] for part in self.parts]
        self.total = sum(part.size for part in self.parts)

    def run_in_kernels(self, _: jax.Array, *operands: Any) -> list[Any]:
        """Return the program's results, those of each part from a kernel for TPUs."""
        results, values = self._run_rest(operands)
        for part, olds in zip(self.parts, self.olds, strict=True):
            results.update(tpu_kernel.update(part, olds, values))
        return self._in_order(results)

    def run_in_pieces(self, is_due: jax.Array, *operands: Any) -> list[Any]:
        """Return the program's results, those of each part piece by piece."""
        results, values = self._run_rest(operands)
        length = piece_length(self.total)
        loops = [_Loop(part, old, values) for part, old in zip(self.parts, self.olds, strict=True)]
        for loop in loops:
            if loop.part.size > length:
                share = loop.part.size / (_LARGEST_SECTION * self.total)
                results.update(loop.run_in_sections(is_due, length, max(1, round(share))))
        small = [loop for loop in loops if loop.part.size <= length]
        for batch in batches(small, [loop.part.size for loop in small], length):
            results.update(_run_together(batch, is_due))
        return self._in_order(results)

    def _run_rest(self, operands: Sequence[Any]) -> tuple[dict[int, Any], dict[Any, Any]]:
        """Return the results that are in no part, by their places, and what the parts read."""
        wanted = dict(enumerate(self.jaxpr.outvars))
        for part in self.parts:
            for place in part.results:
                del wanted[place]
        needed = [variable for part in self.parts for variable in (*part.arrays, *part.scalars)]
        values = run_for(self.jaxpr, [*wanted.values(), *needed], operands)
        results = {
            place: internals.literal_value(each) if isinstance(each, internals.Literal) else values[each]
            for place, each in wanted.items()
        }
        return results, values

    def _in_order(self, results: dict[int, Any]) -> list[Any]:
        return [_typed(results[place], variable.aval) for place, variable in enumerate(self.jaxpr.outvars)]


class _Loop:
    """A part with the values that it reads, all arrays flat."""

    def __init__(self, part: Part, olds: Sequence[Any], values: dict[Any, Any]) -> None:
        self.part = part
        self._olds = olds
        self._scalars = {variable: values[variable] for variable in part.scalars}
        self._read = {each: values[each].reshape(-1) for each in part.arrays if each not in set(olds)}
        self.moved = [values[variable].reshape(-1) for variable in olds]

    def compute(self, moved: Sequence[Any], read: dict[Any, Any]) -> list[Any]:
        """Return the new pieces of what is moved."""
        return self.part.compute({**dict(zip(self._olds, moved, strict=True)), **read}, self._scalars)

    def compute_whole(self, moved: Sequence[Any]) -> list[Any]:
        """Return all that is moved, anew."""
        return self.compute(moved, self._read)

    def shaped(self, moved: Sequence[Any]) -> dict[int, Any]:
        """Return the results by their places in the program."""
        return {place: new.reshape(self.part.shape) for place, new in zip(self.part.results, moved, strict=True)}

    def run_in_sections(self, is_due: jax.Array, length: int, sections: int) -> dict[int, Any]:
        """Return the results, made piece by piece, in sections of some pieces each."""
        size = self.part.size
        is_bfloat16 = [array.dtype == _BFLOAT16 for array in self.moved]
        count = -(-size // length)
        each = -(-count // (sections if any(is_bfloat16) else 1))
        section_length = min(each * length, size)

        def section(place: jax.Array, moved: list[Any]) -> list[Any]:
            base = jnp.minimum(place * section_length, size - section_length)
            inner = [
                _bits(_cut(array, base, section_length)) if narrow else array
                for array, narrow in zip(moved, is_bfloat16, strict=True)
            ]

            def piece(index: jax.Array, arrays: list[Any]) -> list[Any]:
                first = index * length if section_length == size else place * section_length + index * length
                # the last piece begins before its place, so that it is as long as the others
                start = jnp.minimum(first, size - length)
                inside = start if section_length == size else start - base
                starts = [inside if narrow else start for narrow in is_bfloat16]

                def old() -> list[Any]:
                    return [_cut(array, begin, length) for array, begin in zip(arrays, starts, strict=True)]

                def new() -> list[Any]:
                    before = [
                        lax.bitcast_convert_type(array, _BFLOAT16) if narrow else array
                        for array, narrow in zip(old(), is_bfloat16, strict=True)
                    ]
                    read = {variable: _cut(array, start, length) for variable, array in self._read.items()}
                    after = self.compute(before, read)
                    # neither twice what two pieces have in common, nor the last piece again in a turn behind the end
                    if size % length or count % each:
                        is_new = start + lax.iota(jnp.int32, length) >= first
                        after = [jnp.where(is_new, *both) for both in zip(after, before, strict=True)]
                    return [_bits(array) if narrow else array for array, narrow in zip(after, is_bfloat16, strict=True)]

                # XLA reads, converts and computes nothing of a condition's outside of it: neither whole arrays before
                # the loop, nor an array that is written already. Writing inside of it would copy the arrays
                pieces = lax.cond(is_due, new, old)
                return [
                    lax.dynamic_update_slice(array, new, (begin,))
                    for array, new, begin in zip(arrays, pieces, starts, strict=True)
                ]

            done = lax.fori_loop(0, each, piece, inner)
            return [
                _put(array, lax.bitcast_convert_type(new, _BFLOAT16), base) if narrow else new
                for array, new, narrow in zip(moved, done, is_bfloat16, strict=True)
            ]

        return self.shaped(lax.fori_loop(0, jnp.where(is_due, -(-count // each), 0), section, self.moved))


def _run_together(loops: Sequence[_Loop], is_due: jax.Array) -> dict[int, Any]:
    """Return the results of several parts that are small, in one loop of at most one turn."""

    def turn(_: jax.Array, moved: list[list[Any]]) -> list[list[Any]]:
        def new() -> list[list[Any]]:
            return [loop.compute_whole(arrays) for loop, arrays in zip(loops, moved, strict=True)]

        return lax.cond(is_due, new, lambda: moved)

    done = lax.fori_loop(0, jnp.where(is_due, 1, 0), turn, [loop.moved for loop in loops])
    return {place: new for loop, arrays in zip(loops, done, strict=True) for place, new in loop.shaped(arrays).items()}


def _either(
    plan: _Plan, run: dict[str, Callable[..., list[Any]]], called: Any, is_due: jax.Array, operands: Sequence[Any]
) -> list[Any]:
    """Return the program's results, in place if it runs where it was meant to, and as it was written under derivatives.

    Args:
        plan: of the program with what it calls in its place.
        run: by the platform that it was meant for, how it updates in place.
        called: the program as it was written, whose functions have derivatives of their own.
        is_due: whether anything changes.
        operands: of `plan`; the last of them are those of `called`.
    """

    def whole(_: jax.Array, *operands: Any) -> list[Any]:
        return typed(_run(plan.jaxpr, *operands))

    def written(_: jax.Array, *operands: Any) -> list[Any]:
        given = operands[len(operands) - len(called.constvars) - len(called.invars) :]
        return typed(internals.evaluated(called, given))

    def typed(results: list[Any]) -> list[Any]:
        return [_typed(result, variable.aval) for result, variable in zip(results, plan.jaxpr.outvars, strict=True)]

    @jax.custom_jvp
    def either(*operands: Any) -> list[Any]:
        return lax.platform_dependent(*operands, default=whole, **run)

    # there is no way back through a loop whose length is not known
    either.defjvp(lambda primals, tangents: jax.jvp(written, primals, tangents))
    return either(is_due, *operands)


def _run(jaxpr: Any, *operands: Any) -> list[Any]:
    return flattened(jaxpr, operands)


def _is_split(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in (_BFLOAT16, jnp.float16)


def _pays(part: Part) -> bool:
    # with FP32 weights alone XLA needs no more memory than this
    return part.size <= LARGEST_SIZE and any(_is_split(variable.aval) for variable in part.variables)


def _type(variable: Any) -> tuple[Any, Any]:
    return getattr(variable.aval, "shape", None), getattr(variable.aval, "dtype", None)


def _typed(value: Any, kind: Any) -> Any:
    """Return a value that is as strongly typed whichever way it was computed."""
    return lax.convert_element_type(value, kind.dtype) if internals.is_array_type(kind) else value


def _cut(array: jax.Array, start: jax.Array, length: int) -> jax.Array:
    return array if length == array.size else lax.dynamic_slice(array, (start,), (length,))


def _put(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return new if new.size == array.size else lax.dynamic_update_slice(array, new, (start,))


def _bits(array: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(array, TAIL_DTYPE)
