"""What `explain` says: each finding where it belongs, with its numbers, and nothing where all is as it should be."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import duotone.jax as dj
from duotone.wording.findings import NOTHING

from .models import shape

WEIGHT, X = shape(8, 4), shape(2, 8)
NARROW, NARROW_X = shape(8, 4, dtype="bfloat16"), shape(2, 8, dtype="bfloat16")


def findings(function, *args, policy: str | None = "bf16", **kwargs) -> str:
    return "\n".join(dj.explain(function, *args, policy=policy, **kwargs).findings)


def product(weight, x, **kwargs):
    with jax.named_scope("head"):
        return jnp.matmul(x, weight, **kwargs).sum()


def test_nothing_where_all_is_as_it_should_be():
    def plain(weight, x):
        return jnp.mean((x @ weight).astype(jnp.float32))

    assert dj.explain(plain, NARROW, NARROW_X, policy="bf16").findings == (NOTHING,)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_product_that_its_call_keeps_in_float32(precision):
    said = findings(lambda weight, x: product(weight, x, precision=precision), WEIGHT, X)
    assert "1 product (dot_general) ran in FP32 in head at tests/jax/explanation/test_findings.py:" in said
    assert f'as precision="{precision}" asks' in said
    assert "product" not in findings(lambda weight, x: product(weight, x, precision="default"), WEIGHT, X)


def test_a_product_that_the_configuration_keeps_in_float32():
    with jax.default_matmul_precision("float32"):
        said = findings(product, WEIGHT, X)
    assert "1 product (dot_general) ran in FP32 in head" in said
    assert "because jax.default_matmul_precision is set" in said


def test_a_product_that_a_rule_keeps_in_float32():
    said = findings(product, WEIGHT, X, policy="bf16; head: compute=float32")
    assert "ran in FP32 in head" in said
    assert "as a rule of the policy asks" in said


def test_a_product_that_keep_float32_keeps():
    kept = dj.keep_float32(product)
    found = dj.explain(kept, WEIGHT, X, policy="bf16")
    assert found.findings[0].startswith("1 product (dot_general) ran in FP32 in head at tests/jax/explanation/test_f")
    assert found.findings[0].endswith("inside keep_float32")
    # the mark is no scope of the user's
    assert [each.path for each in found.scopes] == ["head"]
    assert [each.name for each in dj.explain(kept, WEIGHT, X).operations] == ["dot_general", "reduce_sum"]

    def ruled(weight, x):
        with dj.op_rule("dot_general", "as_given"):
            return product(weight, x)

    assert "as op_rule asks" in findings(ruled, WEIGHT, X)


def test_a_product_with_a_float32_result():
    def asks(weight, x):
        return lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32).sum()

    # of weights, which are FP32 while a function is traced, every product asks for that
    said = findings(asks, NARROW, NARROW_X, argnums=())
    assert "1 product (dot_general) ran with FP32 results in no scope" in said
    assert "as preferred_element_type=float32 asks" in said


def test_weights_in_float32_are_cast_in_every_step():
    said = findings(product, WEIGHT, X)
    assert "1 weight in FP32 is cast in every step, 64 B; dj.cast(params, policy) casts them once" in said
    assert "cast in every step" not in findings(product, NARROW, X)
    assert "cast in every step" not in findings(product, WEIGHT, X, argnums=())


def test_float32_that_is_saved():
    def wide(weight, x):
        return jnp.exp(jnp.exp(x @ weight)).sum()

    everything = dj.autocast(wide, "bf16", save="everything")
    said = findings(everything, shape(64, 4096), shape(64, 64), policy=None)
    assert "FP32 is " in said
    assert "of what is saved for backward" in said
    assert "exp (2.1 MB)" in said
    # a toy says nothing, nor does a function that saves results of products alone
    assert "of what is saved" not in findings(everything, WEIGHT, X, policy=None)
    assert "of what is saved" not in findings(wide, shape(64, 4096), shape(64, 64))


def test_a_large_float32_result_that_was_computed_in_16_bits():
    said = findings(lambda weight, x: x @ weight, WEIGHT, X)
    assert "the result leaves the function in FP32 although computed in BF16: 32 B (2 x 4)" in said
    assert "leaves" not in findings(lambda weight, x: x @ weight, WEIGHT, X, policy="bf16,output=bfloat16")
    assert "2 results leave" in findings(lambda weight, x: (x @ weight, x @ weight * 2), WEIGHT, X)


def test_the_codes_own_casts_to_float32():
    def casts(weight, x):
        return jnp.tanh(x.astype(jnp.float32)).sum() + (x @ weight).sum()

    said = findings(casts, NARROW, NARROW_X)
    assert "the code casts BF16 to FP32 at tests/jax/explanation/test_findings.py:" in said
    assert "1 cast, 64 B" in said


def test_what_is_left_alone():
    def foreign(weight, x):
        seen = jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return (seen @ weight).sum() + jnp.abs(jnp.fft.fft(x)).sum()

    said = findings(foreign, WEIGHT, X)
    assert "left in the dtypes that they were traced in, for what is inside is not Duotone's: pure_callback (1)" in said
    assert "left alone: arithmetic in complex64" in said


def test_a_function_under_no_policy():
    assert 'is under no policy and computes in FP32; see what changes with policy="bf16"' in findings(
        product, WEIGHT, X, policy=None
    )
    by_itself = findings(lambda weight, x: product(weight.astype(jnp.bfloat16), x), WEIGHT, NARROW_X, policy=None)
    assert "is under no policy and casts by itself: " in by_itself


def test_a_policy_in_float32_finds_nothing():
    assert dj.explain(product, WEIGHT, X, policy="fp32").findings == (NOTHING,)


def test_nothing_to_explain():
    assert "nothing computes with floating-point numbers" in findings(lambda n: n + 1, shape(2, dtype="int32"))
