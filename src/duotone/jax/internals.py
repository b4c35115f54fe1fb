"""Every private name of JAX, and every difference between its versions 0.10 to 0.12, each with its reason.

Nothing else of Duotone imports `jax._src` or asks for the version. A program of JAX is a jaxpr: equations, each of
which is a primitive, its parameters, its operands and its results. Left out: JAX before 0.10.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.extend import core, linear_util, source_info_util
from jax.extend.core import Literal, Var
from jax.interpreters import ad

__all__ = ["Literal", "Var"]

# parameters that hold the program which an equation runs as it stands, by the name of its primitive. 0.11 made
# eval_jaxpr of closed_call and core_call
_CALLED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CALLED |= {"call": "call_jaxpr", "eval_jaxpr": "call_jaxpr"}
# what an inner jit can ask for that is lost when its equations are taken out of it
_UNSET_BY_DEFAULT = ("in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars")


class Scan(NamedTuple):
    """The places of a scan's operands and results: constants, carry, what is scanned; carry, what is stacked."""

    constants: tuple[int, ...]
    carry: tuple[int, ...]
    scanned: tuple[int, ...]
    carry_out: tuple[int, ...]
    stacked: tuple[int, ...]


def opened(program: Any) -> tuple[Any, list[Any]]:
    """Return an open jaxpr, and its constants; since 0.11 a closed one is a jaxpr with constants."""
    # the class of closed jaxprs before 0.11 has the open one as an attribute
    return getattr(program, "jaxpr", program), list(getattr(program, "consts", ()))


def is_program(value: Any) -> bool:
    """Return whether a parameter is a jaxpr."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def called_program(equation: Any) -> Any | None:
    """Return the program that an equation stands for, if nothing is lost when its equations take its place."""
    name = _CALLED.get(equation.primitive.name)
    return equation.params[name] if name is not None and not asks_for_placement(equation) else None


def asks_for_placement(equation: Any) -> bool:
    """Return whether an inner jit names shardings, layouts, donated operands or options of the compiler."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    params = equation.params
    values = [each for name in _UNSET_BY_DEFAULT for each in params.get(name) or ()]
    # an unspecified sharding is an object of a private class
    is_set = any(not (each is None or each is False or type(each).__name__ == "UnspecifiedValue") for each in values)
    return is_set or bool(params.get("compiler_options_kvs"))


def scan_places(params: Any) -> Scan:
    """Return which operands and results of a scan are what; since 0.11 trees say it that may be in any order."""
    count_in, count_out = len(opened(params["jaxpr"])[0].invars), len(opened(params["jaxpr"])[0].outvars)
    if "ft_in" in params:
        groups = [params["ft_in"].update(range(count_in)).unpack(), params["ft_out"].update(range(count_out)).unpack()]
        return Scan(*(tuple(group) for both in groups for group in both))
    constants, carry = params["num_consts"], params["num_carry"]
    places = range(count_in)
    return Scan(
        tuple(places[:constants]),
        tuple(places[constants : constants + carry]),
        tuple(places[constants + carry :]),
        tuple(range(carry)),
        tuple(range(carry, count_out)),
    )


def scopes_of(name_stack: Any) -> tuple[str, ...]:
    """Return the names of the named scopes in a name stack; names of transforms (`jvp`, `vmap`) are left out."""
    return tuple(each.name for each in name_stack.stack if type(each).__name__ == "Scope")


def name_stack_of(equation: Any) -> Any:
    """Return the scopes and transforms that an equation stands in."""
    return equation.source_info.name_stack


@contextmanager
def as_traced(equation: Any, name_stack: Any) -> Iterator[None]:
    """Bind what follows as if in the place of `equation`: its line, its scopes, its mesh, its random bits.

    Without it profiles name no module and errors no line of the user's.
    """
    stack = source_info_util.current_name_stack() + name_stack
    with ExitStack() as entered:
        entered.enter_context(source_info_util.user_context(equation.source_info.traceback, name_stack=stack))
        entered.enter_context(equation.ctx.manager)
        yield


def varying_axes(value: Any) -> frozenset[str]:
    """Return the axes of a mesh that a value differs along, inside of `shard_map` with `check_vma`; none outside of it.

    >>> varying_axes(1.0)
    frozenset()
    """
    # printed types show it, as in float32[]{V:data}, but no public function returns it
    return frozenset(jax.typeof(value).manual_axis_type.varying)


