"""Traces a function, under the rules and as it is written, and makes an `Explanation` of both programs.

Nothing is computed: JAX evaluates abstractly, so arguments may be `jax.ShapeDtypeStruct`. What is saved for the
backward pass is what the closure holds that `jax.vjp` by the weights returns. Left out: what XLA fuses, moves and
merges afterwards, and the casts of the backward pass.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duotone.errors import ExplainError
from duotone.jax import internals, policies
from duotone.jax.casting.autocast_record import Autocast, autocast_of
from duotone.jax.casting.transform import autocast
from duotone.jax.explanation import counting
from duotone.jax.explanation.equations import Equations, equations_of
from duotone.jax.explanation.explanation import Explanation
from duotone.jax.explanation.findings import findings_of
from duotone.jax.explanation.reasons import reason_of
from duotone.jax.trees import leaves_of
from duotone.policy import Policy
from duotone.wording.words import SIXTEEN_BITS


def explain(
    fun: Callable[..., Any],
    *args: Any,
    policy: str | Policy | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Trace a function and say where its precision is: dtypes, casts, residuals, and what stands out.

    Nothing is computed, so arrays may be `jax.ShapeDtypeStruct`. Numbers are those of these arguments: give the sizes
    that you train with.

    Args:
        fun: what `autocast` returned, or `jax.jit` of it, or any function of arrays and pytrees.
        *args: what it is called with.
        policy: to see a function as it would be under `autocast(fun, policy, argnums=argnums)`.
        argnums: the arguments that are weights; a function that `autocast` returned knows its own.
        has_aux: whether it returns a pair of which only the first is differentiated, as for `jax.grad`.
        **kwargs: what it is called with by name.

    Returns:
        An `Explanation`; `print` it, or read its `findings`.

    Raises:
        ExplainError: it is no function, is under a policy already, or is the gradient of one that is.
        PolicyError: JAX cannot have the policy.

    >>> import jax, duotone.jax as dj
    >>> weight, x = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((2, 8), jnp.float32)
    >>> explanation = dj.explain(lambda weight, x: x @ weight, weight, x, policy="bf16")
    >>> [(each.name, each.compute_dtype, each.calls) for each in explanation.operations]
    [('dot_general', 'bfloat16', 1)]
    >>> [(each.from_dtype, each.to_dtype, each.operation, each.result_bytes) for each in explanation.casts]
    [('float32', 'bfloat16', 'dot_general', 96), ('bfloat16', 'float32', None, 32)]
    """
    under = _under(fun, policy, argnums)
    flat = _Flat(_names(under.written, args), args, kwargs, under.argnums)
    closed, outvars = flat.trace(under.function)
    program = equations_of(closed)
    written = [program]
    if under.policy is not None:
        written = [equations_of(each) for each in flat.as_written(under.written)]
    backward, saved = flat.trace_backward(under.function, has_aux)
    weights = frozenset(f"argument {name}" for name in flat.weight_names)
    numbers = frozenset(program.inputs[place] for place in flat.weights)
    residuals = counting.residuals_of(backward, saved, flat.names)
    explanation = Explanation(
        function=getattr(fun, "__name__", type(fun).__name__),
        policy=None if under.policy is None else under.policy.name,
        findings=(),
        scopes=counting.scopes_of(program, residuals, weights),
        operations=counting.operations_of(program, lambda equation: reason_of(equation, under.policy)),
        casts=counting.casts_of(program, written),
        outputs=counting.outputs_of(program, outvars),
        residuals=residuals,
        saved_for_backward=counting.saved_of(residuals, weights),
    )
    return replace(explanation, findings=findings_of(explanation, under.policy, program, numbers))


@dataclass(frozen=True)
class _Under:
    """A function, the same as it is written, and the policy that it is under."""

    function: Callable[..., Any]
    written: Callable[..., Any]
    policy: Policy | None
    argnums: tuple[int, ...]


