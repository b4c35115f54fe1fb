"""A policy: the dtype of every role in mixed precision training, named once; everything else reads it.

Roles are as in Micikevicius et al. (arXiv:1710.03740, section 3): 16-bit weights and arithmetic, FP32
masters, a scaled loss. A policy that cannot work, or would lose updates in silence, cannot be made. Its text
is read and written by `policy_spelling`; casting a model into it is each framework's part.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from duotone import policy_spelling as spelling
from duotone.errors import PolicyError, nearest_names
from duotone.formats import get_format

# path of a module to the names of its class and of that class's bases; the model itself is at ""
ClassNames = Mapping[str, Sequence[str]]

_BY_TYPE = "type="
_NO_CLASSES: ClassNames = MappingProxyType({})


@dataclass(frozen=True)
class Rule:
    """Roles that are different in some modules.

    Attributes:
        pattern: a pattern as `fnmatch` reads it, over dotted module paths; `*` matches dots too, and case counts.
            After `type=`, a pattern over the names of modules' classes, base classes among them. The rule holds for
            the modules that it matches and for everything inside them.
        roles: pairs of a role and its value there; any role but loss_scale, which is one for the whole model.

    Raises:
        PolicyError: the pattern cannot be written in a policy's text, or a role or value does not exist.

    >>> print(Rule("blocks.*.norm", (("param", "fp32"), ("compute", "fp32"))))
    blocks.*.norm: param=float32,compute=float32
    >>> rule = Rule("type=*Attention", (("compute", "fp32"),))
    >>> rule.holds_for("blocks.0.mix", {"blocks.0.mix": ["MyAttention"]})
    True
    """

    pattern: str
    roles: tuple[tuple[str, str | None], ...]

    def __post_init__(self) -> None:
        is_empty = self.pattern in ("", _BY_TYPE)
        if is_empty or any(char in ";:" or char.isspace() for char in self.pattern):
            raise PolicyError(
                f'"{self.pattern}" cannot be a rule\'s pattern; write a module path such as blocks.*.norm, or a class '
                "such as type=LayerNorm, without spaces, colons and semicolons, or * for every module"
            )
        given = dict(self.roles)
        if "loss_scale" in given:
            raise PolicyError(
                f'rule "{self.pattern}" sets loss_scale, but the whole model has one; set it before the first ";"'
            )
        if not given or len(given) < len(self.roles):
            raise PolicyError(f'rule "{self.pattern}" must set at least one role, and each role once')
        values = {role: spelling.read_value(role, value) for role, value in given.items()}
        ordered = tuple((role, values[role]) for role in spelling.ROLES if role in values)
        object.__setattr__(self, "roles", ordered)

    def __str__(self) -> str:
        return f"{self.pattern}: {spelling.write(dict(self.roles))}"

    def holds_for(self, path: str, classes: ClassNames = _NO_CLASSES) -> bool:
        """Return whether the pattern matches the module at `path` or one that contains it."""
        return any(self.matches(module, classes) for module in _with_containers(path))

    def matches(self, path: str, classes: ClassNames = _NO_CLASSES) -> bool:
        """Return whether the pattern matches the very module at `path`."""
        if self.pattern.startswith(_BY_TYPE):
            pattern = self.pattern.removeprefix(_BY_TYPE)
            return any(fnmatchcase(name, pattern) for name in classes.get(path, ()))
        return fnmatchcase(path, self.pattern)


@dataclass(frozen=True)
class Policy:
    """The dtype of every role. Formats are stored under ml_dtypes' names, whatever spelling is given.

    Equal policies have equal text, and `Policy.parse` reads the text of every policy back: `str(policy)`
    spells out each role, `policy.name` is the shortest form.

    Attributes:
        param: resident weights.
        compute: arithmetic and activations; float8_e4m3fn and float8_e5m2 are allowed here alone.
        output: what the model returns.
        grad: what gradients accumulate in: float32, or the format of 16-bit weights.
        reduce: what ranks reduce gradients in.
        master: what the optimizer updates: float32 or None. FP32 weights are their own master.
        state: optimizer moments: float32 or bfloat16.
        rounding: how an update is stored in 16-bit weights without a master, "nearest" or "stochastic"; None
            elsewhere.
        loss_scale: "none", "dynamic", or a static scale, a power of two from 1 to 2**32.
        rules: modules in which roles differ; where several set a role, the last one wins.
        frozen: how weights that do not train are kept: "rounded" to param, without a tail, "float32", or with a
            "tail", as weights that do. Rounded ones keep a tail where they are tables that are not large.
        inputs: what floating-point inputs are cast to where they enter the model: `compute` or float32; None to take
            them as they come, and have each product round what it needs.
        residual: what a residual stream starts in, that is what embeddings give, and what class tokens and positions
            are kept in: "float32", which additions then keep, or "compute", the format of the weights.

    Raises:
        PolicyError: a value does not exist, or the roles do not fit each other.

    >>> policy = Policy.parse("bf16; blocks.*.norm: param=float32,compute=float32")
    >>> policy.for_module("blocks.0.norm").name
    'fp32'
    >>> Policy(compute="bf16").name
    'bf16-mixed'
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"
    grad: str = "float32"
    reduce: str = "float32"
    master: str | None = "float32"
    state: str = "float32"
    rounding: Literal["nearest", "stochastic"] | None = None
    loss_scale: float | Literal["none", "dynamic"] = "none"
    rules: tuple[Rule, ...] = ()
    # what was added later is given by name alone
    frozen: Literal["rounded", "float32", "tail"] = field(default="rounded", kw_only=True)
    inputs: str | None = field(default=None, kw_only=True)
    residual: Literal["float32", "compute"] = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        for role, value in _roles(self).items():
            object.__setattr__(self, role, spelling.read_value(role, value))
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise PolicyError(f"a policy's rules must be Rule objects, not {rule!r}; Policy.parse reads text")
        for problem in _problems(self):
            raise PolicyError(f'policy "{self.name}" {problem}')

    @classmethod
    def parse(cls, text: str | Policy) -> Policy:
        """Return the policy that `text` means; a policy passes through.

        Presets are fp32; bf16 and fp16 (16-bit weights, FP32 masters); bf16-mixed and fp16-mixed (FP32
        weights, 16-bit arithmetic, as torch.amp); bf16-true and fp16-true (no masters; the rounding must be
        named). Overrides follow after commas, rules after semicolons. jmp's, Keras', Lightning's and
        Accelerate's names are read too; mind that Accelerate's fp16 and bf16, and Lightning's bf16, are
        fp16-mixed and bf16-mixed here.

        Raises:
            PolicyError: the text cannot be read, or means a policy that cannot work.

        >>> Policy.parse("fp16,loss_scale=1024").loss_scale
        1024.0
        >>> print(Policy.parse("bf16-true,rounding=stochastic").master)
        None
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            raise PolicyError(f'a policy is a text such as "bf16", or a Policy, not {text!r}')
        roles, rules = spelling.read(text)
        return _from_parts(roles, rules)

    def __str__(self) -> str:
        return "; ".join([spelling.write(_roles(self)), *map(str, self.rules)])

    @property
    def name(self) -> str:
        """The shortest text of this policy, made of its nearest preset, the roles that differ, and its rules."""
        return "; ".join([spelling.write_shortest(_roles(self)), *map(str, self.rules)])

    @property
    def has_tail(self) -> bool:
        """Whether each 16-bit weight is kept with the 16 bits that it lacks to be its FP32 master."""
        return self.param != "float32" and self.master is not None

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients pass through FP16 anywhere, in a rule's modules too."""
        return spelling.passes_float16([_roles(self), *(dict(rule.roles) for rule in self.rules)])

    def for_module(self, path: str, classes: ClassNames = _NO_CLASSES) -> Policy:
        """Return the policy of the module at a dotted `path`, without rules.

        `classes` gives the names of modules' classes by path, for rules that ask for them.

        What a rule's roles imply holds unless a rule says otherwise: FP32 weights have FP32 gradients and are
        their own masters. A module without FP16 has loss_scale "none"; the scale of the loss is the whole
        policy's.

        Raises:
            PolicyError: the rules give the module roles that do not fit each other.

        >>> Policy.parse("fp16; head: output=bf16").for_module("head").output
        'bfloat16'
        """
        matching = [rule for rule in self.rules if rule.holds_for(path, classes)]
        roles = spelling.change(_roles(self), spelling.merge(dict(rule.roles) for rule in matching))
        if not spelling.passes_float16([roles]):
            roles["loss_scale"] = "none"
        try:
            return _from_parts(roles, ())
        except PolicyError as error:
            names = " and ".join(f'"{rule}"' for rule in matching)
            raise PolicyError(f'module "{path}" under rule {names}: {error}') from error

    def to_json(self) -> str:
        """Return the policy as a JSON object: each role by name, and `rules` as objects of pattern and roles.

        >>> Policy.from_json(Policy().to_json()) == Policy()
        True
        """
        rules = [{"pattern": rule.pattern, "roles": dict(rule.roles)} for rule in self.rules]
        return json.dumps({**_roles(self), "rules": rules})

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Return the policy that `to_json` wrote, in an earlier version too.

        Raises:
            PolicyError: the text is not such an object: every key must be there, but for roles that earlier versions
                had not, and no other.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"a policy's JSON cannot be read: {error}") from error
        _check_keys(content, [field.name for field in fields(cls)], "a policy", spelling.LATER)
        rules = content.pop("rules")
        if not isinstance(rules, list):
            raise PolicyError(f"a policy's rules in JSON must be a list, not {rules!r}")
        for rule in rules:
            _check_keys(rule, ["pattern", "roles"], "a rule")
            if not isinstance(rule["pattern"], str) or not isinstance(rule["roles"], dict):
                raise PolicyError(f"a rule's pattern in JSON must be a text and its roles an object, not {rule!r}")
        return _from_parts(content, [(rule["pattern"], rule["roles"]) for rule in rules])


