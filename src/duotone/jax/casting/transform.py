"""`autocast`: a function under the rules of a policy, as a transform that goes with all of JAX's."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from duotone.errors import AutocastError
from duotone.jax import internals, policies
from duotone.jax.casting import marks, modules
from duotone.jax.casting.autocast_record import Autocast
from duotone.jax.casting.interpreter import run
from duotone.jax.casting.planning import Planner
from duotone.jax.casting.saving import Save, check_save, run_saving
from duotone.jax.casting.values import FLOAT32, HALF, HELD, OPEN, OTHER, Kind, Value, is_float
from duotone.policy import Policy

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_HALVES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))


@overload
def autocast(
    fun: Callable[Arguments, Result],
    policy: str | Policy,
    *,
    argnums: int | Sequence[int] = 0,
    save: Save = "compute",
) -> Callable[Arguments, Result]: ...
@overload
def autocast(
    fun: str | Policy, *, argnums: int | Sequence[int] = 0, save: Save = "compute"
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]: ...
def autocast(
    fun: Any, policy: str | Policy | None = None, *, argnums: int | Sequence[int] = 0, save: Save = "compute"
) -> Any:
    """Return `fun` with its arithmetic in the policy's 16-bit format, and FP32 where rules keep it.

    The function is traced as it stands, with FP32 in place of 16-bit weights, and what was traced runs under the rules:
    products in 16 bits, exponentials, sums and losses in FP32, as `duotone ops` lists them. It goes with `jit`, `grad`,
    `vmap`, `jvp`, `jax.checkpoint`, `shard_map` and `export`, inside and around.

    A weight, in an argument of `argnums`, is rounded where it meets 16 bits. Its gradient has its own dtype, and is
    added up in FP32. Other arguments are data, which stay as they come: FP32 beside 16 bits gives FP32.

    With the policy alone it is a decorator: `@dj.autocast("bf16")`.

    Results that are FP32 in `fun` leave in the policy's `output`, all others as they are in `fun`.

    Args:
        fun: any function of arrays and pytrees. What is no array (a Python number, a text, None) is a constant.
        policy: a policy or its text; `compute`, `output`, `inputs`, `residual` and rules with `compute` by named scope.
        argnums: the arguments that are weights. Of a Flax NNX module its `nnx.Param` are, of Linen's variables the
            collection `params`; other state, such as statistics of BatchNorm, stays FP32. What `fun` changes in an NNX
            module stays changed.
        save: what is saved for the backward pass. `"compute"`: results of products, in 16 bits; norms, softmax,
            activations and random bits are computed again, products are not, nor is what has effects, and what a
            `jax.checkpoint` or a `custom_vjp` in `fun` saves is as it says. `"everything"`: what JAX saves by itself.
            Or a policy of `jax.checkpoint_policies`, as for a `jax.checkpoint` around the whole.

    Raises:
        AutocastError: `fun` is no function, or a part of a Linen model; there are no such arguments; no such `save`.
        PolicyError: JAX cannot have the policy.

    >>> import jax, jax.numpy as jnp, duotone.jax as dj
    >>> loss_fn = dj.autocast(lambda weight, x: jax.nn.log_softmax(x @ weight).mean(), "bf16")
    >>> grads = jax.jit(jax.grad(loss_fn))(jnp.ones((4, 3)), jnp.ones((2, 4)))
    >>> grads.dtype
    dtype('float32')
    """
    if policy is None:
        if not isinstance(fun, str | Policy):
            raise AutocastError(
                'autocast takes a policy, too: autocast(loss_fn, "bf16"), or, in front of a function, @autocast("bf16")'
            )
        policies.check_arithmetic(policies.read(fun))
        return functools.partial(autocast, policy=fun, argnums=argnums, save=save)
    if not callable(fun):
        raise AutocastError(f"autocast takes a function, not {fun!r:.60}; give the function that computes your loss")
    read = policies.read(policy)
    policies.check_arithmetic(read)
    check_save(save)
    weights = _argnums(argnums)

    @functools.wraps(fun)
    def under_policy(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Any:
        missing = [number for number in weights if not -len(args) <= number < len(args)]
        if missing:
            raise AutocastError(
                f"autocast was told by argnums that argument {missing[0]} is a weight, but there are {len(args)} "
                "positional arguments; give weights by position, or argnums=() if there are none"
            )
        if read.compute == "float32":
            # inside of another autocast it stays FP32
            with marks.float32_scope():
                return jax.tree.map(functools.partial(_output, read), fun(*args, **kwargs))
        numbers = {number % len(args) for number in weights}
        return modules.keeping_state(functools.partial(_call, read, numbers, save))(fun, args, kwargs)

    Autocast(under_policy, fun, read, weights).note()
    return under_policy


def _argnums(argnums: int | Sequence[int]) -> tuple[int, ...]:
    given = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(given, Sequence) or not all(isinstance(each, int) for each in given):
        raise AutocastError(f"argnums must be the number of an argument or a tuple of those, not {argnums!r:.60}")
    return tuple(given)


def _call(policy: Policy, weights: set[int], save: Save, fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Trace a function that returns (state of modules, result), plan its program, and run it."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    owned = [each and number in weights for number, arg in enumerate(args) for each in modules.weight_leaves(arg)]
    is_weight = owned + [False] * (len(leaves) - len(owned))
    places = [place for place, leaf in enumerate(leaves) if _is_array(leaf)]
    planner = Planner(policy)
    entered = [_entered(planner, leaves[place], is_weight[place]) for place in places]
    returned: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        inner_args, inner_kwargs = jax.tree.unflatten(tree, whole)
        found, shape = jax.tree.flatten(fun(*inner_args, **inner_kwargs))
        returned[:] = [shape, [None if _is_returned_array(leaf) else leaf for leaf in found]]
        return [leaf for leaf in found if _is_returned_array(leaf)]

    # as traced: the data as they come, weights in FP32
    try:
        closed = jax.make_jaxpr(flat)(*(traced for traced, _, _ in entered))
    except TypeError as error:
        if any(traced.dtype == planner.compute for traced, _, _ in entered):
            error.add_note(
                f"Under dj.autocast weights are traced in FP32, and data are {planner.compute} here; write "
                f"inputs={planner.compute} in the policy to trace these in FP32 too, or cast them in the function."
            )
        raise
    jaxpr, constants = internals.opened(closed)
    given = [*map(planner.constant, constants), *(value for _, _, value in entered)]
    plan = planner.plan(jaxpr, given)
    policies.check_rules_hold(policy, planner.scopes)
    types = [plan.program.types[number] for number in plan.program.outputs]

    def in_policy(*arrays: Any) -> list[Any]:
        # in here, so that 16-bit weights are saved in 16 bits, not widened
        arrays = tuple(_widened(array, value) for array, (_, _, value) in zip(arrays, entered, strict=True))
        return [
            array if value.kind is Kind.OTHER else lax.convert_element_type(array, traced.dtype)
            for array, value, traced in zip(run(plan, constants, arrays), plan.outputs, types, strict=True)
        ]

    found = iter(run_saving(in_policy, [array for _, array, _ in entered], save))
    # what is no array, such as a function in a module of Equinox, is returned as it is
    shape, rest = returned
    state, result = jax.tree.unflatten(shape, [next(found) if leaf is None else leaf for leaf in rest])
    return state, jax.tree.map(functools.partial(_output, policy), result)


def _is_returned_array(leaf: Any) -> bool:
    return _is_array(leaf) or isinstance(leaf, bool | int | float | complex)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or hasattr(leaf, "__jax_array__")


def _entered(planner: Planner, leaf: Any, is_weight: bool) -> tuple[Any, Any, Value]:
    """Return an argument as the function is traced with it, as its program is run with it, and what it is."""
    array = jnp.asarray(leaf)
    compute, inputs = planner.compute, planner.policy.inputs
    wide = lax.convert_element_type(array, FLOAT32) if array.dtype in _HALVES else array
    if is_weight and wide.dtype == FLOAT32:
        # positions and class tokens, which are broadcast over a batch, are where a residual stream starts
        starts = planner.residual == "float32" and array.ndim > 2 and array.shape[0] == 1
        return wide, array, Value(Kind.HELD if starts else Kind.OPEN, narrow=array.dtype == compute)
    if not is_float(internals.type_of(array), compute):
        return array, array, OTHER
    if inputs == "float32":
        return wide, wide, HELD
    if inputs == compute.name:
        return wide, lax.convert_element_type(array, compute), HALF
    if array.dtype == compute:
        return array, array, HALF
    return array, array, OPEN if internals.is_weak(array) and not array.ndim else HELD


def _widened(array: Any, value: Value) -> Any:
    is_wide = value.kind in (Kind.OPEN, Kind.HELD)
    return lax.convert_element_type(array, FLOAT32) if is_wide and array.dtype in _HALVES else array


def _output(policy: Policy, array: Any) -> Any:
    """Return a result in the policy's `output`, if it is FP32 in the function."""
    if getattr(array, "dtype", None) != FLOAT32 or policy.output == "float32":
        return array
    return lax.convert_element_type(array, jnp.dtype(policy.output))
