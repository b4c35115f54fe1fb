"""What autocast saves for the backward pass: results of products; what was computed from them is computed again.

A program that JAX differentiates saves whatever a derivative needs, so the FP32 insides of norms, softmax and
activations stay in memory until the backward pass. `with_checkpoints` puts each segment of a program (see `segments`)
into a `jax.checkpoint` of its own: only what crosses a border is saved, which is 16-bit where products are. As each is
one small checkpoint, its values are computed again when the backward pass arrives there, not all at its beginning; a
loop's body is cut by itself, so a scan over layers saves as little. A `jax.checkpoint` of the user's own, a
`custom_vjp` and effects stay as they are. After Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
section 3, with products in the place of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.extend import core
from jax.extend.core.primitives import remat_p

from duotone.errors import AutocastError
from duotone.jax.casting.segments import CALLS, RECOMPUTED, Segment, is_recomputed, segments_of, variables

Save = Literal["compute", "everything"] | Callable[..., Any]

# equations that hold programs whose own values would be saved
_PROGRAMS = {"closed_call": "call_jaxpr", "cond": "branches", "jit": "jaxpr", "pjit": "jaxpr"}
_PROGRAMS |= {"eval_jaxpr": "jaxpr", "scan": "jaxpr", "shard_map": "jaxpr"}


def check_save(save: object) -> None:
    """Refuse what says nothing about saving.

    Raises:
        AutocastError: it is neither "compute", nor "everything", nor a policy of `jax.checkpoint`.
    """
    if save not in ("compute", "everything") and not callable(save):
        raise AutocastError(
            f"save={save!r:.60} says nothing about the backward pass; pass 'compute' for results of products, "
            "'everything' for what JAX saves by itself, or a policy of jax.checkpoint_policies"
        )


def run_saving(function: Callable[..., list[Any]], arrays: Sequence[Any], save: Save) -> list[Any]:
    """Return what a function of arrays returns, and save for its backward pass what `save` says."""
    if save == "everything":
        return function(*arrays)
    if save == "compute":
        return core.jaxpr_as_fun(with_checkpoints(jax.make_jaxpr(function)(*arrays)))(*arrays)
    return jax.checkpoint(function, policy=save)(*arrays)


def with_checkpoints(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return the same program, each segment of it in a checkpoint that saves results of products alone.

    Values, dtypes, random bits, effects and their order stay as they are.
    """
    return core.ClosedJaxpr(_rewritten(program.jaxpr, in_loop=False), program.consts)


def results_of_products(primitive: core.Primitive, *_: Any, **__: Any) -> bool:
    """Say which values a checkpoint saves: a policy as `jax.checkpoint` takes it."""
    return primitive.name not in RECOMPUTED and primitive.name not in CALLS


def _rewritten(jaxpr: core.Jaxpr, *, in_loop: bool) -> core.Jaxpr:
    segments = segments_of(jaxpr)
    eqns = []
    for segment, leaving in zip(segments, _leaving(segments, jaxpr), strict=True):
        if any(is_recomputed(eqn) for eqn in segment.together):
            eqns.append(_checkpoint(segment.together, leaving, jaxpr, prevent_cse=not in_loop))
        else:
            eqns.extend(segment.together)
        eqns.extend(_with_inner_checkpoints(eqn, in_loop=in_loop) for eqn in segment.apart)
    return jaxpr.replace(eqns=eqns)


def _leaving(segments: list[Segment], jaxpr: core.Jaxpr) -> list[set[core.Var]]:
    """Return, for each segment, the values that what comes after its equations uses."""
    used = set(variables(jaxpr.outvars))
    found = []
    for segment in reversed(segments):
        used.update(v for eqn in segment.apart for v in variables(eqn.invars))
        found.append(set(used))
        used.update(v for eqn in segment.together for v in variables(eqn.invars))
    return found[::-1]


def _checkpoint(
    eqns: list[core.JaxprEqn], leaving: set[core.Var], jaxpr: core.Jaxpr, *, prevent_cse: bool
) -> core.JaxprEqn:
    """Return one equation that is a checkpoint of several."""
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = list(dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars) if v not in made))
    outputs = [v for eqn in eqns for v in eqn.outvars if v in leaving]
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    inner = core.Jaxpr((), inputs, outputs, eqns, effects, jaxpr.debug_info.with_unknown_names())
    params = {"jaxpr": inner, "policy": results_of_products, "prevent_cse": prevent_cse, "differentiated": False}
    # the scopes of names are those of the equations inside
    return core.new_jaxpr_eqn(inputs, outputs, remat_p, params, effects, None, eqns[0].ctx)


def _with_inner_checkpoints(eqn: core.JaxprEqn, *, in_loop: bool) -> core.JaxprEqn:
    """Return an equation with its loop's body, its branches or whatever it calls cut into segments too."""
    name = eqn.primitive.name
    if name not in _PROGRAMS:
        return eqn
    key = _PROGRAMS[name]
    # forward and backward pass are two loops, between which XLA finds nothing in common; unrolled they are none
    in_loop = in_loop or (name == "scan" and eqn.params["unroll"] < eqn.params["length"])
    held = eqn.params[key]
    programs = held if isinstance(held, tuple) else (held,)
    new = tuple(
        core.ClosedJaxpr(_rewritten(program.jaxpr, in_loop=in_loop), program.consts)
        if isinstance(program, core.ClosedJaxpr)
        else _rewritten(program, in_loop=in_loop)
        for program in programs
    )
    return eqn.replace(params={**eqn.params, key: new if isinstance(held, tuple) else new[0]})
