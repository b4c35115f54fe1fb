"""Functions with derivatives of their own: `custom_jvp` and `custom_vjp`. The rules hold inside of all their programs.

What such a function is given and gives is as kinds say, in 16 bits where they do, and so is what its forward pass saves
for its backward pass. Its programs were traced in FP32, which their code may rely on: so each is planned like any
other, and tangents and gradients that come in FP32 are held. The derivative stays the user's, at every order.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duotone.jax import internals
from duotone.jax.casting.interpreter import run
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Plan, Step
from duotone.jax.casting.values import HALF, HELD, OTHER, Value, dtype_of, is_float


def custom_jvp(site: Site) -> Step:
    """Run a `custom_jvp` function, such as `jax.nn.relu`, and its rule for tangents."""
    planned = _Planned(site)
    params = site.equation.params
    n_constants = params["num_consts"]

    def tangents_too(*args: Any) -> list[Any]:
        half = len(args) // 2
        primals, tangents = args[n_constants:half], args[half + n_constants :]
        zeros = [internals.is_symbolic_zero(each) for each in tangents]
        program, constants, zeros_out = params["jvp_jaxpr_fun"].call_wrapped(*zeros)
        given = [each for each, is_zero in zip(tangents, zeros, strict=True) if not is_zero]
        found = planned.run(program, constants, [*primals, *given], [*site.given[n_constants:]])
        primals_out = planned.as_results(found[: len(zeros_out)])
        rest = iter(found[len(zeros_out) :])
        tangents_out = [
            internals.symbolic_zero(primal) if is_zero else _tangent(next(rest), primal)
            for primal, is_zero in zip(primals_out, zeros_out, strict=True)
        ]
        return [*primals_out, *tangents_out]

    def runner(operands: list[Any]) -> list[Any]:
        return internals.bind_custom_jvp(site.equation.source, operands, planned.forward, tangents_too)

    return planned.step(runner)


def custom_vjp(site: Site) -> Step:
    """Run a `custom_vjp` function, its forward pass and its backward pass."""
    if internals.adds_gradients_itself(site.equation.source):
        return site.as_traced()
    planned = _Planned(site)

    def runner(operands: list[Any]) -> list[Any]:
        passes = _Passes(site, planned, [internals.type_of(each) for each in operands])
        return internals.bind_custom_vjp(
            site.equation.source, operands, planned.forward, passes.forward, passes.backward
        )

    return planned.step(runner)


class _Passes:
    """Forward and backward pass of one call of a `custom_vjp` function."""

    def __init__(self, site: Site, planned: "_Planned", types_in: list[Any]) -> None:
        self._site, self._planned, self._types_in = site, planned, types_in
        self._params = site.equation.params
        self._n_constants = self._params["num_consts"]
        # traced types of what the forward pass saves
        self._saved: list[Any] = []

    def forward(self, *pairs: Any) -> list[Any]:
        """Return what is saved, and the results; each argument is followed by whether it is differentiated."""
        primals, are_differentiated = pairs[::2][self._n_constants :], pairs[1::2][self._n_constants :]
        program, constants = self._params["fwd_jaxpr_thunk"].call_wrapped(*are_differentiated)
        found = self._planned.run(program, constants, primals, self._site.given[self._n_constants :])
        n_saved = len(found) - len(self._site.types_out)
        self._saved[:] = [atom.aval for atom in program.outvars][:n_saved]
        return [*found[:n_saved], *self._planned.as_results(found[n_saved:])]

    def backward(self, *args: Any) -> Any:
        """Return the gradients of the arguments, given what was saved and the gradients of the results."""
        compute = self._site.compute
        # what it is given as it is: zeros without an array, and flags whose values its code may ask for
        as_given = [internals.is_symbolic_zero(each) or _is_flag(each) for each in args]
        pairs = [pair for *pair, is_kept in zip(args, self._traced(), as_given, strict=True) if not is_kept]
        as_traced = [_cast(array, traced.dtype) if is_float(traced, compute) else array for array, traced in pairs]
        # what it returns, zeros without an array among it
        structure: list[Any] = []
        rest: list[Any] = []

        def gradients(*arrays: Any) -> list[Any]:
            given = iter(arrays)
            whole = [_kept(each) if is_kept else next(given) for each, is_kept in zip(args, as_given, strict=True)]
            structure[:], rest[:] = internals.gradients_of(self._params["bwd"].call_wrapped(*whole))
            return [each for each in structure if not internals.is_zero(each)]

        program, constants = internals.opened(jax.make_jaxpr(gradients)(*as_traced))
        values = [_as_it_comes(array, traced, compute) for array, traced in pairs]
        found = iter(self._planned.run(program, constants, [array for array, _ in pairs], values))
        results = [internals.zero(traced) for traced in self._types_in[: self._n_constants]]
        for each, traced in zip(structure, self._types_in[self._n_constants :], strict=True):
            results.append(internals.zero(traced) if internals.is_zero(each) else _cast(next(found), traced.dtype))
        return internals.as_gradients(results, rest)

    def _traced(self) -> list[Any]:
        """Return the traced types of what the backward pass is given; inputs may be saved as they are."""
        _, _, forwarded = self._params["out_trees"]()
        saved = iter(self._saved)
        # places among all that it is given, constants too
        types = self._site.types
        return [*(next(saved) if place is None else types[place] for place in forwarded), *self._site.types_out]


class _Planned:
    """The function itself, planned: what its results are, whichever of its programs makes them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._jaxpr, self._constants = internals.opened(site.equation.params["call_jaxpr"])
        known = [site.planner.constant(each) for each in self._constants]
        self._plan = site.planner.plan(self._jaxpr, [*known, *site.given], site.equation.scopes)
        self._dtypes = [
            dtype_of(value, traced, site.compute)
            for value, traced in zip(self._plan.outputs, site.types_out, strict=True)
        ]

    def step(self, runner: Callable[[list[Any]], list[Any]]) -> Step:
        """Return the step that runs it on what it is given."""
        outputs = [value.without_number for value in self._plan.outputs]
        wanted = self._plan.wanted
        return self._site.step(None, outputs, runner=runner, inner=[self._plan], wanted=wanted)

    def forward(self, *args: Any) -> list[Any]:
        """Run the function."""
        return self.as_results(run(self._plan, self._constants, args))

    def run(self, program: Any, constants: Sequence[Any], args: Sequence[Any], given: Sequence[Value]) -> list[Any]:
        """Run another of its programs; what comes after `given` is a tangent, in the dtype that it has."""
        planner, compute = self._site.planner, self._site.compute
        types = [variable.aval for variable in [*program.constvars, *program.invars]][len(constants) :]
        values = [*given]
        values += [
            _as_it_comes(array, traced, compute)
            for array, traced in zip(args[len(values) :], types[len(values) :], strict=True)
        ]
        # numbers are arrays here
        values = [value.without_number for value in values]
        known = [planner.constant(each) for each in constants]
        plan: Plan = planner.plan(program, [*known, *values], self._site.equation.scopes)
        return run(plan, constants, args)

    def as_results(self, arrays: Sequence[Any]) -> list[Any]:
        """Return results of the function in the dtypes that its results have."""
        return [_cast(array, dtype) for array, dtype in zip(arrays, self._dtypes, strict=True)]


