"""A policy given to the layers of a model that is built, as far as their variables allow."""

from collections.abc import Iterator
from typing import Any

import keras

from duotone.errors import PolicyError
from duotone.keras import internals
from duotone.keras.policies.places import Places, check_rules_hold, layers_inside


def apply_policy(policy: Any, model: keras.Model) -> None:
    """Give the layers of a built model what they compute in by a policy; their variables stay as they are.

    Args:
        policy: a `ModelPolicy`.
        model: that is built.

    Raises:
        PolicyError: a variable would need another dtype, or a rule holds for no layer. Nothing is changed then.
    """
    places = Places()
    held: set[int] = set()
    decided = []
    for path, layer, paths in places_of(model, places):
        found, rules = policy.of_layer(layer, places, paths)
        held |= rules
        for variable in internals.own_variables(layer):
            if variable.dtype != found.variable_dtype:
                raise PolicyError(
                    f'policy "{policy}" has {found.variable_dtype} variables for {path or model.name}, whose '
                    f"{variable.name} is {variable.dtype}, and the variables of a built model keep their dtype; make "
                    "the model in a `with dk.policy(...)`, and give it the weights by set_weights"
                )
        decided.append((layer, found))
    check_rules_hold(policy.policy, held, places)
    for layer, found in decided:
        internals.set_policy(layer, found)
    if model.compiled:
        # what was compiled computes in the dtypes of before
        model.train_function = model.test_function = model.predict_function = None


def places_of(model: Any, places: Places) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield a model and its layers that are not quantized, with their paths inside and dotted ones for rules."""
    yield "", model, places.add_layer(model.name, model)
    for path, layer, _ in layers_inside(model):
        paths = places.add_layer(f"{model.name}/{path}", layer)
        # a layer of a nested functional model was built at a path of its own
        built_at = internals.path_of(layer)
        paths += [] if built_at is None else places.add_layer(built_at, layer)
        if layer.quantization_mode is None and keras.backend.is_float_dtype(layer.compute_dtype):
            yield path, layer, list(dict.fromkeys(paths))
