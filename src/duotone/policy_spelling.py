"""How a policy is written: its roles and what they can hold, the presets, and the text in both directions.

    policy   = ( preset | role=value ) { "," role=value } { ";" pattern ":" ( preset | role=value ) { "," role=value } }

`bf16`, `fp16,loss_scale=1024`, `fp16; head: float32` and `bf16; blocks.*.norm: param=float32,compute=float32` are
policies. Other libraries' names for the same things are read too (`ALIASES`). Whether the roles fit each other is
decided in `policy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType

from duotone.errors import FormatError, PolicyError, nearest_names
from duotone.formats import get_format

Value = str | float | None
Roles = dict[str, Value]

_TRAINING = ("float32", "bfloat16", "float16")

# every role of a module, in the order in which it is written, with the values that it can hold
ROLES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "param": _TRAINING,
        "compute": (*_TRAINING, "float8_e4m3fn", "float8_e5m2"),
        "output": _TRAINING,
        "grad": _TRAINING,
        "reduce": _TRAINING,
        "master": ("float32", None),
        "state": ("float32", "bfloat16"),
        "rounding": (None, "nearest", "stochastic"),
        "frozen": ("rounded", "float32", "tail"),
        "inputs": (None, *_TRAINING),
        "residual": ("float32", "compute"),
    }
)

# roles that policies had not at first, with what one that lacks them means
LATER: Mapping[str, str | None] = MappingProxyType({"frozen": "rounded", "inputs": None, "residual": "float32"})

# where a role's values are narrower than its neighbours', the reason
_REASONS = {
    "master": "a master is there to hold what 16 bits cannot",
    "state": "squared gradients underflow where the exponent has fewer bits than in float32",
}

# the roles through which gradients pass
_GRADIENT_PATH = ("param", "compute", "output", "grad", "reduce")

# what all presets share, and a row for each; the -true presets are not yet policies: they must name a rounding
_SHARED = {"output": "float32", "reduce": "float32", "state": "float32", "rounding": None, **LATER}
_COLUMNS = ("param", "compute", "grad", "master", "loss_scale")
_ROWS = {
    "fp32": ("float32", "float32", "float32", "float32", "none"),
    "bf16": ("bfloat16", "bfloat16", "bfloat16", "float32", "none"),
    "fp16": ("float16", "float16", "float16", "float32", "dynamic"),
    "bf16-mixed": ("float32", "bfloat16", "float32", "float32", "none"),
    "fp16-mixed": ("float32", "float16", "float32", "float32", "dynamic"),
    "bf16-true": ("bfloat16", "bfloat16", "bfloat16", None, "none"),
    "fp16-true": ("float16", "float16", "float16", None, "dynamic"),
}
PRESETS: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {name: MappingProxyType(dict(zip(_COLUMNS, row, strict=True)) | _SHARED) for name, row in _ROWS.items()}
)

# a format's name alone is its preset: 16-bit weights with FP32 masters. Accelerate's fp16 and bf16, and Lightning's
# bf16, keep FP32 weights instead: that is bf16-mixed here
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "float32": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
        # Lightning
        "32": "fp32",
        "32-true": "fp32",
        "16": "fp16-mixed",
        "16-mixed": "fp16-mixed",
        "16-true": "fp16-true",
        # Accelerate
        "no": "fp32",
        # Keras
        "mixed_float16": "fp16-mixed",
        "mixed_bfloat16": "bf16-mixed",
    }
)

# jmp's names for roles
_ROLE_ALIASES = {"p": "param", "params": "param", "c": "compute", "o": "output"}


def read_value(role: str, value: object) -> Value:
    """Return `value` as `role` stores it: a format as ml_dtypes names it, a word, a number, or None.

    >>> read_value("param", "bf16"), read_value("master", "none"), read_value("loss_scale", "1024")
    ('bfloat16', None, 1024.0)

    Raises:
        PolicyError: there is no such role, or the role cannot hold the value.
    """
    if role == "loss_scale":
        return _read_loss_scale(value)
    if role not in ROLES:
        raise PolicyError(f'a policy has no role "{role}"; {nearest_names(role, [*ROLES, "loss_scale"])}')
    allowed = ROLES[role]
    if value in ("none", None):
        stored = None
    elif isinstance(value, str) and value in allowed:
        stored = value
    else:
        stored = _format_name(role, value)
    if stored not in allowed:
        reason = f" ({_REASONS[role]})" if role in _REASONS else ""
        raise PolicyError(f"{role}={value} is not possible{reason}; allowed: {', '.join(_spelled_values(role))}")
    return stored


def passes_float16(role_sets: Iterable[Mapping[str, Value]]) -> bool:
    """Return whether any of the role sets lets gradients pass through FP16, where small ones become 0."""
    return any(roles.get(role) == "float16" for roles in role_sets for role in _GRADIENT_PATH)


def change(roles: Mapping[str, Value], changes: Mapping[str, Value]) -> Roles:
    """Return `roles` with `changes`, and with what follows from the changes unless they say otherwise.

    FP32 weights have FP32 gradients and are their own masters; where there is a master, no rounding is named, and
    where there is none, there are no tails; inputs that are cast to what the arithmetic is in follow it.

    >>> change(PRESETS["bf16"], {"param": "float32"}) == PRESETS["bf16-mixed"]
    True
    """
    changed = {**roles, **changes}
    if changes.get("param") == "float32":
        changed |= {role: "float32" for role in ("grad", "master") if role not in changes}
    if changed["master"] is not None and "rounding" not in changes:
        changed["rounding"] = None
    if changed["master"] is None and changed["frozen"] == "tail" and "frozen" not in changes:
        changed["frozen"] = "rounded"
    if "inputs" not in changes and changed["inputs"] not in input_formats(changed):
        changed["inputs"] = changed["compute"]
    return changed


def merge(rules: Iterable[Mapping[str, Value]]) -> Roles:
    """Return what the roles of several rules change together; where several set one, the last wins.

    What an earlier rule says of gradients and masters of 16-bit weights ends where a later one makes the weights FP32.

    >>> merge([{"param": "bfloat16", "grad": "bfloat16"}, {"param": "float32"}])
    {'param': 'float32'}
    """
    merged: Roles = {}
    for roles in rules:
        if roles.get("param") == "float32":
            merged = {role: value for role, value in merged.items() if role not in ("grad", "master", "rounding")}
        merged |= roles
    return merged


def input_formats(roles: Mapping[str, Value]) -> tuple[Value, ...]:
    """Return what `inputs` can be beside the other roles: nothing, FP32, or what the arithmetic is in."""
    return None, "float32", roles["compute"], roles["param"]


def read(text: str) -> tuple[Roles, list[tuple[str, Roles]]]:
    """Return the roles that a policy's text means, and its rules as pairs of a pattern and the roles it sets.

    Without a preset, roles that are not named follow others as in jmp: `compute` and `grad` follow `param`, `output`
    follows `compute`; the rest is float32, and the loss scale is dynamic if gradients pass through float16.

    Raises:
        PolicyError: the text is malformed; the message shows the part that is.
    """
    head, *rule_texts = text.split(";")
    rules = [_read_rule(rule_text, text) for rule_text in rule_texts]
    first, *overrides = head.split(",")
    if "=" not in first:
        return change(PRESETS[_preset_name(first, text)], _read_pairs(overrides, text)), rules
    named = _read_pairs([first, *overrides], text)
    param = named.get("param", "float32")
    compute = named.get("compute", param)
    roles = {"param": param, "compute": compute, "output": compute, "grad": param, "master": "float32"}
    roles = {**PRESETS["fp32"], **roles, **named}
    if "loss_scale" not in named and passes_float16([roles, *(changes for _, changes in rules)]):
        roles["loss_scale"] = "dynamic"
    return roles, rules


def write(roles: Mapping[str, Value]) -> str:
    """Return roles as text, in their fixed order.

    >>> write({"master": None, "param": "bfloat16"})
    'param=bfloat16,master=none'
    """
    ordered = (role for role in (*ROLES, "loss_scale") if role in roles)
    return ",".join(f"{role}={_write_value(roles[role])}" for role in ordered)


def write_shortest(roles: Mapping[str, Value]) -> str:
    """Return the preset nearest to `roles`, with the roles in which they differ.

    >>> write_shortest({**PRESETS["bf16"], "grad": "float32"})
    'bf16,grad=float32'
    """
    differences = {
        name: {role: value for role, value in roles.items() if value != preset[role]}
        for name, preset in PRESETS.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    return ",".join(part for part in (nearest, write(differences[nearest])) if part)


def _spelled_values(role: str) -> list[str]:
    """Return the values that a role can hold, as they are written."""
    return [_write_value(value) for value in ROLES[role]]


def _write_value(value: Value) -> str:
    """Return a role's value as text."""
    if value is None:
        return "none"
    return str(int(value)) if isinstance(value, float) else str(value)