def _is_flag(value: Any) -> bool:
    """Return whether a saved value is known and no float: a mode that the forward pass has saved for Python code."""
    return internals.is_concrete(value) and not jnp.issubdtype(value.dtype, jnp.inexact) and not value.ndim


def _kept(value: Any) -> Any:
    # JAX, too, gives a flag back as the bool that it was
    return value if internals.is_symbolic_zero(value) or value.dtype != bool else bool(value)


def _as_it_comes(array: Any, traced: Any, compute: Any) -> Value:
    """Return what a saved value or a gradient is."""
    if not is_float(traced, compute):
        return OTHER
    return HALF if array.dtype == compute else HELD


def _tangent(array: Any, primal: Any) -> Any:
    """Return a tangent in the dtype of its primal; that of an integer has no dtype to speak of."""
    return _cast(array, primal.dtype) if jnp.issubdtype(primal.dtype, jnp.floating) else array


def _cast(array: Any, dtype: Any) -> Any:
    # numbers are those of the program, which plans keep; a key has no dtype to cast to
    return array if array.dtype == dtype else lax.convert_element_type(array, dtype)


CUSTOM_RULES: Mapping[str, Handler] = MappingProxyType({"custom_jvp_call": custom_jvp, "custom_vjp_call": custom_vjp})
