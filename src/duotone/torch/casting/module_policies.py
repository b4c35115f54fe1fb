"""Which policy each module of a model is under: rules by path and by type, and marks, resolved once.

Everything that a cast does, and what `explain` shows, reads the result. Resolving a policy builds and checks a new one,
so it is done once for each module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import nn

from duotone.errors import PolicyError
from duotone.policy import ClassNames, Policy, Rule
from duotone.torch.casting.keep_float32 import is_kept_in_float32
from duotone.torch.casting.kept_by_class import classes_of, kept_parameters, with_kept_modules


@dataclass(frozen=True)
class ModulePolicy:
    """The policy of one module.

    Attributes:
        effective: the policy, rules applied; it has none itself.
        outer: the effective policy of the module around it; of the model itself, its own.
        sets_param: whether a rule that sets `param` matches this very module.
        sets_output: whether a rule that sets `output` matches this module or one around it.
        kept: those of its own parameters that classes keep in FP32, whatever the module is in.
    """

    effective: Policy
    outer: Policy
    sets_param: bool
    sets_output: bool
    kept: frozenset[str] = frozenset()


def resolve(model: nn.Module, policy: Policy) -> dict[str, ModulePolicy]:
    """Return the policy of every module, by path.

    Raises:
        PolicyError: a rule matches no module, roles do not fit each other in a module, its compute format is not
            available in torch, or it is TorchScript.

    >>> policies = resolve(nn.Sequential(nn.Linear(2, 1)), Policy.parse("bf16; 0: output=float32"))
    >>> policies[""].effective.output, policies["0"].effective.output, policies["0"].sets_output
    ('float32', 'float32', True)
    """
    modules = dict(model.named_modules())
    classes = classes_of(modules)
    _check_rules(modules, policy, classes)
    policies = _resolve(policy, classes)
    for name in kept_parameters(modules, policy):
        path, _, own = name.rpartition(".")
        if not any("param" in dict(rule.roles) and rule.holds_for(path, classes) for rule in policy.rules):
            policies[path] = replace(policies[path], kept=policies[path].kept | {own})
    return policies


def resolve_changed(model: nn.Module, policy: Policy) -> dict[str, ModulePolicy]:
    """Return the policy of every module of a model that was cast and has changed since: a rule may match nothing now.

    Raises:
        PolicyError: roles do not fit each other in a module.
    """
    return _resolve(policy, classes_of(dict(model.named_modules())))


def _resolve(policy: Policy, classes: ClassNames) -> dict[str, ModulePolicy]:
    modules: dict[str, ModulePolicy] = {}
    # making a policy takes long, and most modules have the same one
    made: dict[tuple[Rule, ...], Policy] = {}
    for path in classes:
        holding = tuple([rule for rule in policy.rules if rule.holds_for(path, classes)])
        effective = made.get(holding)
        if effective is None:
            effective = made[holding] = policy.for_module(path, classes)
        if effective.compute.startswith("float8"):
            raise PolicyError(f"compute={effective.compute} is not available in torch yet; use bfloat16 or float16")
        modules[path] = ModulePolicy(
            effective,
            modules[path.rpartition(".")[0]].effective if path else effective,
            any(rule.matches(path, classes) for rule in holding if "param" in dict(rule.roles)),
            any("output" in dict(rule.roles) for rule in holding),
        )
    return modules


def with_implied_rules(model: nn.Module, policy: Policy) -> Policy:
    """Return a policy with rules for what classes keep in FP32, before its own, and for what `keep_float32` has marked.

    Raises:
        PolicyError: the whole model is marked.
    """
    return with_marks(model, with_kept_modules(dict(model.named_modules()), policy))


def with_marks(model: nn.Module, policy: Policy) -> Policy:
    """Return a policy with a rule for every module that `keep_float32` has marked.

    Raises:
        PolicyError: the whole model is marked.
    """
    marked = [path for path, module in model.named_modules() if is_kept_in_float32(module)]
    if not marked or policy.param == policy.compute == "float32":
        return policy
    if "" in marked:
        raise PolicyError(f'keep_float32 marks all of this {type(model).__name__}; cast it to policy "fp32"')
    roles = (("param", "float32"), ("compute", "float32"), ("output", "float32"))
    added = tuple(Rule(path, roles) for path in marked)
    return replace(policy, rules=policy.rules + tuple(rule for rule in added if rule not in policy.rules))


def _check_rules(modules: Mapping[str, nn.Module], policy: Policy, classes: ClassNames) -> None:
    name = type(modules[""]).__name__
    for path, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise PolicyError(
                f'module "{path}" of this {name} is TorchScript, whose forward cannot be put into a policy; cast it as '
                "it was before torch.jit.script, and give the cast model to torch.jit.trace or torch.export"
            )
    for rule in policy.rules:
        if not any(rule.matches(path, classes) for path in classes):
            raise PolicyError(f'rule "{rule}" holds for no module of this {name}, {_nearest(rule.pattern, classes)}')


def _nearest(pattern: str, classes: ClassNames) -> str:
    """Return what a pattern that matches nothing may have meant, as the end of a sentence."""
    types = dict.fromkeys(name for names in classes.values() for name in names[:1])
    wanted = pattern.removeprefix("type=").rpartition(".")[2]
    if pattern != f"type={wanted}" and wanted in types:
        return f"but {wanted} is a class there; write type={wanted}"
    kind, known = ("classes", list(types)) if pattern.startswith("type=") else ("modules", [p for p in classes if p])
    near = get_close_matches(wanted if kind == "classes" else pattern, known, n=3, cutoff=0.5)
    if near:
        return f"whose {kind} include {' and '.join(near)}; correct its pattern"
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"whose {kind} are {', '.join(known[:5]) or 'itself alone'}{more}; correct its pattern"
