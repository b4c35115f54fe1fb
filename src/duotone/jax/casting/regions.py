"""Programs that run once, in a place of their own: `jax.checkpoint`, `shard_map`, a jit that asks for shardings.

A checkpoint saves what it is given, so 16-bit weights go in as 16-bit weights, and are widened inside.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax import lax

from duotone.jax import internals
from duotone.jax.casting.interpreter import run
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Step
from duotone.jax.casting.values import FLOAT32, Value

Inside = Callable[..., list[Any]]


def checkpoint(site: Site) -> Step:
    """Run `jax.checkpoint`, with its own policy."""

    def runner(operands: list[Any], inside: Inside) -> list[Any]:
        return internals.bind_checkpoint(site.equation.source, operands, inside)

    return _region(site, runner, saves_inputs=True)


def shard_map(site: Site) -> Step:
    """Run `jax.shard_map`."""
    params = site.equation.params

    def runner(operands: list[Any], inside: Inside) -> list[Any]:
        mapped = jax.shard_map(
            lambda *args: tuple(inside(*args)),
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=tuple(params["out_specs"]),
            check_vma=params["check_vma"],
            axis_names=set(params["newly_manual_axes"]),
        )
        return list(mapped(*operands))

    return _region(site, runner)


def placed_jit(site: Site) -> Step:
    """Run an inner jit with the shardings, donations and options that it asks for."""

    def runner(operands: list[Any], inside: Inside) -> list[Any]:
        return list(jax.jit(inside, **internals.placement_of(site.equation.source))(*operands))

    return _region(site, runner)


def _region(site: Site, bound: Callable[[list[Any], Inside], list[Any]], *, saves_inputs: bool = False) -> Step:
    jaxpr, constants = internals.opened(site.equation.params["jaxpr"])
    known = [site.planner.constant(each) for each in constants]
    plan = site.planner.plan(jaxpr, [*known, *site.given], site.equation.scopes)
    targets = [site.compute if saves_inputs and value.narrow else None for value in site.given]

    def inside(*args: Any) -> list[Any]:
        wide = [
            array if target is None or array.dtype == FLOAT32 else lax.convert_element_type(array, FLOAT32)
            for array, target in zip(args, targets, strict=True)
        ]
        return run(plan, constants, wide)

    def runner(operands: list[Any]) -> list[Any]:
        return bound(operands, inside)

    outputs: Sequence[Value] = [value.without_number for value in plan.outputs]
    return site.step(targets, outputs, runner=runner, wanted=plan.wanted, inner=[plan])


REGIONS: Mapping[str, Handler] = MappingProxyType(
    {
        **dict.fromkeys(("remat2", "remat", "checkpoint"), checkpoint),
        "shard_map": shard_map,
        **dict.fromkeys(("jit", "pjit"), placed_jit),
    }
)
