"""Which dtype each weight of a pytree has under a policy; `cast` carries it out, and `masters` starts from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp

from duotone.errors import PolicyError
from duotone.jax.trees import Leaf, classes_of, is_floating, is_nnx_param, leaves_of
from duotone.jax.weights.norms import is_of_norm, starts_stream
from duotone.policy import Policy, Rule

SPLIT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
FLOAT32 = jnp.dtype(jnp.float32)
_CASTABLE = (FLOAT32, *SPLIT_DTYPES)


@dataclass(frozen=True)
class Weight:
    """A leaf, and what becomes of it.

    Attributes:
        leaf: as it is.
        dtype: that the policy gives it; None for a leaf that policies leave alone: integers, complex numbers, FP64,
            Python numbers, running statistics.
    """

    leaf: Leaf
    dtype: jnp.dtype | None


def plan(tree: Any, policy: Policy, *, is_whole: bool = True) -> list[Weight]:
    """Return what becomes of every leaf, in JAX's order.

    Args:
        tree: any pytree.
        policy: one that JAX can have.
        is_whole: whether all weights are in the tree, so that a rule that holds for none is a mistake.

    Raises:
        PolicyError: a rule that sets `param` holds for no weight, or roles do not fit each other.

    >>> tree = {"dense": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}, "step": jnp.int32(0)}
    >>> [(weight.leaf.path, str(weight.dtype)) for weight in plan(tree, Policy.parse("bf16"))]
    [('dense.kernel', 'bfloat16'), ('norm.scale', 'float32'), ('step', 'None')]
    """
    leaves, classes = leaves_of(tree), classes_of(tree)
    weights = [leaf for leaf in leaves if _is_weight(leaf)]
    rules = [rule for rule in policy.rules if "param" in dict(rule.roles)]
    if is_whole:
        _check_rules(rules, weights, classes)
    made: dict[tuple[Rule, ...], Policy] = {}
    dtypes = {}
    for leaf in weights:
        own = tuple(rule for rule in policy.rules if rule.holds_for(leaf.path, classes))
        if own not in made:
            made[own] = policy.for_module(leaf.path, classes)
        dtypes[id(leaf)] = _dtype(leaf, made[own], rules, classes)
    return [Weight(leaf, dtypes.get(id(leaf))) for leaf in leaves]


def _dtype(leaf: Leaf, policy: Policy, rules: list[Rule], classes: Mapping[str, tuple[str, ...]]) -> jnp.dtype:
    # a rule for the very weight or for what holds it goes before what norms are
    part = leaf.path.rpartition(".")[0]
    is_named = any(rule.matches(path, classes) for rule in rules for path in (leaf.path, part))
    stays = is_of_norm(leaf, classes) or (policy.residual == "float32" and starts_stream(leaf))
    return FLOAT32 if stays and not is_named else jnp.dtype(policy.param)


def _is_weight(leaf: Leaf) -> bool:
    # FP64 of NumPy is FP32 where JAX has no FP64
    if not is_floating(leaf.value) or jax.dtypes.canonicalize_dtype(leaf.value.dtype) not in _CASTABLE:
        return False
    if leaf.variable is not None and not is_nnx_param(leaf.variable):
        return False
    return leaf.collection in (None, "params") and not leaf.is_state


def _check_rules(rules: list[Rule], weights: list[Leaf], classes: Mapping[str, tuple[str, ...]]) -> None:
    paths = [leaf.path for leaf in weights]
    for rule in rules:
        if weights and not any(rule.holds_for(path, classes) for path in paths):
            raise PolicyError(
                f'rule "{rule}" sets param, but holds for no weight, {_nearest(rule.pattern, paths, classes)}'
            )


def _nearest(pattern: str, paths: list[str], classes: Mapping[str, tuple[str, ...]]) -> str:
    """Return what a pattern that matches nothing may have meant, as the end of a sentence."""
    if pattern.startswith("type="):
        known = list(dict.fromkeys(names[0] for names in classes.values()))
        if not known:
            return "for nothing in this pytree has a class; name weights by their path, such as blocks.*.norm"
        near = get_close_matches(pattern.removeprefix("type="), known, n=3, cutoff=0.5) or known[:5]
        return f"for its classes are {', '.join(near)}; correct its pattern"
    near = get_close_matches(pattern, paths, n=3, cutoff=0.5) or paths[:5]
    return f"whose paths are such as {', '.join(near)}; correct its pattern"
