"""The policy of a model that is built, read from its layers."""

from dataclasses import replace
from typing import Any

import keras

from duotone.errors import PolicyError
from duotone.keras.policies import roles
from duotone.keras.policies.built_model import places_of
from duotone.keras.policies.model_policy import ModelPolicy
from duotone.keras.policies.places import Places
from duotone.policy import Rule
from duotone.policy_spelling import read


def policy_of(model: keras.Model) -> ModelPolicy:
    """Return the policy, of as few rules as can be found, that gives the layers of a built model what they have.

    Raises:
        PolicyError: a layer has dtypes that no policy says, such as float64.

    >>> with ModelPolicy("bf16; head: float32"):
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2, name="head")])
    >>> print(policy_of(model))
    bf16; head: param=float32,compute=float32
    """
    presets = {_preset_of(layer) for _, layer, _ in places_of(model, Places())}
    found = [_with_rules(ModelPolicy(preset), model) for preset in sorted(presets)]
    return min(found, key=lambda each: len(each.policy.rules))


def _with_rules(policy: ModelPolicy, model: keras.Model) -> ModelPolicy:
    """Return a policy with a rule for each layer that has other dtypes; layers come after those that they are in."""
    places = Places()
    for path, layer, paths in places_of(model, places):
        preset = _preset_of(layer)
        if roles.PRESETS[policy.of_layer(layer, places, paths)[0].name] != preset:
            pattern = "".join("?" if char in ";:" or char.isspace() else char for char in path or model.name)
            (_, given), *_ = read(f"fp32; x: {preset}")[1]
            rule = Rule(pattern.replace("/", "."), tuple(given.items()))  # type: ignore[arg-type]
            scale = "dynamic" if "fp16" in preset and not policy.policy.needs_loss_scale else policy.policy.loss_scale
            policy = ModelPolicy(replace(policy.policy, rules=(*policy.policy.rules, rule), loss_scale=scale))
    return policy


def _preset_of(layer: Any) -> str:
    name = roles.NAMES.get((layer.variable_dtype, layer.compute_dtype))
    if name is None:
        raise PolicyError(
            f"{layer.name} has {layer.variable_dtype} variables and computes in {layer.compute_dtype}, which no policy "
            "says; float32, bfloat16 and float16 are known"
        )
    return roles.PRESETS[name]
