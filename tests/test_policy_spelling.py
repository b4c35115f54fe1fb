"""The text of policies: presets, other libraries' names, overrides, rules, and the way back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.errors import PolicyError
from duotone.policy import Policy, Rule
from duotone.policy_spelling import ALIASES, PRESETS

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
# text that no policy may confuse: rules and lists are cut at these characters
PATTERNS = st.text(alphabet="ab0.*?[]!,=-_é", min_size=1, max_size=12)
CHOICES = {
    "param": st.sampled_from([FP32, BF16, FP16]),
    "compute": st.sampled_from([FP32, BF16, FP16, "float8_e4m3fn", "float8_e5m2"]),
    "output": st.sampled_from([FP32, BF16, FP16]),
    "grad": st.sampled_from([FP32, BF16, FP16]),
    "reduce": st.sampled_from([FP32, BF16, FP16]),
    "master": st.sampled_from([FP32, None]),
    "state": st.sampled_from([FP32, BF16]),
    "rounding": st.sampled_from([None, "nearest", "stochastic"]),
    "frozen": st.sampled_from(["rounded", FP32, "tail"]),
    "inputs": st.sampled_from([None, FP32, BF16, FP16]),
    "residual": st.sampled_from(["compute", FP32]),
}


@st.composite
def policies(draw):
    """Draw any policy that can be."""
    param, output, reduce, state = (draw(CHOICES[role]) for role in ("param", "output", "reduce", "state"))
    narrow = [param, "float8_e4m3fn", "float8_e5m2"]
    compute = draw(CHOICES["compute"] if param == FP32 else st.sampled_from(narrow))
    grad = draw(st.sampled_from([FP32, param]))
    master = FP32 if param == FP32 else draw(CHOICES["master"])
    rounding = None if master else draw(st.sampled_from(["nearest", "stochastic"]))
    rules = tuple(
        Rule(pattern, tuple(roles.items()))
        for pattern, roles in draw(
            st.lists(st.tuples(PATTERNS, st.fixed_dictionaries({}, optional=CHOICES).filter(bool)), max_size=3)
        )
    )
    names = [param, compute, output, grad, reduce]
    others = ("master", "state", "frozen", "inputs", "residual")
    names += [value for rule in rules for role, value in rule.roles if role not in others]
    scales = st.one_of(st.just("dynamic"), st.integers(0, 32).map(lambda power: 2.0**power))
    loss_scale = draw(scales) if FP16 in names else "none"
    later = {
        "frozen": draw(CHOICES["frozen"].filter(lambda value: master or value != "tail")),
        "inputs": draw(st.sampled_from([None, FP32, param, compute if compute in (BF16, FP16) else None])),
    }
    later["residual"] = draw(CHOICES["residual"])
    return Policy(param, compute, output, grad, reduce, master, state, rounding, loss_scale, rules, **later)


@settings(max_examples=300, deadline=None)
@given(policies())
def test_every_policy_reads_back_from_each_of_its_texts(policy):
    for text in (str(policy), policy.name):
        assert Policy.parse(text) == policy
        assert str(Policy.parse(text)) == str(policy)
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.parse(policy) is policy


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("fp32", (FP32, FP32, FP32, FP32, FP32, FP32, FP32, None, "none")),
        ("bf16", (BF16, BF16, FP32, BF16, FP32, FP32, FP32, None, "none")),
        ("fp16", (FP16, FP16, FP32, FP16, FP32, FP32, FP32, None, "dynamic")),
        ("bf16-mixed", (FP32, BF16, FP32, FP32, FP32, FP32, FP32, None, "none")),
        ("fp16-mixed", (FP32, FP16, FP32, FP32, FP32, FP32, FP32, None, "dynamic")),
        ("bf16-true,rounding=stochastic", (BF16, BF16, FP32, BF16, FP32, None, FP32, "stochastic", "none")),
        ("fp16-true,rounding=nearest", (FP16, FP16, FP32, FP16, FP32, None, FP32, "nearest", "dynamic")),
    ],
)
def test_the_presets(text, roles):
    assert Policy.parse(text) == Policy(*roles)
    assert Policy.parse(text).name == text


def test_every_preset_can_be_used_and_every_alias_names_one():
    for name, roles in PRESETS.items():
        rounding = ",rounding=stochastic" if roles["master"] is None else ""
        assert Policy.parse(name + rounding).param == roles["param"]
    assert set(ALIASES.values()) <= set(PRESETS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # formats' names
        ("float32", "fp32"),
        ("f32", "fp32"),
        ("bfloat16", "bf16"),
        ("half", "fp16"),
        ("float16", "fp16"),
        ("BF16", "bf16"),
        ("FP16-Mixed", "fp16-mixed"),
        (" fp16 , grad = fp32 ", "fp16,grad=float32"),
        # Lightning
        ("32", "fp32"),
        ("32-true", "fp32"),
        ("16", "fp16-mixed"),
        ("16-mixed", "fp16-mixed"),
        ("16-true,rounding=stochastic", "fp16-true,rounding=stochastic"),
        # Accelerate
        ("no", "fp32"),
        # Keras
        ("mixed_float16", "fp16-mixed"),
        ("mixed_bfloat16", "bf16-mixed"),
        # jmp
        ("p=f32,c=bf16,o=f32", "bf16-mixed"),
        ("params=float32,compute=half,output=float32", "fp16-mixed"),
        ("p=f16,o=f32", "fp16"),
        ("p=bf16", "bf16,output=bfloat16"),
        ("c=bf16", "bf16-mixed,output=bfloat16"),
        ("p=f16,c=f16,o=f16,loss_scale=4", "fp16,output=float16,loss_scale=4"),
        ("p=f32; head: c=f16", "fp32,loss_scale=dynamic; head: compute=float16"),
        # overrides, and what follows from them
        ("bf16,grad=float32", "bf16,grad=float32"),
        ("bf16,param=float32", "bf16-mixed"),
        ("bf16-true,master=float32", "bf16"),
        ("bf16,master=none,rounding=stochastic", "bf16-true,rounding=stochastic"),
        ("fp16,loss_scale=1024", "fp16,loss_scale=1024"),
        ("fp16,loss_scale=1", "fp16,loss_scale=1"),
        ("fp32,compute=e4m3", "fp32,compute=float8_e4m3fn"),
        ("bf16,residual=fp32; head: residual=compute", "bf16; head: residual=compute"),
        ("bf16,inputs=bf16", "bf16,inputs=bfloat16"),
        ("bf16,inputs=none; stem: inputs=fp32", "bf16; stem: inputs=float32"),
        (
            "bf16; blocks.*.norm: compute=fp32, param=fp32 ;head:output=bf16",
            "bf16; blocks.*.norm: param=float32,compute=float32; head: output=bfloat16",
        ),
    ],
)
def test_what_texts_mean(text, name):
    assert Policy.parse(text).name == name


def test_the_canonical_text():
    assert str(Policy.parse("fp16,loss_scale=8; head: output=fp16,master=none")) == (
        "param=float16,compute=float16,output=float32,grad=float16,reduce=float32,master=float32,state=float32,"
        "rounding=none,frozen=rounded,inputs=none,residual=float32,loss_scale=8; head: output=float16,master=none"
    )


@pytest.mark.parametrize(
    ("rule", "roles"),
    [
        ("float32", "param=float32,compute=float32"),
        ("bf16-mixed", "param=float32,compute=bfloat16"),
        ("bf16", "param=bfloat16,compute=bfloat16,grad=bfloat16,master=float32"),
        ("mixed_float16, output=fp16", "param=float32,compute=float16,output=float16"),
        ("bf16-true,rounding=nearest", "param=bfloat16,compute=bfloat16,grad=bfloat16,master=none,rounding=nearest"),
    ],
)
def test_a_rule_may_begin_with_a_preset(rule, roles):
    assert str(Policy.parse(f"fp16; head: {rule}").rules[0]) == f"head: {roles}"


def test_a_rule_with_fp32_weights_ends_what_an_earlier_one_says_of_16_bit_weights():
    policy = Policy.parse("fp32; blocks: bf16; blocks.*.norm: float32; type=Own: bf16-true,rounding=nearest")
    assert policy.for_module("blocks.0.norm").name == "fp32"
    assert policy.for_module("blocks.0").name == "bf16"
    classes = {"blocks.0": ["Own"]}
    assert policy.for_module("blocks.0", classes).name == "bf16-true,rounding=nearest"
    with pytest.raises(PolicyError, match="computes in bfloat16 from float16"):
        Policy.parse("fp32,loss_scale=dynamic; a: bf16; a.b: param=float16").for_module("a.b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "bf18",
            '"bf18" in policy "bf18" is neither a preset nor role=value; did you mean bf16 or fp16 or bfloat16?',
        ),
        ("tf32", '"tf32" in policy "tf32" is neither a preset nor role=value; '),
        ("", '"" in policy "" is neither a preset nor role=value; known: fp32, bf16, '),
        ("bf16,", '"" in policy "bf16," is not role=value, such as grad=float32'),
        ("bf16,fp16", '"fp16" in policy "bf16,fp16" is not role=value, such as grad=float32'),
        ("bf16,grad=", '"grad=" in policy "bf16,grad=" is not role=value, such as grad=float32'),
        ("bf16,=fp32", '"=fp32" in policy "bf16,=fp32" is not role=value, such as grad=float32'),
        ("bf16,gard=fp32", 'a policy has no role "gard"; did you mean grad?'),
        (
            "c=f32,compute=f16",
            'policy "c=f32,compute=f16" sets compute twice in one list; keep one of the two',
        ),
        ("bf16;", '"" in policy "bf16;" is not a rule, such as "blocks.*.norm: param=float32"'),
        ("bf16; head", '"head" in policy "bf16; head" is not a rule, such as "blocks.*.norm: param=float32"'),
        ("bf16; head:", '"" in policy "bf16; head:" is not role=value, such as grad=float32'),
        ("bf16; head: bf18", '"bf18" in policy "bf16; head: bf18" is neither a preset nor role=value; '),
        ("bf16; : grad=fp32", '"" cannot be a rule\'s pattern; '),
        ("bf16; h: loss_scale=2", 'rule "h" sets loss_scale, but the whole model has one; '),
        ("bf16,grad=bf17", 'grad="bf17" is not known; '),
        ("bf16,rounding=up", 'rounding="up" is not known; known: none, nearest, stochastic'),
        ("bf16,rounding=bf16", "rounding=bf16 is not possible; allowed: none, nearest, stochastic"),
        ("bf16,param=e4m3", "param=e4m3 is not possible; allowed: float32, bfloat16, float16"),
        ("bf16,grad=none", "grad=none is not possible; allowed: float32, bfloat16, float16"),
        (
            "bf16,compute=tf32",
            "compute=tf32 is not possible; allowed: float32, bfloat16, float16, float8_e4m3fn, ",
        ),
        (
            "bf16,state=fp16",
            "state=fp16 is not possible (squared gradients underflow where the exponent has fewer bits than in "
            "float32); allowed: float32, bfloat16",
        ),
        (
            "bf16,master=bf16",
            "master=bf16 is not possible (a master is there to hold what 16 bits cannot); allowed: float32, none",
        ),
    ],
)
def test_malformed_text_is_refused_with_the_part_that_is(text, expected):
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("scale", ["3", "0", "-2", "0.5", "8589934592", "inf", "nan", "1e999", "two"])
def test_a_static_scale_is_a_power_of_two_in_range(scale):
    expected = f"loss_scale={scale} is not possible; write none, dynamic, or a power of two from 1 to 4294967296"
    with pytest.raises(PolicyError) as caught:
        Policy.parse(f"fp16,loss_scale={scale}")
    assert str(caught.value) == expected


@pytest.mark.parametrize("value", [16, None, ["bf16"]])
def test_only_text_is_parsed(value):
    with pytest.raises(PolicyError, match='a policy is a text such as "bf16", or a Policy, not '):
        Policy.parse(value)
