"""Every name of Keras that is not public, and every difference of its versions, each with its reason.

No other module of `duotone.keras` imports `keras.src` or asks for a version.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.saving import saving_lib
from keras.src.utils.tracking import DotNotTrackScope

__all__ = [
    "KEY",
    "StoragelessVariable",
    "asking_layer",
    "beside",
    "build_for_loading",
    "calling_list",
    "forget_own_variables",
    "in_stateless_scope",
    "index_of",
    "is_released",
    "is_same_program",
    "is_wrapped_by_keras",
    "key_of",
    "layout_of",
    "nested_optimizers",
    "ops",
    "own_variables",
    "path_of",
    "scopes",
    "set_policy",
    "stand_in_exclusions",
    "sublayers",
    "trained_variables",
    "unbuilt_layers",
    "update_each",
    "updates_in_replicas",
    "values_in_file",
    "values_in_fit",
    "variables_of",
    "would_leak_tracers",
]

# by what Keras' optimizers on TensorFlow know variables
KEY = "_unique_id"

# Keras declares no types, and those that pyright infers from the body of an operation are wrong
ops: Any = keras.ops


def trained_variables(optimizer: Any) -> list[Any]:
    """Return the variables that an optimizer was built on; it keeps them under a private name alone."""
    return optimizer._trainable_variables


def index_of(optimizer: Any, variable: Any) -> int:
    """Return a variable's place among those that an optimizer was built on; on TensorFlow replicas have copies of it.

    Raises:
        ValueError: the optimizer was not built on it.
    """
    optimizer._check_variables_are_known([variable])
    return optimizer._get_variable_index(variable)


def is_released(variable: Any) -> bool:
    """Return whether `fit` on JAX has taken a variable's value away while it trains, and `value` would be the first.

    `Model.jax_state_sync` gives the values back; a `StatelessScope` may lend one.
    """
    scope = get_stateless_scope()
    return variable._value is None and (scope is None or scope.get_current_value(variable) is None)


class StoragelessVariable(keras.Variable):
    """A variable of Keras that looks like another one, in a dtype of its own, and holds nothing.

    Keras offers no such thing: its constructor asks its own method to make a value, which here makes none, and the path
    and the layout of a variable are given by scopes that are closed by now.
    """

    def __init__(self, like: Any, dtype: str) -> None:
        super().__init__(
            "zeros",
            shape=like.shape,
            dtype=dtype,
            autocast=False,
            aggregation=like.aggregation,
            synchronization=like.synchronization,
            name=like.name,
            layout=like._layout,
        )
        self._path = like.path
        if keras.backend.backend() == "tensorflow":
            setattr(self, KEY, f"{getattr(like.value, KEY)}_{dtype}")

    def _initialize_with_initializer(self, initializer: Any) -> None:
        pass


def layout_of(variable: Any) -> Any:
    """Return how a variable lies on devices: a layout of `keras.distribution`, or None."""
    return variable._layout


def beside(optimizer: Any, variable: Any) -> AbstractContextManager[Any]:
    """Return a context in which an optimizer makes variables where another one is: on TensorFlow, on its devices."""
    if keras.backend.backend() != "tensorflow":
        return nullcontext()
    return optimizer._distribution_strategy.extended.colocate_vars_with(variable.value)


def key_of(optimizer: Any, variable: Any) -> Any:
    """Return by what an optimizer knows a variable."""
    return optimizer._var_key(variable)


def forget_own_variables(optimizer: Any) -> None:
    """Take out of an optimizer's variables the count of steps and the learning rate that Keras gives to every one."""
    optimizer._untrack_variable(optimizer._iterations)
    optimizer._untrack_variable(optimizer._learning_rate)
    # TensorFlow exports no object with a list that something was deleted from, so a new one takes its place
    with DotNotTrackScope():
        optimizer._variables = list(optimizer._variables)
    stores = optimizer._tracker.config
    stores["variables"] = (stores["variables"][0], optimizer._variables)


