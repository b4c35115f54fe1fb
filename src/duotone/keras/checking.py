"""`dk.check`: what of a model's mixed precision is unsafe, in sentences that say the way out.

Looks at layers, variables, the graph of a functional model and the optimizer; runs nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import keras

from duotone.errors import PolicyError
from duotone.keras import internals
from duotone.keras.optim.loss_scale_optimizer import LossScaleOptimizer
from duotone.keras.optim.masters import Masters
from duotone.keras.optim.narrow_variables import check_variables
from duotone.keras.policies.places import layers_inside
from duotone.keras.policies.safety import family_of, safe_roles
from duotone.operations import FAMILIES
from duotone.wording.words import SIXTEEN_BITS, first_few, label

# functions of keras.ops that outgrow FP16, by the class of their place in a functional graph, and those that add up in
# BF16 too; that Keras' other sums are made in FP32 and rounded once is measured
_ADD_UP_IN_16_BITS = frozenset({"Cumsum", "SegmentSum"})
_OUTGROW_FP16 = (
    _ADD_UP_IN_16_BITS
    | {"Sum", "Prod", "Cumprod", "Norm", "Normalize", "Var", "Std"}
    | {"Exp", "Exp2", "Expm1", "Square", "Power", "Reciprocal"}
)
# why 16 bits are unsafe, where the reason of the family says why they are not
_REASONS = {
    "softmax": "probabilities are rounded, and in FP16 small ones become 0",
    "average_pool": "means of windows are sums, which outgrow 16 bits",
    "lookup": "the gradient of a row that is read often is a sum, which outgrows 16 bits",
    "normalization": "statistics and scales move by less than 16 bits hold",
    "statistic": "data beyond 65504 are Inf in FP16, and lose digits in 16 bits",
    "loss": "a penalty is a sum, which outgrows 16 bits",
}


def check(model: keras.Model, optimizer: Any = None) -> list[str]:
    """Return what is unsafe in a model's mixed precision: sentences, each with its way out; none if all is right.

    Args:
        model: of Keras, built or not; what is not built is not seen.
        optimizer: that it is trained by; None for the one that it was compiled with.

    Raises:
        PolicyError: `model` is no model of Keras.

    >>> import keras
    >>> import duotone.keras as dk
    >>> with dk.policy("fp16-mixed"):
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> print(*dk.check(model, keras.optimizers.Adam()), sep="\\n")
    head computes in FP16, but Adam does not scale the loss, so small gradients become 0; train with
    dk.LossScaleOptimizer(Adam(...), "fp16-mixed").
    >>> dk.check(model, dk.LossScaleOptimizer("adam", "fp16-mixed"))
    []
    """
    if not isinstance(model, keras.Model):
        raise PolicyError(f"check takes a model of Keras, not {model!r:.60}; give the model that is to be trained")
    trained_by = optimizer if optimizer is not None else getattr(model, "optimizer", None)
    findings = unsafe_model(model)
    if trained_by is not None:
        findings += [*unsafe_scaling(model, trained_by), *check_variables(trained_by, model.trainable_variables)]
    return findings


def unsafe_model(model: keras.Model) -> list[str]:
    """Return what is unsafe in a model's layers, operations and losses, and in Keras' global settings for it."""
    layers = list(layers_inside(model))
    return [*_unsafe_layers(layers), *_unsafe_operations(model), *_global_settings(layers), *_losses(model)]


def _unsafe_layers(layers: Iterable[tuple[str, Any, Sequence[str]]]) -> Iterator[str]:
    """Yield a finding for each family that 16 bits are not safe in, with the layers that have it in 16 bits."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    for path, layer, around in layers:
        family, roles = family_of(layer, around), safe_roles(layer, around)
        if family == "lookup" and keras.backend.backend() != "torch":
            continue
        if family is not None and "compute" in roles and layer.compute_dtype in SIXTEEN_BITS:
            found.setdefault((family, layer.compute_dtype, True), []).append(path)
        elif family is not None and any(each.dtype in SIXTEEN_BITS for each in internals.own_variables(layer)):
            found.setdefault((family, layer.variable_dtype, False), []).append(path)
    for (family, dtype, computes), paths in found.items():
        reason = _REASONS.get(family, FAMILIES[family].reason)
        what = f"in {label(dtype)}" if computes else f"with {label(dtype)} variables"
        verb = "computes" if len(set(paths)) == 1 else "compute"
        way = 'dtype="float32"' if computes else f'dtype="mixed_{dtype}"'
        yield f"{first_few(paths)} {verb} {what}: {reason}; make the model in a dk.policy, or the layer with {way}."


