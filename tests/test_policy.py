"""Policies: which role sets can be, the sentences for those that cannot, rules by module path, JSON."""

import json
from dataclasses import FrozenInstanceError, replace
from itertools import product
from typing import Any

import pytest

from duotone.errors import PolicyError
from duotone.policy import Policy, Rule

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"

ROLES = ("param", "compute", "output", "grad", "reduce", "master", "state", "rounding", "loss_scale")
ALL_ROLE_SETS: list[dict[str, Any]] = [
    dict(zip(ROLES, values, strict=True))
    for values in product(
        (FP32, BF16, FP16),
        (FP32, BF16, FP16, E4M3, E5M2),
        (FP32, BF16, FP16),
        (FP32, BF16, FP16),
        (FP32, BF16, FP16),
        (FP32, None),
        (FP32, BF16),
        (None, "nearest", "stochastic"),
        ("none", "dynamic", 1024.0),
    )
]


def can_be(roles):
    """Say by table, apart from the code under test, whether a role set is a policy."""
    computes = {FP32: (FP32, BF16, FP16, E4M3, E5M2), BF16: (BF16, E4M3, E5M2), FP16: (FP16, E4M3, E5M2)}
    grads = {FP32: (FP32,), BF16: (FP32, BF16), FP16: (FP32, FP16)}
    param = roles["param"]
    has_rounding = roles["rounding"] is not None
    is_scaled = roles["loss_scale"] != "none"
    passes_fp16 = FP16 in (param, roles["compute"], roles["output"], roles["grad"], roles["reduce"])
    return (
        roles["compute"] in computes[param]
        and roles["grad"] in grads[param]
        and not (param == FP32 and roles["master"] is None)
        and has_rounding == (roles["master"] is None)
        and is_scaled == passes_fp16
    )


def message_of(make, *args, **kwargs):
    with pytest.raises(PolicyError) as caught:
        make(*args, **kwargs)
    return str(caught.value)


def test_every_role_set_is_accepted_or_refused_by_the_table_and_reads_back():
    accepted = 0
    for roles in ALL_ROLE_SETS:
        if can_be(roles):
            policy = Policy(**roles)
            assert Policy.parse(str(policy)) == policy
            assert Policy.parse(policy.name) == policy
            assert Policy.from_json(policy.to_json()) == policy
            accepted += 1
        else:
            with pytest.raises(PolicyError, match=r'^policy "'):
                Policy(**roles)
    assert accepted > 500


def test_spellings_are_one_policy():
    policy = Policy(param="BF16", compute="bf16", grad="bfloat16")
    assert (policy.param, policy.compute, policy.grad) == (BF16, BF16, BF16)
    assert policy == Policy.parse("bf16")
    assert hash(policy) == hash(Policy.parse("bf16"))
    static = Policy(compute="half", loss_scale=1024)
    assert static == replace(static, loss_scale="1024")
    assert isinstance(static.loss_scale, float)


def test_a_policy_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Policy().param = BF16  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "bf16-true",
            'policy "bf16-true" has no master and would lose every update smaller than about 1/256 of its bfloat16 '
            'weight; write "bf16" to keep float32 masters, "bf16-true,rounding=stochastic" to keep updates in '
            "expectation, or rounding=nearest to lose them on purpose",
        ),
        (
            "fp16-true,loss_scale=8",
            'policy "fp16-true,loss_scale=8" has no master and would lose every update smaller than about 1/2048 of '
            'its float16 weight; write "fp16,loss_scale=8" to keep float32 masters, '
            '"fp16-true,rounding=stochastic,loss_scale=8" to keep updates in expectation, '
            "or rounding=nearest to lose them on purpose",
        ),
        (
            "bf16-true,rounding=nearest,frozen=tail",
            'policy "bf16-true,rounding=nearest,frozen=tail" keeps tails of frozen weights, but no masters; '
            "write frozen=float32, frozen=rounded or master=float32",
        ),
        (
            "bf16,rounding=nearest",
            'policy "bf16,rounding=nearest" names a rounding (nearest), but its float32 masters are not rounded; '
            "write rounding=none, or master=none with a 16-bit param",
        ),
        (
            "bf16,compute=float32",
            'policy "bf16,compute=float32" computes in float32, wider than its bfloat16 weights; '
            "write param=float32 too, or compute=bfloat16",
        ),
        (
            "bf16,compute=fp16",
            'policy "bf16,compute=float16" computes in float16 from bfloat16 weights; '
            "write compute=bfloat16, or param=float16,grad=float16",
        ),
        (
            "fp32,grad=bf16",
            'policy "fp32,grad=bfloat16" has bfloat16 gradients for float32 weights; write grad=float32',
        ),
        (
            "bf16,param=fp32,grad=bf16",
            'policy "bf16,param=float32" has bfloat16 gradients for float32 weights; write grad=float32',
        ),
        (
            "bf16,grad=fp16",
            'policy "bf16,grad=float16" has float16 gradients for bfloat16 weights; '
            "write grad=bfloat16 or grad=float32",
        ),
        (
            "fp32,master=none",
            'policy "fp32,master=none" has float32 weights, which are their own master; '
            "write master=float32, or a 16-bit param",
        ),
        (
            "fp16,loss_scale=none",
            'policy "fp16,loss_scale=none" needs a loss scale, for small gradients become 0 in float16; write '
            "loss_scale=dynamic, a static one (loss_scale=1 goes without on purpose), or use bfloat16",
        ),
        (
            "bf16,inputs=fp16",
            'policy "bf16,inputs=float16" casts inputs to float16, but computes in bfloat16; '
            "write inputs=bfloat16, inputs=float32, or inputs=none to take them as they come",
        ),
        (
            "bf16,loss_scale=dynamic",
            'policy "bf16,loss_scale=dynamic" has a loss scale without need, for no gradient passes through '
            "float16; write loss_scale=none",
        ),
    ],
)
def test_roles_that_do_not_fit_are_refused_with_the_way_out(text, expected):
    assert message_of(Policy.parse, text) == expected