def stand_in_exclusions(optimizer: Any, stand_in_of: Callable[[Any], Any], variables: Iterable[Any]) -> None:
    """Exclude from an optimizer's weight decay what stands in for the variables that were excluded themselves.

    `exclude_from_weight_decay(var_list)` is called before `build` and keeps keys alone.
    """
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    if excluded:
        excluded.update(
            key_of(optimizer, stand_in_of(each)) for each in variables if key_of(optimizer, each) in excluded
        )
    for each in getattr(optimizer, "optimizers", ()):
        stand_in_exclusions(each, stand_in_of, variables)


def update_each(optimizer: Any, variables: Sequence[Any], function: Callable[[int], None]) -> None:
    """Call `function(i)` where the variable i may be assigned to.

    With a `tf.distribute.Strategy` that is once for each replica and outside of what they run, as Keras' own optimizers
    update variables; TensorFlow has no public name for what leads there.
    """
    if keras.backend.backend() != "tensorflow":
        for index in range(len(variables)):
            function(index)
        return
    import tensorflow as tf

    def update_all(strategy: Any) -> None:
        for index, variable in enumerate(variables):
            strategy.extended.update(variable.value, lambda _, index=index: function(index), group=False)

    tf.__internal__.distribute.interim.maybe_merge_call(update_all, optimizer._distribution_strategy)


def values_in_fit(model: Any) -> list[tuple[Any, Any]]:
    """Return the variables of the model's optimizer that `fit` has taken the values of, each with its value.

    On JAX a step is a function of all variables: `fit` takes their values out, hands them from step to step, and puts
    them back at the end of an epoch. Keras' own way out, `jax_state_sync`, assigns all of them, and the next step
    begins with collecting all of them again.
    """
    state = getattr(model, "_jax_state", None)
    if not state or getattr(model, "_jax_state_synced", True):
        return []
    return list(zip(model.optimizer.variables, state.get("optimizer_variables") or (), strict=False))


def calling_list() -> list[Any] | None:
    """Return the callbacks of the nearest `CallbackList` that called; None if there is none.

    A callback is told its model and its parameters, and neither which others there are nor which comes first.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller.callbacks
        frame = frame.f_back
    return None


def asking_layer(policy: Any, depth: int) -> Any:
    """Return the layer that asks its own dtype policy, or None.

    A layer asks through its property `compute_dtype` or another, and says neither its name nor its class; a
    `DTypePolicyMap` is told the path, but only of layers that have variables and were built before. So the frame that
    asks is looked at.

    Args:
        policy: what is asked.
        depth: how many frames lie between the layer's and this function.
    """
    layer = sys._getframe(depth + 1).f_locals.get("self")
    return layer if isinstance(layer, keras.layers.Layer) and layer._dtype_policy is policy else None


def is_wrapped_by_keras(optimizer: Any) -> bool:
    """Return whether the constructor of Keras' own LossScaleOptimizer sets an attribute of an optimizer just now.

    It tells an optimizer that it goes around it by setting `loss_scale_factor` to None, and by nothing else.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is optimizer:
        frame = frame.f_back
    return frame is not None and type(frame.f_locals.get("self")) is keras.optimizers.LossScaleOptimizer


def build_for_loading(optimizer: Any) -> None:
    """Build an optimizer for the model whose file is being read, if that has its weights and it is not built.

    Keras reads files by asking each object for what it has, and tells none of them of which model it is a part;
    optimizers are built in the first step of `fit`, behind `load_weights`.
    """
    frame = sys._getframe(1)
    while frame is not None and not optimizer.built:
        model = frame.f_locals.get("saveable")
        if isinstance(model, keras.Model) and getattr(model, "optimizer", None) is optimizer and model.built:
            with _scope_of(model):
                optimizer.build(model.trainable_variables)
        frame = frame.f_back


def _scope_of(model: Any) -> AbstractContextManager[Any]:
    """Return the scope of a model's `tf.distribute.Strategy`, in which its optimizer makes variables."""
    return model.distribute_strategy.scope() if hasattr(model, "distribute_strategy") else nullcontext()


def set_policy(layer: Any, policy: Any) -> None:
    """Give a layer another dtype policy; where it has a `DTypePolicyMap`, the public attribute writes into that map."""
    layer._dtype_policy = policy