def _under(fun: Any, policy: str | Policy | None, argnums: int | Sequence[int]) -> _Under:
    if not callable(fun):
        raise ExplainError(f"got {fun!r:.60} to explain; give a function, and what it is called with")
    weights = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    known = autocast_of(fun)
    if known is None:
        if policy is None:
            return _Under(fun, fun, None, weights)
        read = policies.read(policy)
        return _Under(autocast(fun, read, argnums=weights), fun, read, weights)
    if policy is not None:
        raise ExplainError(
            f'{known.written.__name__} is under policy "{known.policy.name}" already; leave policy out, or give the '
            "function as it was before autocast"
        )
    if not _is_itself(fun, known):
        raise ExplainError(
            "got a function made of one under autocast, such as its gradient; give explain what autocast returned, "
            "which also says what its gradient saves"
        )
    return _Under(fun, known.written, known.policy, known.argnums)


def _is_itself(fun: Any, known: Autocast) -> bool:
    """Return whether a function is what autocast returned, or a jit of that."""
    while fun is not known.function and hasattr(fun, "lower") and hasattr(fun, "__wrapped__"):
        fun = fun.__wrapped__
    return fun is known.function


class _Flat:
    """Arguments as a flat list of abstract arrays; what is no array stays as it is."""

    def __init__(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: tuple[int, ...]
    ) -> None:
        self._leaves, self._tree = jax.tree.flatten((args, kwargs))
        self._places = [place for place, leaf in enumerate(self._leaves) if _is_array(leaf)]
        self._arrays = [self._leaves[place] for place in self._places]
        positional = [
            _joined(name, leaf.path) for name, arg in zip(names, args, strict=True) for leaf in leaves_of(arg)
        ]
        by_name = [leaf.path for leaf in leaves_of(kwargs)]
        owners = [number for number, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
        owners += [-1] * (len(self._leaves) - len(owners))
        wanted = {number % len(args) for number in argnums if -len(args) <= number < len(args)}
        self.names = [[*positional, *by_name][place] for place in self._places]
        self.weights = [
            index
            for index, place in enumerate(self._places)
            if owners[place] in wanted and jnp.issubdtype(self._arrays[index].dtype, jnp.inexact)
        ]
        self.weight_names = [self.names[index] for index in self.weights]

    def trace(self, function: Callable[..., Any], *, wide: bool = False) -> tuple[Any, Sequence[Any]]:
        """Return the program of a function, with weights in FP32 if they are to be wide, and its outputs' variables."""
        arrays = list(self._arrays)
        for index in self.weights if wide else ():
            if str(arrays[index].dtype) in SIXTEEN_BITS:
                arrays[index] = jax.ShapeDtypeStruct(arrays[index].shape, jnp.float32)
        closed = jax.make_jaxpr(lambda *arrays: self._call(function, arrays))(*arrays)
        return closed, internals.opened(closed)[0].outvars

    def as_written(self, function: Callable[..., Any]) -> list[Any]:
        """Return the programs of a function without a policy, with FP32 weights and, where it works so, with these.

        A loop whose carry is 16-bit before its body and FP32 after it has no program with 16-bit weights, and needs
        none under autocast, which traces with FP32.
        """
        programs = [self.trace(function, wide=True)[0]]
        with suppress(TypeError):
            programs.append(self.trace(function)[0])
        return programs

    def trace_backward(self, function: Callable[..., Any], has_aux: bool) -> tuple[Equations, Sequence[Any]]:
        """Return the program whose outputs are what is saved for the gradient by the weights, and their variables."""

        def saved(*arrays: Any) -> Any:
            def by_weights(*weights: Any) -> Any:
                whole = list(arrays)
                for index, weight in zip(self.weights, weights, strict=True):
                    whole[index] = weight
                return self._call(function, whole)

            return jax.vjp(by_weights, *(arrays[index] for index in self.weights), has_aux=has_aux)[1]

        closed = jax.make_jaxpr(saved)(*self._arrays)
        return equations_of(closed), internals.opened(closed)[0].outvars

    def _call(self, function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        whole = list(self._leaves)
        for place, array in zip(self._places, arrays, strict=True):
            whole[place] = array
        args, kwargs = jax.tree.unflatten(self._tree, whole)
        return function(*args, **kwargs)


def _names(function: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """Return what a function calls its positional arguments, or their numbers where it does not say."""
    try:
        names = list(inspect.signature(function).bind_partial(*args).arguments)
    except (TypeError, ValueError):
        names = []
    return names if len(names) == len(args) else [str(number) for number in range(len(args))]


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