@pytest.mark.parametrize("advice", ["bf16", "bf16-true,rounding=stochastic", "bf16-true,rounding=nearest"])
def test_the_ways_out_of_a_lossy_policy_are_policies(advice):
    assert Policy.parse(advice).param == BF16


@pytest.mark.parametrize(
    ("text", "has_tail", "needs_loss_scale"),
    [
        ("fp32", False, False),
        ("bf16", True, False),
        ("fp16", True, True),
        ("bf16-mixed", False, False),
        ("fp16-mixed", False, True),
        ("bf16-true,rounding=stochastic", False, False),
        ("fp16-true,rounding=stochastic", False, True),
        ("bf16,output=fp16,loss_scale=dynamic", True, True),
        ("bf16,reduce=fp16,loss_scale=dynamic", True, True),
        ("bf16,loss_scale=dynamic; head: output=fp16", True, True),
    ],
)
def test_what_follows_from_the_roles(text, has_tail, needs_loss_scale):
    policy = Policy.parse(text)
    assert (policy.has_tail, policy.needs_loss_scale) == (has_tail, needs_loss_scale)


@pytest.mark.parametrize(
    ("pattern", "path", "holds"),
    [
        ("head", "head", True),
        ("head", "head.weight_norm", True),
        ("head", "heads", False),
        ("head", "model.head", False),
        ("head", "Head", False),
        ("blocks.*.norm", "blocks.3.norm", True),
        ("blocks.*.norm", "blocks.3.norm.inner.deep", True),
        ("blocks.*.norm", "blocks.3.attention.norm", True),
        ("blocks.*.norm", "blocks.3", False),
        ("blocks.[01]", "blocks.1.mlp", True),
        ("blocks.[01]", "blocks.2.mlp", False),
        ("*", "", True),
        ("head", "", False),
    ],
)
def test_a_rule_holds_for_what_it_matches_and_all_inside(pattern, path, holds):
    assert Rule(pattern, (("output", FP32),)).holds_for(path) is holds


def test_the_last_matching_rule_wins_role_by_role():
    policy = Policy.parse("bf16; *: output=bf16,reduce=bf16; head: output=fp32; tail: output=fp32")
    assert policy.for_module("body").output == BF16
    assert policy.for_module("head").output == FP32
    assert policy.for_module("head").reduce == BF16
    reordered = Policy.parse("bf16; head: output=fp32; *: output=bf16")
    assert reordered.for_module("head").output == BF16


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("bf16; head: output=bf16", "body", "bf16"),
        ("bf16; norm: param=fp32,compute=fp32", "norm", "fp32"),
        ("bf16; norm: param=fp32", "norm", "bf16-mixed"),
        ("fp16; norm: param=fp32", "norm", "fp16-mixed"),
        ("fp16; norm: param=fp32,compute=fp32", "norm", "fp32"),
        ("fp16; norm: param=fp32,compute=fp32", "body", "fp16"),
        ("bf16-true,rounding=stochastic; norm: param=fp32,compute=fp32", "norm", "fp32"),
        ("bf16-true,rounding=stochastic; head: master=fp32", "head", "bf16"),
        ("bf16; table: master=none,rounding=stochastic", "table", "bf16-true,rounding=stochastic"),
        # without masters there are no tails
        ("bf16,frozen=tail; table: master=none,rounding=stochastic", "table", "bf16-true,rounding=stochastic"),
        ("fp32; head: param=bf16,compute=bf16,grad=bf16", "head", "bf16"),
        ("fp32,loss_scale=64; head: compute=fp16", "head", "fp16-mixed,loss_scale=64"),
        ("fp32,loss_scale=64; head: compute=fp16", "body", "fp32"),
    ],
)
def test_the_policy_of_a_module(text, path, expected):
    assert Policy.parse(text).for_module(path) == Policy.parse(expected)


