"""Which function differentiates: JAX's own, or, for modules of Flax NNX and Equinox, the one of their library.

NNX's carries what a module changes in the forward pass, such as statistics of a batch, out of the transform; Equinox's
leaves alone what is no array. Both libraries are known by what is loaded already: nothing is imported here.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax

from duotone.errors import LossScaleError

# of a function that returns a loss and something else
Differentiate = Callable[..., Callable[..., Any]]


def value_and_grad_of(arguments: tuple[Any, ...], argnums: Any) -> Differentiate:
    """Return the `value_and_grad` for a function of these arguments, which takes the function, argnums and has_aux.

    Raises:
        LossScaleError: gradients of something else than the first argument are asked for, and that holds a module of
            Equinox.
    """
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and any(_holds(argument, nnx.Module) for argument in arguments):
        return nnx.value_and_grad
    if equinox is not None and any(_holds(argument, equinox.Module) for argument in arguments):
        if argnums != 0:
            raise LossScaleError(
                f"argnums is {argnums!r}, but equinox.filter_value_and_grad, which differentiates functions of Equinox "
                "modules, takes the first argument alone; put what is to be differentiated into a tuple, and that first"
            )
        return lambda function, argnums, has_aux, **others: equinox.filter_value_and_grad(function, has_aux=has_aux)
    return jax.value_and_grad


def _holds(tree: Any, kind: type) -> bool:
    def is_module(node: Any) -> bool:
        return isinstance(node, kind)

    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))
