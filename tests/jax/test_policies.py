"""What of a policy JAX can have, and the sentences that refuse the rest."""

import jax
import jax.numpy as jnp
import pytest

import duotone.jax as dj
from duotone.errors import PolicyError
from duotone.jax import policies
from duotone.policy import Policy


@pytest.mark.parametrize("text", ["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "bf16,state=bfloat16"])
def test_presets_are_read(text: str) -> None:
    assert policies.read(text) == Policy.parse(text)
    policies.check_arithmetic(policies.read(text))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bf16,reduce=bfloat16", "JAX has no reduce=bfloat16; XLA reduces gradients"),
        ("bf16,frozen=tail", "JAX has no frozen=tail; what does not train"),
        ("bf16; head: frozen=float32", 'JAX has no frozen=float32 in rule "head: frozen=float32"'),
        ("bf16-true,rounding=stochastic", "JAX has no rounding=stochastic; keep masters"),
        ("bf16,compute=float8_e4m3fn", "JAX has no compute=float8_e4m3fn; write compute=bfloat16"),
        ("bf17", "is neither a preset"),
        ("bf16; head: inputs=float32", "has no inputs and outputs of its own"),
        ("bf16; head: residual=compute", "has no inputs and outputs of its own"),
        ("bf16; head: output=bfloat16", "has no inputs and outputs of its own"),
    ],
)
def test_what_jax_cannot_have_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        policies.read(text)
    with pytest.raises(PolicyError, match=sentence):
        dj.autocast(jnp.sum, text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bf16; type=Attention: compute=float32,param=float32", "knows named scopes, but no classes"),
        ("bf16; head: param=float16,compute=float16,grad=float16,loss_scale=1", "loss_scale"),
    ],
)
def test_rules_that_arithmetic_cannot_have_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        dj.autocast(jnp.sum, text)


def test_another_16_bit_format_in_a_rule_is_refused() -> None:
    policy = "fp16; head: param=bfloat16,compute=bfloat16,grad=bfloat16"
    with pytest.raises(PolicyError, match="a function computes in one 16-bit format; write compute=float16"):
        dj.autocast(jnp.sum, policy)


def test_rules_about_weights_alone_are_no_matter_of_arithmetic() -> None:
    policies.check_arithmetic(policies.read("bf16; type=LayerNorm: param=float32; norm: grad=float32"))


@pytest.mark.parametrize(
    ("pattern", "scopes", "holds"),
    [
        ("head", ["head"], True),
        ("head", ["GPT", "head"], True),
        ("head", ["GPT", "head", "dense"], True),
        ("head", ["GPT", "block", "head"], False),
        ("head", ["header"], False),
        ("block.*.norm", ["block", "0", "norm"], True),
        ("block.*.norm", ["GPT", "block/0", "norm"], True),
        ("block_*", ["GPT", "block_3"], True),
        ("*", [], True),
        ("head", [], False),
    ],
)
def test_patterns_fit_named_scopes(pattern: str, scopes: list[str], holds: bool) -> None:
    rule = policies.read(f"bf16; {pattern}: param=float32,compute=float32").rules[0]
    assert policies.holds_for_scopes(rule, scopes) is holds


def test_the_last_rule_wins() -> None:
    policy = policies.read("bf16; a: param=float32,compute=float32; a.b: compute=bfloat16")
    assert policies.computes_float32(policy, ["a"])
    assert not policies.computes_float32(policy, ["a", "b"])


def test_param_goes_by_key_path() -> None:
    policy = policies.read("bf16; norm: param=float32")
    assert policies.param_of(policy, "norm.scale") == "float32"
    assert policies.param_of(policy, "dense.kernel") == "bfloat16"


def test_a_rule_that_holds_nowhere_is_an_error() -> None:
    def forward(weight, x):
        with jax.named_scope("head"):
            return x @ weight

    fast = dj.autocast(forward, "bf16; haed: param=float32,compute=float32")
    with pytest.raises(PolicyError, match=r"holds for no named scope of this function; did you mean head\?"):
        fast(jnp.ones((2, 2)), jnp.ones((2, 2)))
    plain = dj.autocast(lambda weight, x: x @ weight, "bf16; head: param=float32,compute=float32")
    with pytest.raises(PolicyError, match="there are none"):
        plain(jnp.ones((2, 2)), jnp.ones((2, 2)))
