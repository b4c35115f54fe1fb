"""What of a policy Keras can have: the same text as in torch and JAX, refused in a sentence where it is not possible.

A layer of Keras has two dtypes, of its variables (`param`) and of what it computes and returns (`compute`), and the
first is the second or float32. What a model returns is in what its last layer computes; losses and metrics take it in
FP32.

Left out: `residual`, for a layer casts what it is given (`type=Add: float32` keeps sums in FP32); formats of gradients
and of their reduction other than the variables'; stochastic rounding; FP8.
"""

import functools
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import keras

from duotone import policy_spelling as spelling
from duotone.errors import PolicyError
from duotone.policy import Policy, Rule

# dtypes of variables and of arithmetic to the name of Keras' policy
NAMES = {
    ("float32", "float32"): "float32",
    ("bfloat16", "bfloat16"): "bfloat16",
    ("float16", "float16"): "float16",
    ("float32", "bfloat16"): "mixed_bfloat16",
    ("float32", "float16"): "mixed_float16",
}
# Keras' names to the presets that mean the same
PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "float32": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
        "mixed_bfloat16": "bf16-mixed",
        "mixed_float16": "fp16-mixed",
    }
)
_REFUSED = {
    "reduce": ("float32", "replicas reduce gradients in the dtype that they have; leave reduce out"),
    "state": ("float32", "the moments under dk.Masters are FP32; leave state out"),
    "frozen": ("rounded", "a layer's variables have one dtype, whether they train or not; leave frozen out"),
    "inputs": (None, "each layer casts what it is given to what it computes in; leave inputs out"),
}


@functools.cache
def read(policy: str | Policy) -> Policy:
    """Return the policy that `policy` means, with dots in paths, if Keras can have it.

    Raises:
        PolicyError: it is no policy, or has a role that Keras cannot carry out.

    >>> read("fp16; encoder/head: float32").rules[0].pattern
    'encoder.head'
    >>> read("bf16,reduce=bfloat16")
    Traceback (most recent call last):
    duotone.errors.PolicyError: policy "bf16,reduce=bfloat16": Keras has no reduce=bfloat16; replicas reduce ...
    """
    found = Policy.parse(policy)
    rules = tuple(Rule(rule.pattern.replace("/", "."), rule.roles) for rule in found.rules)
    base = roles_of(found)
    _check(found, base, base, "")
    for rule in rules:
        given = dict(rule.roles)
        _check(found, given, spelling.change(base, given), f' in rule "{rule}"')
        if "residual" in given:
            reason = "a layer casts what it is given; write type=Add: float32 for sums in FP32"
            raise _refusal(found, f'residual={given["residual"]} in rule "{rule}"', reason)
    return Policy(**base, rules=rules)  # type: ignore[arg-type]


def keras_name(policy: Policy) -> str:
    """Return the name of the dtype policy of Keras' whose layers have a policy's `param` and `compute`.

    >>> keras_name(Policy.parse("fp16-mixed"))
    'mixed_float16'
    """
    return NAMES[policy.param, policy.compute]


def combined(policy: Policy, changes: Mapping[str, Any], path: str) -> keras.DTypePolicy:
    """Return Keras' policy for a layer in which roles differ from a policy's.

    Raises:
        PolicyError: the roles do not fit each other.

    >>> combined(read("fp16"), {"param": "float32"}, "norm").name
    'mixed_float16'
    """
    whole = spelling.change(roles_of(policy), changes)
    if not spelling.passes_float16([whole]):
        whole["loss_scale"] = "none"
    try:
        return keras.DTypePolicy(keras_name(Policy(**whole)))  # type: ignore[arg-type]
    except PolicyError as error:
        given = spelling.write(changes)
        raise PolicyError(f'layer "{path}" under rules that say {given}: {error}') from error


def roles_of(policy: Policy) -> dict[str, Any]:
    """Return every role of a policy, without its rules."""
    return {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "rules"}


def _check(policy: Policy, given: Mapping[str, Any], whole: Mapping[str, Any], where: str) -> None:
    """Raise for what Keras cannot have among the roles `given`; `whole` are all roles there."""
    for role, (allowed, reason) in _REFUSED.items():
        if given.get(role, allowed) != allowed:
            raise _refusal(policy, f"{role}={given[role]}{where}", reason)
    if given.get("rounding") == "stochastic":
        reason = "keep masters, as presets without -true and dk.Masters do"
        raise _refusal(policy, f"rounding=stochastic{where}", reason)
    if str(given.get("compute")).startswith("float8"):
        reason = 'write compute=bfloat16 or compute=float16, and call model.quantize("float8") once it is built'
        raise _refusal(policy, f"compute={given['compute']}{where}", reason)
    if "grad" in given and given["grad"] != whole["param"]:
        reason = f"gradients have the dtype of their variables; write grad={whole['param']}, or leave grad out"
        raise _refusal(policy, f"grad={given['grad']}{where} for {whole['param']} variables", reason)
    if given.get("output", "float32") not in ("float32", whole["compute"]):
        reason = f"a layer returns what it computes in; write output={whole['compute']}, or leave output out"
        raise _refusal(policy, f"output={given['output']}{where} beside compute={whole['compute']}", reason)
    if where and given.get("output") == "float32" and given.get("compute", "float32") != "float32":
        reason = "a layer returns what it computes in; write compute=float32 there"
        raise _refusal(policy, f"output=float32{where} beside compute={given['compute']}", reason)


def _refusal(policy: Policy, what: str, reason: str) -> PolicyError:
    return PolicyError(f'policy "{policy.name}": Keras has no {what}; {reason}')