def _with_containers(path: str) -> Iterator[str]:
    """Yield a module's path, those of the modules that contain it, and "" for the model."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _roles(policy: Policy) -> dict[str, Any]:
    """Return every field of a policy but its rules."""
    return {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "rules"}


def _from_parts(roles: Any, rules: Any) -> Policy:
    """Return the policy of roles by name, and of rules as pairs of a pattern and roles by name."""
    return Policy(**roles, rules=tuple(Rule(pattern, tuple(changes.items())) for pattern, changes in rules))


def _check_keys(content: object, expected: list[str], what: str, can_lack: Collection[str] = ()) -> None:
    """Raise unless `content` is a JSON object with exactly the expected keys, but for those that it can lack."""
    if not isinstance(content, dict):
        raise PolicyError(f"{what} in JSON must be an object, not {content!r}")
    for key in content:
        if key not in expected:
            raise PolicyError(f'{what} in JSON has no key "{key}"; {nearest_names(key, expected)}')
    missing = [key for key in expected if key not in content and key not in can_lack]
    if missing:
        raise PolicyError(f"{what} in JSON lacks {', '.join(missing)}; write every key")


def _problems(policy: Policy) -> Iterator[str]:
    """Yield what is wrong with a policy whose values exist, as ends of a sentence that say what to do."""
    param, compute, grad = policy.param, policy.compute, policy.grad
    bits = {role: get_format(getattr(policy, role)).storage_bits for role in ("param", "compute")}
    if bits["compute"] > bits["param"]:
        yield f"computes in {compute}, wider than its {param} weights; write param={compute} too, or compute={param}"
    if bits["compute"] == bits["param"] and compute != param:
        yield f"computes in {compute} from {param} weights; write compute={param}, or param={compute},grad={compute}"
    if grad not in ("float32", param):
        choices = "grad=float32" if param == "float32" else f"grad={param} or grad=float32"
        yield f"has {grad} gradients for {param} weights; write {choices}"
    if policy.inputs not in spelling.input_formats(_roles(policy)):
        yield (
            f"casts inputs to {policy.inputs}, but computes in {compute}; write inputs={compute}, inputs=float32, or "
            "inputs=none to take them as they come"
        )
    if param == "float32" and policy.master is None:
        yield "has float32 weights, which are their own master; write master=float32, or a 16-bit param"
    yield from _rounding_problems(policy)
    if policy.frozen == "tail" and policy.param != "float32" and policy.master is None:
        yield "keeps tails of frozen weights, but no masters; write frozen=float32, frozen=rounded or master=float32"
    if policy.needs_loss_scale and policy.loss_scale == "none":
        yield (
            "needs a loss scale, for small gradients become 0 in float16; write loss_scale=dynamic, "
            "a static one (loss_scale=1 goes without on purpose), or use bfloat16"
        )
    if not policy.needs_loss_scale and policy.loss_scale != "none":
        yield "has a loss scale without need, for no gradient passes through float16; write loss_scale=none"


def _rounding_problems(policy: Policy) -> Iterator[str]:
    """Yield what is wrong with how updates are stored: rounded in the weights just where there is no master."""
    if policy.param == "float32" or policy.master is not None:
        if policy.rounding is not None:
            yield (
                f"names a rounding ({policy.rounding}), but its float32 masters are not rounded; "
                "write rounding=none, or master=none with a 16-bit param"
            )
    elif policy.rounding is None:
        lost = round(2 / get_format(policy.param).epsilon)
        mastered = spelling.write_shortest({**_roles(policy), "master": "float32"})
        kept = spelling.write_shortest({**_roles(policy), "rounding": "stochastic"})
        yield (
            f"has no master and would lose every update smaller than about 1/{lost} of its {policy.param} weight; "
            f'write "{mastered}" to keep float32 masters, "{kept}" to keep updates in expectation, '
            "or rounding=nearest to lose them on purpose"
        )