def test_a_module_without_possible_policy_is_reported_with_its_rules():
    policy = Policy.parse("bf16; blocks.*: compute=fp32; blocks.9: output=bf16; head: output=bf16")
    assert policy.for_module("head").output == BF16
    assert message_of(policy.for_module, "blocks.9.mlp") == (
        'module "blocks.9.mlp" under rule "blocks.*: compute=float32" and "blocks.9: output=bfloat16": '
        'policy "bf16,compute=float32,output=bfloat16" computes in float32, wider than its bfloat16 weights; '
        "write param=float32 too, or compute=bfloat16"
    )
    unnamed = Policy.parse("bf16; table: master=none")
    assert "write" in message_of(unnamed.for_module, "table")


def test_rules_are_values():
    rule = Rule("head", (("output", "bf16"), ("param", "fp32"), ("master", "none")))
    assert rule.roles == (("param", FP32), ("output", BF16), ("master", None))
    assert rule == Rule("head", (("master", None), ("param", FP32), ("output", BF16)))
    assert len({rule, Rule("head", rule.roles)}) == 1


@pytest.mark.parametrize("pattern", ["", "a b", "a:b", "a;b", "a\n"])
def test_a_pattern_that_no_text_could_hold_is_refused(pattern):
    expected = f'"{pattern}" cannot be a rule\'s pattern; write a module path such as blocks.*.norm, '
    assert message_of(Rule, pattern, (("output", FP32),)).startswith(expected)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ((), 'rule "head" must set at least one role, and each role once'),
        ((("grad", FP32), ("grad", BF16)), 'rule "head" must set at least one role, and each role once'),
        (
            (("loss_scale", "none"),),
            'rule "head" sets loss_scale, but the whole model has one; set it before the first ";"',
        ),
        ((("weight", FP32),), 'a policy has no role "weight"; '),
        ((("param", E4M3),), "param=float8_e4m3fn is not possible; allowed: float32, bfloat16, float16"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(roles, expected):
    assert message_of(Rule, "head", roles).startswith(expected)


def test_rules_must_be_rules():
    message = message_of(Policy, rules=("head: output=bf16",))
    assert message == "a policy's rules must be Rule objects, not 'head: output=bf16'; Policy.parse reads text"


def test_json_is_an_object_of_roles_and_rules():
    policy = Policy.parse("bf16-true,rounding=nearest; head: param=fp32,compute=fp32")
    assert json.loads(policy.to_json()) == {
        "param": BF16,
        "compute": BF16,
        "output": FP32,
        "grad": BF16,
        "reduce": FP32,
        "master": None,
        "state": FP32,
        "rounding": "nearest",
        "inputs": None,
        "loss_scale": "none",
        "rules": [{"pattern": "head", "roles": {"param": FP32, "compute": FP32}}],
        "frozen": "rounded",
        "residual": FP32,
    }
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("role", ["frozen", "inputs", "residual"])
def test_json_of_earlier_versions_lacks_roles_and_is_read(role):
    policy = Policy.parse("bf16; head: param=fp32")
    content = json.loads(policy.to_json())
    del content[role]
    assert Policy.from_json(json.dumps(content)) == policy


def test_inputs_follow_the_arithmetic_of_a_rule():
    policy = Policy.parse("bf16,inputs=bf16; head: param=fp32,compute=fp32; norm: param=fp32; stem: inputs=fp32")
    assert [policy.for_module(path).inputs for path in ("body", "head", "norm", "stem")] == [BF16, FP32, BF16, FP32]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.update(gard=FP32), 'a policy in JSON has no key "gard"; did you mean grad?'),
        (lambda content: content.pop("grad"), "a policy in JSON lacks grad; write every key"),
        (lambda content: content.update(rules=5), "a policy's rules in JSON must be a list, not 5"),
        (lambda content: content.update(rules=[5]), "a rule in JSON must be an object, not 5"),
        (
            lambda content: content.update(rules=[{"pattern": "a"}]),
            "a rule in JSON lacks roles; write every key",
        ),
        (
            lambda content: content.update(rules=[{"pattern": "a", "roles": 5}]),
            "a rule's pattern in JSON must be a text and its roles an object, not {'pattern': 'a', 'roles': 5}",
        ),
        (
            lambda content: content.update(rules=[{"pattern": 5, "roles": {}}]),
            "a rule's pattern in JSON must be a text and its roles an object, not {'pattern': 5, 'roles': {}}",
        ),
        (
            lambda content: content.update(param=5),
            "param=5 is not a name; allowed: float32, bfloat16, float16",
        ),
        (
            lambda content: content.update(loss_scale=True),
            "loss_scale=True is not possible; write none, dynamic, or a power of two from 1 to 4294967296",
        ),
    ],
)
def test_other_json_is_refused(change, expected):
    content = json.loads(Policy().to_json())
    change(content)
    assert message_of(Policy.from_json, json.dumps(content)) == expected


def test_json_that_is_none_is_refused():
    assert message_of(Policy.from_json, "{").startswith("a policy's JSON cannot be read: ")
    assert message_of(Policy.from_json, "[]") == "a policy in JSON must be an object, not []"