def _unsafe_operations(model: Any) -> Iterator[str]:
    """Yield a finding for functions of keras.ops in a functional graph that outgrow the 16 bits of their operand."""
    for operation in getattr(model, "operations", ()):
        name = type(operation).__name__
        if isinstance(operation, keras.layers.Layer) or name not in _OUTGROW_FP16:
            continue
        dtypes = {each.dtype for each in keras.tree.flatten(operation.input)} & set(SIXTEEN_BITS)
        if "float16" in dtypes or (dtypes and name in _ADD_UP_IN_16_BITS):
            yield (
                f"{operation.name} (keras.ops.{name}) runs in {label(min(dtypes))}, "
                'which it outgrows; cast its operand by keras.ops.cast(x, "float32").'
            )


def _global_settings(layers: Iterable[tuple[str, Any, Sequence[str]]]) -> Iterator[str]:
    """Yield findings about Keras' global settings."""
    floatx = keras.config.floatx()
    if floatx in SIXTEEN_BITS:
        yield (
            f"keras.config.floatx() is {floatx}, in which losses and metrics are computed and inputs made; write "
            'keras.config.set_floatx("float32"), and make the model in a dk.policy.'
        )
    policy = keras.config.dtype_policy()
    computing = [layer for _, layer, _ in layers if layer.weights]
    if (
        policy.compute_dtype in SIXTEEN_BITS
        and computing
        and all(layer.compute_dtype not in SIXTEEN_BITS for layer in computing)
    ):
        yield (
            f"the global dtype policy is {policy.name}, but every layer of this model was made before and computes in "
            f"{label(computing[0].compute_dtype)}; make the model after setting the policy, or in a dk.policy."
        )


def _losses(model: Any) -> Iterator[str]:
    """Yield findings about losses and metrics that compute in 16 bits."""
    if not getattr(model, "compiled", False):
        return
    losses = [each for each in keras.tree.flatten(model.loss) if isinstance(each, keras.Loss)]
    for each in [*losses, *model.metrics]:
        if each.dtype in SIXTEEN_BITS:
            yield f'{each.name} adds up in {label(each.dtype)}; make it with dtype="float32".'


def unsafe_scaling(model: keras.Model, optimizer: Any) -> Iterator[str]:
    """Yield what is unsafe in how an optimizer scales the loss of a model."""
    layers = list(layers_inside(model))
    narrow = [
        path
        for path, layer, _ in layers
        if "float16" in (layer.compute_dtype, layer.variable_dtype) and not internals.sublayers(layer)
    ]
    inner = _inner_optimizers(optimizer)
    name = type(inner[-1]).__name__
    scales = [each for each in inner if isinstance(each, keras.optimizers.LossScaleOptimizer)]
    static = [each for each in inner if getattr(each, "loss_scale_factor", None) is not None]
    preset = "fp16" if any(layer.variable_dtype == "float16" for _, layer, _ in layers) else "fp16-mixed"
    wrapped = f"dk.Masters({name}(...))" if preset == "fp16" else f"{name}(...)"
    if scales and not isinstance(scales[0], LossScaleOptimizer):
        yield (
            "Keras' LossScaleOptimizer has no floor and no ceiling: its scale can reach Inf, and 0, after which a step "
            "makes every weight NaN, and nobody counts what it skips; write "
            f'dk.LossScaleOptimizer({wrapped}, "{preset}").'
        )
    if scales and static and static != scales:
        yield (
            f"{type(static[-1]).__name__} has a loss_scale_factor inside a LossScaleOptimizer, so gradients are "
            "divided twice; leave loss_scale_factor out."
        )
    if narrow and not scales and not static:
        yield (
            f"{_compute(narrow)} in FP16, but {type(optimizer).__name__} does not scale the loss, so small gradients "
            f'become 0; train with dk.LossScaleOptimizer({wrapped}, "{preset}").'
        )
    for outer, within in pairwise(inner):
        if isinstance(outer, Masters) and isinstance(within, keras.optimizers.LossScaleOptimizer):
            yield "Masters is around a LossScaleOptimizer; write dk.LossScaleOptimizer(dk.Masters(...))."


def _inner_optimizers(optimizer: Any) -> list[Any]:
    """Return an optimizer and those inside it, from the outermost in."""
    found = [optimizer]
    while hasattr(found[-1], "inner_optimizer"):
        found.append(found[-1].inner_optimizer)
    return found


def _compute(paths: Sequence[str]) -> str:
    return f"{first_few(paths)} {'computes' if len(paths) == 1 else 'compute'}"