def bind(primitive: Any, operands: Sequence[Any], params: Any) -> list[Any]:
    """Return the results of a primitive."""
    found = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def evaluated(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Return the results of an open jaxpr, given what its constants and then its inputs are."""
    n_constants = len(jaxpr.constvars)
    return eval_jaxpr(jaxpr, operands[:n_constants], *operands[n_constants:])


def wrapped(function: Callable[..., Any], like: Any) -> Any:
    """Return a function as rules of derivatives hold it, with the debug information of the one that it replaces."""
    return linear_util.wrap_init(function, debug_info=like.debug_info)


def is_concrete(value: Any) -> bool:
    """Return whether a value is known, and not one that JAX traces."""
    return not isinstance(value, Tracer)


def literal_value(literal: Any) -> Any:
    """Return the value of a literal in its own dtype, for a program holds Python numbers for some."""
    return np.asarray(literal.val, dtype=literal.aval.dtype)


def type_of(value: Any) -> Any:
    """Return the type of a value or a tracer: its shape and dtype, and its sharding where types have one."""
    return jax.typeof(value)


def is_array_type(traced: Any) -> bool:
    """Return whether a type is that of an array, and not of a reference to one, a token or a key."""
    return isinstance(traced, ShapedArray) and not jnp.issubdtype(traced.dtype, jax.dtypes.extended)


def is_weak(value: Any) -> bool:
    """Return whether a value takes the dtype of what it meets, as Python numbers do."""
    return bool(getattr(jax.typeof(value), "weak_type", False))


def bind_custom_jvp(
    equation: Any, operands: Sequence[Any], function: Callable[..., Any], jvp: Callable[..., Any]
) -> list[Any]:
    """Bind a `custom_jvp` call with other functions in the place of its own two.

    The public decorator would lose the rule's symbolic zeros.
    """
    params = equation.primitive.get_bind_params(equation.params)
    own, own_jvp = params.pop("subfuns")
    return list(equation.primitive.bind(*operands, subfuns=(wrapped(function, own), wrapped(jvp, own_jvp)), **params))


def bind_custom_vjp(
    equation: Any,
    operands: Sequence[Any],
    function: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> list[Any]:
    """Bind a `custom_vjp` call with other functions in the place of its own three.

    The public decorator would lose the rule's symbolic zeros, its trees, and inputs that are saved as they are.
    """
    params = equation.primitive.get_bind_params(equation.params)
    own = params.pop("subfuns")
    functions = tuple(wrapped(new, old) for new, old in zip((function, forward, backward), own, strict=True))
    return list(equation.primitive.bind(*operands, subfuns=functions, **params))


def adds_gradients_itself(equation: Any) -> bool:
    """Return whether a `custom_vjp` adds its gradients in place, to references (since 0.11)."""
    return type(getattr(equation.params["bwd"], "f", None)).__name__ == "CustomBwdWithAccums"


def gradients_of(found: Any) -> tuple[list[Any], list[Any]]:
    """Return the gradients among what a backward pass returned, and the rest; since 0.11 it returns logs, too."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        return list(found[0]), [found[1]]
    return list(found), []


def as_gradients(gradients: list[Any], rest: list[Any]) -> Any:
    """Return gradients as a backward pass returns them."""
    return (gradients, *rest) if rest else gradients


def is_zero(gradient: Any) -> bool:
    """Return whether a gradient is a zero without an array: of an integer, or where a rule returned None."""
    return isinstance(gradient, ad.Zero) or is_symbolic_zero(gradient) or gradient.dtype == jax.dtypes.float0


def zero(traced: Any) -> Any:
    """Return the zero gradient of a value of a type."""
    return ad.Zero(traced.to_tangent_aval())


def is_symbolic_zero(value: Any) -> bool:
    """Return whether a tangent or gradient is a zero that a rule sees as such."""
    return isinstance(value, SymbolicZero)


def symbolic_zero(primal: Any) -> Any:
    """Return the zero tangent of a value, as a rule returns it."""
    return SymbolicZero(jax.typeof(primal).to_tangent_aval())


def bind_checkpoint(equation: Any, operands: Sequence[Any], function: Callable[..., Any]) -> list[Any]:
    """Bind a checkpoint with another function in the place of its program.

    `jax.checkpoint` would make a new one that does not know that it is differentiated already, as it is inside of a
    gradient that is part of the function; XLA then computes nothing again, and keeps all.
    """
    jaxpr, constants = opened(jax.make_jaxpr(function)(*operands))
    inner = jaxpr.replace(
        constvars=(),
        invars=[*jaxpr.constvars, *jaxpr.invars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
        **({"consts": ()} if hasattr(jaxpr, "consts") else {}),
    )
    return list(equation.primitive.bind(*constants, *operands, **{**equation.params, "jaxpr": inner}))


def placement_of(equation: Any) -> dict[str, Any]:
    """Return what an inner jit asks for, as arguments of `jax.jit`."""
    params = equation.params
    found: dict[str, Any] = {}
    for name in ("in_shardings", "out_shardings"):
        values = tuple(None if type(each).__name__ == "UnspecifiedValue" else each for each in params[name])
        if any(each is not None for each in values):
            found[name] = list(values) if name == "out_shardings" else values
    found["donate_argnums"] = tuple(place for place, is_donated in enumerate(params["donated_invars"]) if is_donated)
    if params.get("compiler_options_kvs"):
        found["compiler_options"] = dict(params["compiler_options_kvs"])
    return found


def is_floating_array(value: Any) -> bool:
    """Return whether a value is an array of floating-point numbers, and no Python number."""
    return isinstance(value, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(value.dtype, jnp.floating)
