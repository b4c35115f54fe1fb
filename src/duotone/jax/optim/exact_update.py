"""The update of a 16-bit weight: what `tx.update` returns in its place, and what adds to the weight without rounding.

    new weight = weight + update

An update holds the new weight itself, rounded from its new master, so adding it rounds nothing, and takes no memory
where the new weight is in the old one's place already. Zeros change nothing: that is what `optax.MultiSteps` makes of
an update that is not due. Nothing else can be done with it. The masters have moved already, so an update that is
scaled, clipped, negated or summed afterwards would leave weight and tail of different masters, and is refused: where an
operation changes the dtype of a part, when it is traced; where it does not (a schedule's step size is cast to the dtype
of what it multiplies), the weight becomes NaN.

It is a pytree, so it crosses `jit` and `cond`. `equinox.apply_updates` takes updates as a prefix of the model, where an
array must stand against an array: in a model of Equinox an update is an opaque leaf, which works inside of one jitted
function alone.
"""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.core import Tracer

from duotone.errors import OptimizerError

_FLOAT0 = jax.dtypes.float0
# of the parts after the first, the new weight: a mark whose dtype factors change, and one whose number they change
_DTYPES = (jnp.dtype(bool), jnp.dtype(jnp.float32))
# multiplied by what the update is multiplied by; the second makes the norm of updates infinite, not a wrong number
_UNSCALED = (1.0, float("inf"))


class ExactUpdate:
    """What is added to one 16-bit weight: `weight + update`, and nothing else.

    >>> weight = jnp.bfloat16([1.0, -2.0])
    >>> update = exact_update(jnp.bfloat16([1.0078125, 3.0]))
    >>> weight + update
    Array([1.00781, 3], dtype=bfloat16)
    >>> 0.5 * update
    Traceback (most recent call last):
    duotone.errors.OptimizerError: updates of 16-bit weights can only be added to them: ...
    """

    # NumPy leaves `array + update` to the update then
    __array_ufunc__ = None

    def __init__(self, new: Any, mark: Any, factors: Any, dtype: Any) -> None:
        self._parts = (new, mark, factors)
        self._dtype = dtype

    def __radd__(self, weight: Any) -> Any:
        new, _, factors = self._parts
        if jnp.shape(weight) != new.shape or getattr(weight, "dtype", None) != self._dtype:
            raise OptimizerError(
                f"this update is of a weight of dtype {self._dtype} and shape {new.shape}, not of "
                f"{getattr(weight, 'dtype', type(weight).__name__)} and {jnp.shape(weight)}; add it to the "
                "parameters that tx.update was given"
            )
        # with as many dimensions as were added by vmap
        factor = factors[..., 0]
        factor = factor.reshape(factor.shape + (1,) * (new.ndim - factor.ndim))
        is_due, is_none = factor == 1, (factor == 0) & (new == 0)
        if not isinstance(is_none, Tracer):
            if not (is_due | is_none).all():
                refuse()
            # without a NaN, which jax_debug_nans would find
            return jnp.where(is_due, new, weight)
        return jnp.where(is_due, new, jnp.where(is_none, weight, jnp.nan))

    def __add__(self, weight: Any) -> Any:
        if isinstance(weight, ExactUpdate):
            refuse()
        return self.__radd__(weight)

    def _refuse(self, *_: Any) -> NoReturn:
        refuse()

    __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __neg__ = __pow__ = __abs__ = _refuse
    __array__ = __float__ = __getitem__ = _refuse
    real = imag = property(_refuse)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(of a weight of {self._dtype} and shape {getattr(self._parts[0], 'shape', None)})"


class OpaqueUpdate(ExactUpdate):
    """The same as a leaf, for models of Equinox: JAX knows nothing of what is in it."""


def exact_update(new: jax.Array, *, kind: type[ExactUpdate] = ExactUpdate) -> ExactUpdate:
    """Return what makes `new` of the weight that it takes the place of."""
    return kind(new, jnp.zeros(0, bool), jnp.float32(_UNSCALED), jnp.dtype(new.dtype))


def refuse() -> NoReturn:
    """Say what an update cannot do.

    Raises:
        OptimizerError: always.
    """
    raise OptimizerError(
        "updates of 16-bit weights can only be added to them: the masters have moved by them already, so they "
        "cannot be scaled, clipped, averaged or measured; put what does that inside, masters(optax.chain(..., "
        "optax.scale(0.5)), policy)"
    )


def _flatten(update: ExactUpdate) -> tuple[tuple[Any, ...], Any]:
    return update._parts, update._dtype


def _unflatten(dtype: Any, parts: Any) -> ExactUpdate:
    for part, expected in zip(parts, (dtype, *_DTYPES), strict=True):
        # JAX also puts shapes, shardings, tangents and placeholders here; an array of another dtype was computed with
        if isinstance(part, jax.Array) and part.dtype not in (expected, _FLOAT0):
            refuse()
    new, mark, factors = parts
    return ExactUpdate(new, mark, factors, dtype)


tree_util.register_pytree_node(ExactUpdate, _flatten, _unflatten)