def _format_name(role: str, value: object) -> str:
    """Return the name of the format that `value` spells, whether or not `role` can hold it."""
    if not isinstance(value, str):
        raise PolicyError(f"{role}={value!r} is not a name; allowed: {', '.join(_spelled_values(role))}")
    try:
        return get_format(value).name
    except FormatError as error:
        raise PolicyError(f'{role}="{value}" is not known; {nearest_names(value, _spelled_values(role))}') from error


def _read_loss_scale(value: object) -> str | float:
    """Return "none", "dynamic" or a static scale as a float."""
    if value in ("none", "dynamic"):
        return str(value)
    scale = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            scale = float(value)
    if math.frexp(scale)[0] != 0.5 or not 1 <= scale <= 2**32:
        raise PolicyError(
            f"loss_scale={value} is not possible; write none, dynamic, or a power of two from 1 to {2**32}"
        )
    return scale


def _preset_name(name: str, text: str) -> str:
    """Return the preset that `name` means; formats' other spellings count as the formats' names."""
    wanted = name.strip().lower()
    if wanted not in PRESETS and wanted not in ALIASES:
        # what is not a format either gets a message about policies, below
        with suppress(FormatError):
            wanted = get_format(wanted).name
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in PRESETS:
        hint = nearest_names(wanted, [*PRESETS, *ALIASES])
        raise PolicyError(f'"{name.strip()}" in policy "{text}" is neither a preset nor role=value; {hint}')
    return wanted