def scopes() -> list[tuple[str, Any]]:
    """Return path and caller of each open name scope, from the outermost in, as Keras makes paths of variables."""
    found, parts = [], []
    for scope in get_global_attribute("name_scope_stack") or ():
        if scope.override_parent is not None:
            parts = [part for part in scope.override_parent.split("/") if part]
        parts.append(scope.name)
        found.append(("/".join(parts), scope.caller))
    return found


def path_of(layer: Any) -> str | None:
    """Return a layer's path, also of one without variables, which has no `path`; None before it is called or built."""
    if layer.path is not None or layer._parent_path is None:
        return layer.path
    return f"{layer._parent_path}/{layer.name}".lstrip("/")


def sublayers(layer: Any) -> list[Any]:
    """Return the layers directly inside a layer or a model; `layers` is an attribute of models alone."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def unbuilt_layers(policy: Any) -> bool:
    """Return whether a layer that is not built yet holds this dtype policy; Keras keeps no list of the layers made."""
    # layers that Keras made copies of are in cycles
    gc.collect()
    for referrer in gc.get_referrers(policy):
        attributes = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", {})
        if attributes.get("_dtype_policy") is policy and not attributes.get("built", True):
            return True
    return False


def is_same_program(one: Any, other: Any) -> bool:
    """Return whether two tensors are numbers both, or parts of the same program that is being traced.

    JAX keeps a tracer's program under a private name; without it no two tracers are known to be of the same.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        symbolic = tf.is_symbolic_tensor(one), tf.is_symbolic_tensor(other)
        return symbolic == (False, False) or (symbolic == (True, True) and one.graph is other.graph)
    if backend == "jax":
        from jax.core import Tracer

        traces = [getattr(each, "_trace", each) if isinstance(each, Tracer) else None for each in (one, other)]
        return traces[0] is traces[1]
    return True


def would_leak_tracers() -> bool:
    """Return whether an assignment in a program of JAX goes into the variables themselves.

    In a stateless scope it does not, and Flax' transforms take the values out of variables that are Flax' own too.
    """
    return keras.backend.backend() == "jax" and not in_stateless_scope() and not keras.config.is_nnx_enabled()


def updates_in_replicas() -> bool:
    """Return whether replicas of a TensorFlow strategy update without meeting, as on TPUs and in XLA on GPUs.

    Keras asks TensorFlow by the same name.
    """
    import tensorflow as tf

    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def nested_optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and all inside of it: one around another, and several in a MultiOptimizer."""
    yield optimizer
    inner = [*getattr(optimizer, "optimizers", ()), getattr(optimizer, "inner_optimizer", None)]
    for each in inner:
        if each is not None:
            yield from nested_optimizers(each)


def variables_of(layer: Any) -> list[Any]:
    """Return the variables of a layer itself; `variables` has those of the layers inside too."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_variables(layer: Any) -> list[Any]:
    """Return the floating-point variables of a layer itself."""
    return [variable for variable in variables_of(layer) if keras.backend.is_float_dtype(variable.dtype)]


def values_in_file(model: Any, path: str, variables: Sequence[Any]) -> list[Any]:
    """Return what a file of weights holds for variables of a model, in FP32 for those in 16 bits; None for nothing.

    Keras reads such files by assigning to variables alone, which first casts to what a variable keeps its dtype in.
    So its own reader runs with FP32 there, in a scope that keeps what is assigned away from the variables, and it is
    told by the only name that takes all its files to leave the optimizer out.
    """
    narrow = [each for each in variables if each._dtype in ("bfloat16", "float16")]
    before = [each._dtype for each in narrow]
    try:
        for each in narrow:
            each._dtype = "float32"
        with keras.StatelessScope(initialize_variables=False) as scope:
            if path.endswith((".keras", "weights.h5", "weights.json")):
                saving_lib.load_weights_only(model, path, objects_to_skip=[getattr(model, "optimizer", None)])
            else:
                model.load_weights(path)
        return [scope.get_current_value(each) for each in variables]
    finally:
        for each, dtype in zip(narrow, before, strict=True):
            each._dtype = dtype
