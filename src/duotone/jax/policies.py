"""What of a policy JAX can have: the same text as in torch, refused in a sentence where it is not possible.

`param` is what a weight is kept in, by its key path; `compute` what arithmetic is in, by its named scope. Both are
dotted here: `jax.named_scope("blocks")` around `jax.named_scope("norm")` is `blocks.norm`. Linen opens a scope for the
root of a model too, which is no part of a weight's path, so a pattern may leave out the first scope.

Left out: `reduce`, for XLA reduces gradients where and in what dtype they are made; `frozen`, for a function is told by
`argnums` what it trains; stochastic rounding; FP8.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from duotone.errors import PolicyError, nearest_names
from duotone.policy import ClassNames, Policy, Rule

_NO_CLASSES: ClassNames = MappingProxyType({})
_REFUSED = {
    "reduce": (
        "float32",
        "XLA reduces gradients in the dtype that they have; leave reduce out",
    ),
    "frozen": (
        "rounded",
        "what does not train is what you give to no optimizer; leave frozen out",
    ),
}


@functools.cache
def read(policy: str | Policy) -> Policy:
    """Return the policy that `policy` means, if JAX can have it.

    Raises:
        PolicyError: it is no policy, or has a role that JAX cannot carry out.

    >>> read("bf16").compute
    'bfloat16'
    >>> read("bf16,reduce=bfloat16")
    Traceback (most recent call last):
    duotone.errors.PolicyError: policy "bf16,reduce=bfloat16": JAX has no reduce=bfloat16; XLA reduces gradients in ...
    """
    found = Policy.parse(policy)
    for where, roles in [("", _roles(found)), *((f' in rule "{rule}"', dict(rule.roles)) for rule in found.rules)]:
        for role, (allowed, reason) in _REFUSED.items():
            if roles.get(role, allowed) != allowed:
                raise _refusal(found, f"{role}={roles[role]}{where}", reason)
        if roles.get("rounding") == "stochastic":
            raise _refusal(found, f"rounding=stochastic{where}", "keep masters, as presets without -true do")
        if str(roles.get("compute")).startswith("float8"):
            raise _refusal(found, f"compute={roles['compute']}{where}", "write compute=bfloat16 or compute=float16")
    for rule in found.rules:
        _check_borders(found, rule)
    return found


def _check_borders(policy: Policy, rule: Rule) -> None:
    roles = dict(rule.roles)
    for role in ("inputs", "residual", "output"):
        # FP32 leaves a FP32 scope by itself
        if role in roles and not (
            role == "output" and roles[role] == roles.get("compute", policy.compute) == "float32"
        ):
            reason = "a named scope has no inputs and outputs of its own; leave it out, or cast in the code"
            raise _refusal(policy, f'{role}={roles[role]} in rule "{rule}"', reason)


def param_of(policy: Policy, path: str, classes: ClassNames = _NO_CLASSES) -> str:
    """Return the format in which the weight at a dotted key path is kept.

    >>> param_of(read("bf16; norm: param=float32"), "norm.scale"), param_of(read("bf16"), "norm.scale")
    ('float32', 'bfloat16')
    """
    return policy.for_module(path, classes).param


def check_arithmetic(policy: Policy) -> None:
    """Raise unless `autocast` can carry out the rules of a policy.

    Raises:
        PolicyError: a rule asks for arithmetic by a class, or for another 16-bit format.
    """
    for rule in policy.rules:
        roles = dict(rule.roles)
        compute = roles.get("compute", policy.compute)
        what = f'compute={roles.get("compute")} in rule "{rule}"'
        if "compute" in roles and rule.pattern.startswith("type="):
            reason = "a program of JAX knows named scopes, but no classes; give the pattern of a jax.named_scope"
            raise _refusal(policy, what, reason)
        if compute not in ("float32", policy.compute):
            reason = f"a function computes in one 16-bit format; write compute={policy.compute} or compute=float32"
            raise _refusal(policy, what, reason)


def computes_float32(policy: Policy, scopes: Sequence[str]) -> bool:
    """Return whether rules keep the arithmetic in FP32 that stands in these named scopes, from the outermost in.

    >>> policy = read("bf16; head: compute=float32,param=float32")
    >>> computes_float32(policy, ["Model", "head"]), computes_float32(policy, ["Model", "blocks"])
    (True, False)
    """
    kept = policy.compute == "float32"
    for rule in policy.rules:
        compute = dict(rule.roles).get("compute")
        if compute is not None and holds_for_scopes(rule, scopes):
            kept = compute == "float32"
    return kept


def check_rules_hold(policy: Policy, scopes: Collection[Sequence[str]]) -> None:
    """Raise unless each rule that sets `compute` holds for some arithmetic.

    Raises:
        PolicyError: a rule's pattern fits no named scope of the function.
    """
    for rule in policy.rules:
        if "compute" in dict(rule.roles) and not any(holds_for_scopes(rule, each) for each in scopes):
            known = sorted({".".join(each[:length]) for each in scopes for length in range(1, len(each) + 1)})
            hint = nearest_names(rule.pattern, known) if known else "there are none"
            raise PolicyError(
                f'rule "{rule}" holds for no named scope of this function; {hint:.200}. Open one around the arithmetic '
                f'by jax.named_scope("{rule.pattern}"), or call that part by dj.keep_float32'
            )


def holds_for_scopes(rule: Rule, scopes: Sequence[str]) -> bool:
    """Return whether a rule's pattern fits named scopes, with or without the first."""
    # a scope may name several at once, and Linen names a method after a dot
    path = ".".join(scopes).replace("/", ".")
    return rule.holds_for(path) or rule.holds_for(path.partition(".")[2]) if path else rule.pattern == "*"


def _roles(policy: Policy) -> Mapping[str, object]:
    return {role: getattr(policy, role) for role in ("compute", "reduce", "frozen", "rounding")}


def _refusal(policy: Policy, what: str, reason: str) -> PolicyError:
    return PolicyError(f'policy "{policy.name}": JAX has no {what}; {reason}')
