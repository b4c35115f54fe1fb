"""Parts of a model that its class says are to stay FP32: `_keep_in_fp32_modules` of transformers and diffusers.

    _keep_in_fp32_modules           where weights or arithmetic are FP16: T5's `wo`, whose results go beyond 65504
    _keep_in_fp32_modules_strict    in BF16 too: the gates of experts, attention sinks

Both hold names of modules and parameters, as parts of dotted paths. A module all of whose parameters are named is under
the rule `path: param=float32,compute=float32,output=float32`, before the rules of the policy; one of those that sets
`param` or `compute` there takes its place. Any other parameter that is named is kept in FP32, and its module computes
as the policy says. Of a tied parameter all names have to be named. Left out: diffusers'
`_skip_layerwise_casting_patterns`, which are about storage in 8 bits.
Source: `_get_dtype_plan` in https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from duotone.policy import ClassNames, Policy, Rule

_ATTRIBUTE, _STRICT = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"
_ROLES = (("param", "float32"), ("compute", "float32"), ("output", "float32"))


def kept_parameters(modules: Mapping[str, nn.Module], policy: Policy) -> set[str]:
    """Return the names of the parameters that classes keep in FP32 under a policy.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model._keep_in_fp32_modules = ["1"]
    >>> sorted(kept_parameters(dict(model.named_modules()), Policy.parse("fp16")))
    ['1.bias', '1.weight']
    >>> kept_parameters(dict(model.named_modules()), Policy.parse("bf16"))
    set()
    """
    attributes = [_STRICT] if policy.compute in ("bfloat16", "float16") else []
    if "float16" in (policy.param, policy.compute):
        attributes.append(_ATTRIBUTE)
    found: set[str] = set()
    for path, module in modules.items():
        for attribute in attributes:
            # of the class and of the instance, past a module's own look-up, which is slow where there is nothing
            listed = module.__dict__.get(attribute), getattr(type(module), attribute, None)
            if listed != (None, None):
                found.update(_named(module, path, listed))
    return found - _tied_to_others(modules, found) if found else found


def classes_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Return the names of each module's class and of the modules that it is made of, by path.

    >>> classes_of({"": nn.Linear(1, 1)})
    {'': ('Linear', 'Module')}
    """
    kinds = {type(module) for module in modules.values()}
    names = {kind: tuple([each.__name__ for each in kind.__mro__ if issubclass(each, nn.Module)]) for kind in kinds}
    return {path: names[type(module)] for path, module in modules.items()}


def _tied_to_others(modules: Mapping[str, nn.Module], found: set[str]) -> set[str]:
    """Return names of parameters that have another name as well, which is not found: a head tied to an embedding."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, param in modules[""].named_parameters(remove_duplicate=False):
        names.setdefault(param, set()).add(name)
    return {name for every in names.values() if not every <= found for name in every}


def with_kept_modules(modules: Mapping[str, nn.Module], policy: Policy) -> Policy:
    """Return a policy with a rule for modules that classes keep in FP32, unless its own rules say otherwise there."""
    kept = kept_parameters(modules, policy)
    if not kept:
        return policy
    classes = classes_of(modules)
    paths = [
        path
        for path in _whole(modules, kept)
        if not any(_is_about(rule, path, modules, classes) for rule in policy.rules)
    ]
    added = tuple(Rule(pattern, _ROLES) for pattern in _patterns(paths, modules))
    return replace(policy, rules=(*added, *policy.rules)) if added else policy


def _named(module: nn.Module, path: str, listed: Iterable[object]) -> Iterator[str]:
    """Yield the names of parameters in a module that have a listed name as a part."""
    names = {name for value in listed if isinstance(value, list | tuple | set | frozenset) for name in value}
    pattern = re.compile("|".join(rf"(?:^|\.){_as_regex(name)}(?:\.|$)" for name in sorted(names)))
    for name, _ in module.named_parameters(remove_duplicate=False) if names else ():
        if pattern.search(name):
            yield f"{path}.{name}" if path else name


def _as_regex(name: str) -> str:
    return re.escape(name).replace(r"\*", ".*")


def _whole(modules: Mapping[str, nn.Module], kept: set[str]) -> Iterator[str]:
    """Yield the outermost modules all of whose parameters are kept; never the model."""
    outer = None
    for path, module in modules.items():
        if not path or (outer is not None and path.startswith(outer)):
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if names and kept.issuperset(names):
            outer = f"{path}."
            yield path


def _is_about(rule: Rule, path: str, modules: Mapping[str, nn.Module], classes: ClassNames) -> bool:
    """Return whether a rule says something of a module's weights or arithmetic, or of those of a part of it."""
    if not {"param", "compute"} & dict(rule.roles).keys():
        return False
    inside = (each for each in modules if each.startswith(f"{path}."))
    return rule.holds_for(path, classes) or any(rule.matches(each, classes) for each in inside)


def _patterns(paths: list[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield few patterns that match these modules and no others."""
    left = set(paths)
    for path in paths:
        if path not in left:
            continue
        short = f"*.{path.rpartition('.')[2]}"
        matched = {each for each in modules if fnmatchcase(each, short)}
        is_exact = len(matched) > 1 and matched <= left
        yield short if is_exact else path
        left -= matched if is_exact else {path}
