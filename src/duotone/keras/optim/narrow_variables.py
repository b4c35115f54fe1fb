"""What is lost where variables in 16 bits are trained without FP32 masters, in sentences with the way out."""

from collections.abc import Iterable, Sequence
from typing import Any

from duotone.formats import get_format
from duotone.keras import internals
from duotone.keras.optim.masters import Masters
from duotone.wording.words import SIXTEEN_BITS, first_few, label


def check_variables(optimizer: Any, variables: Iterable[Any]) -> list[str]:
    """Return what is unsafe in training these variables by an optimizer of Keras', as `check` does.

    >>> import keras
    >>> layer = keras.layers.Dense(1, dtype="bfloat16", name="head")
    >>> layer.build((None, 1))
    >>> check_variables(keras.optimizers.SGD(), layer.trainable_variables)[0][:64]
    'head/kernel and head/bias are in BF16 without FP32 masters, so S'
    """
    by_dtype = _by_dtype(variables)
    optimizers = list(internals.nested_optimizers(optimizer))
    if not by_dtype or any(isinstance(each, Masters) for each in optimizers):
        return []
    inner = optimizers[-1]
    name = type(inner).__name__
    findings = [
        f"{_are(paths)} in {label(dtype)} without FP32 masters, so {name} loses updates smaller than about 1/"
        f"{round(2 / get_format(dtype).epsilon)} of a weight; write dk.Masters({name}(...))."
        for dtype, paths in by_dtype.items()
    ]
    findings += [
        f"{name} keeps its state in {label(dtype)} ({first_few(paths)}); around FP32 masters it is FP32: write "
        f"dk.Masters({name}(...))."
        for dtype, paths in _by_dtype(inner.variables).items()
    ]
    return findings


def _by_dtype(variables: Iterable[Any]) -> dict[str, list[str]]:
    """Return paths of variables by their 16-bit dtype; others are left out."""
    found: dict[str, list[str]] = {}
    for variable in variables:
        if variable.dtype in SIXTEEN_BITS:
            found.setdefault(variable.dtype, []).append(getattr(variable, "path", None) or variable.name)
    return found


def _are(paths: Sequence[str]) -> str:
    if len(paths) == 2:
        return f"{paths[0]} and {paths[1]} are"
    return f"{first_few(paths)} {'is' if len(paths) == 1 else 'are'}"