def _read_pairs(parts: Iterable[str], text: str) -> Roles:
    """Return the roles that `role=value` texts set; `text` is the whole policy, for messages."""
    roles: Roles = {}
    for part in parts:
        role, equals, value = (piece.strip() for piece in part.partition("="))
        role = _ROLE_ALIASES.get(role, role)
        if not (role and equals and value):
            raise PolicyError(f'"{part.strip()}" in policy "{text}" is not role=value, such as grad=float32')
        if role in roles:
            raise PolicyError(f'policy "{text}" sets {role} twice in one list; keep one of the two')
        roles[role] = read_value(role, value)
    return roles


def _read_rule(rule_text: str, text: str) -> tuple[str, Roles]:
    """Return the pattern of a rule's text and the roles that it sets."""
    pattern, colon, roles = rule_text.partition(":")
    if not colon:
        raise PolicyError(
            f'"{rule_text.strip()}" in policy "{text}" is not a rule, such as "blocks.*.norm: param=float32"'
        )
    first, *overrides = roles.split(",")
    if "=" in first or not first.strip():
        return pattern.strip(), _read_pairs([first, *overrides], text)
    return pattern.strip(), _roles_of_rule(_preset_name(first, text)) | _read_pairs(overrides, text)


def _roles_of_rule(name: str) -> Roles:
    """Return the roles in which a preset differs from others, as a rule has them.

    >>> write(_roles_of_rule("fp32")), write(_roles_of_rule("bf16"))
    ('param=float32,compute=float32', 'param=bfloat16,compute=bfloat16,grad=bfloat16,master=float32')
    """
    preset = PRESETS[name]
    # FP32 weights have FP32 gradients and masters by themselves, and the whole model has one loss scale
    roles = ("param", "compute") if preset["param"] == "float32" else ("param", "compute", "grad", "master")
    return {role: preset[role] for role in roles}
