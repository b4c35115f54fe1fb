"""What of a program is 16-bit and what stays FP32: weights, data, constants, policies' roles, explicit casts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import duotone.jax as dj
from duotone.errors import AutocastError

from .equations import HALVES, WEIGHT, X, all_equations, assert_near, bits, counted, operand_dtypes, result_dtypes

BIAS = jnp.linspace(-1, 1, 8)
TOKENS = jnp.array([[1, 2, 2, 0]])


def test_a_bias_is_rounded_where_it_meets_16_bits_and_its_gradient_is_an_fp32_sum() -> None:
    def forward(params, x):
        return x @ params["kernel"] + params["bias"]

    params = {"kernel": WEIGHT, "bias": BIAS}
    fast = dj.autocast(forward, "bf16")
    assert np.array_equal(fast(params, X), fast(params, X).astype(jnp.bfloat16).astype(jnp.float32))
    many = jax.grad(lambda p: fast(p, jnp.zeros((1000, 8))).sum())(params)["bias"]
    assert np.array_equal(many, np.full(8, 1000))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_shared_weight_are_added_in_fp32(dtype: str) -> None:
    def loss(weight, x):
        return sum((x @ weight).sum() for _ in range(300))

    # BF16 alone would end at 256
    assert jax.grad(dj.autocast(loss, "bf16"))(jnp.ones((1, 1), dtype), jnp.ones((1, 1)))[0, 0] == 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_an_embedding_are_added_in_fp32(dtype: str) -> None:
    def loss(table, tokens):
        return (table[tokens] @ jnp.eye(8)).sum()

    grads = jax.grad(dj.autocast(loss, "bf16"))(jnp.ones((4, 8), dtype), jnp.ones(1000, int))
    assert np.array_equal(np.asarray(grads[1], np.float32), np.full(8, 1000))


@pytest.mark.parametrize(("residual", "dtype"), [("float32", "float32"), ("compute", "bfloat16")])
def test_a_residual_stream_starts_as_the_policy_says(residual: str, dtype: str) -> None:
    def forward(params, tokens):
        x = params["tokens"][tokens] + params["positions"]
        return -(x + jnp.tanh(x @ params["kernel"]))

    params = {"tokens": WEIGHT, "positions": jnp.ones((1, 4, 8)), "kernel": WEIGHT}
    fast = dj.autocast(forward, f"bf16,residual={residual}")
    assert operand_dtypes(fast, params, TOKENS, of="neg") == [dtype]
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert operand_dtypes(fast, narrow, TOKENS, of="neg") == [dtype]


@pytest.mark.parametrize(("inputs", "dtype"), [("none", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_inputs_are_cast_as_the_policy_says(inputs: str, dtype: str) -> None:
    fast = dj.autocast(lambda weight, x: (x + x) @ weight, f"bf16,inputs={inputs}")
    assert operand_dtypes(fast, WEIGHT, X, of="add") == [dtype]
    wide = dj.autocast(lambda weight, x: (x + x) @ weight, "bf16,inputs=float32")
    assert operand_dtypes(wide, WEIGHT, X.astype(jnp.bfloat16), of="add") == ["float32"]


def test_results_leave_in_the_policy_s_output() -> None:
    def forward(weight, x):
        return x @ weight, jnp.arange(3), (x @ weight).astype(jnp.float16), None

    plain, narrow = (dj.autocast(forward, text)(WEIGHT, X) for text in ("bf16", "bf16,output=bfloat16"))
    assert [str(each.dtype) for each in plain[:3]] == ["float32", "int32", "float16"]
    assert [str(each.dtype) for each in narrow[:3]] == ["bfloat16", "int32", "float16"]
    assert plain[3] is narrow[3] is None


def test_data_in_fp32_stay_fp32_beside_16_bits() -> None:
    fast = dj.autocast(lambda weight, x: x @ weight + x, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="add") == ["float32"]


def test_constants_are_as_buffers_and_what_is_traced_around_is_a_weight() -> None:
    table = jnp.linspace(0, 1, 8)
    fast = dj.autocast(lambda weight, x: x @ weight + table, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="add") == ["float32"]
    assert np.array_equal(fast(WEIGHT * 0, X)[0], table)

    def loss(bias):
        return dj.autocast(lambda weight, x: x @ weight + bias, "bf16")(WEIGHT, X).sum()

    assert np.array_equal(jax.grad(loss)(BIAS), np.full(8, 5))


def test_explicit_casts_are_the_user_s_own() -> None:
    def widened(weight, x):
        return (x @ weight).astype(jnp.bfloat16).astype(jnp.float32) * 1.5

    fast = dj.autocast(widened, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="mul") == ["float32"]
    half = dj.autocast(lambda weight, x: jnp.tanh((x @ weight).astype(jnp.float16)), "bf16")
    assert operand_dtypes(half, WEIGHT, X, of="tanh") == ["float16"]
    assert half(WEIGHT, X).dtype == jnp.float16


@pytest.mark.parametrize("ask", ["highest", "high", lax.Precision.HIGHEST, "BF16_BF16_F32_X3"])
def test_a_precision_that_is_asked_for_keeps_fp32(ask) -> None:
    asked = dj.autocast(lambda weight, x: jnp.dot(x, weight, precision=ask), "bf16")
    assert operand_dtypes(asked, WEIGHT, X) == ["float32"]
    default = dj.autocast(lambda weight, x: jnp.dot(x, weight, precision="default"), "bf16")
    assert operand_dtypes(default, WEIGHT, X) == ["bfloat16"]


def test_the_default_precision_means_what_it_means_without() -> None:
    fast = dj.autocast(lambda weight, x: x @ weight, "bf16")
    with jax.default_matmul_precision("float32"):
        assert operand_dtypes(fast, WEIGHT, X) == ["float32"]
    with jax.default_matmul_precision("bfloat16"):
        assert operand_dtypes(fast, WEIGHT, X) == ["bfloat16"]


def test_preferred_element_type_of_16_bit_operands() -> None:
    def forward(weight, x):
        narrow = weight.astype(jnp.bfloat16)
        return lax.dot(x.astype(jnp.bfloat16), narrow, preferred_element_type=jnp.float32) * (x @ weight)

    fast = dj.autocast(forward, "bf16")
    assert result_dtypes(fast, WEIGHT, X) == ["float32", "bfloat16"]
    assert operand_dtypes(fast, WEIGHT, X, of="mul") == ["float32"]


def test_convolutions_are_16_bit() -> None:
    kernel, image = jnp.ones((2, 3, 3, 3)), jnp.ones((1, 3, 5, 5))

    def loss(kernel, image):
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME").sum()

    fast = dj.autocast(loss, "fp16")
    assert operand_dtypes(fast, kernel, image, of="conv_general_dilated") == ["float16"]
    assert_near(jax.grad(fast)(kernel, image), jax.grad(loss)(kernel, image))


@pytest.mark.parametrize("policy", HALVES)
def test_fp32_rules_and_what_they_feed(policy: str) -> None:
    def forward(weight, x):
        return jax.nn.log_softmax(x @ weight), jnp.linalg.norm(x @ weight), (x @ weight).var()

    fast = dj.autocast(forward, policy)
    half = HALVES[policy]
    exact = (X.astype(half) @ WEIGHT.astype(half)).astype(jnp.float32)
    for found, expected in zip(
        fast(WEIGHT, X),
        (
            jax.nn.log_softmax(exact.astype(jnp.float32)),
            jnp.linalg.norm(exact.astype(jnp.float32)),
            exact.astype("f4").var(),
        ),
        strict=True,
    ):
        assert_near(found, expected, 1e-5)


def test_integers_booleans_complex_numbers_and_fp8_are_left_alone() -> None:
    def forward(weight, x, index):
        wave = jnp.abs(jnp.fft.fft(x @ weight))
        eighth = (x @ weight).astype(jnp.float8_e4m3fn)
        return (x @ weight)[index], wave, index @ index, eighth, (x @ weight) > 0

    found, expected = (f(WEIGHT, X, TOKENS[0]) for f in (jax.jit(dj.autocast(forward, "bf16")), forward))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert_near(found[1], expected[1])
    assert found[2] == expected[2]


def test_x64_means_what_it_means_without() -> None:
    with jax.enable_x64(True):
        wide = WEIGHT.astype(jnp.float64)
        fast = dj.autocast(lambda weight, x: (x @ weight) * np.float64(2), "bf16")
        assert operand_dtypes(fast, wide, wide) == ["float64"]
        assert fast(wide, wide).dtype == jnp.float64
        assert operand_dtypes(fast, WEIGHT, X) == ["bfloat16"]
        assert fast(WEIGHT, X).dtype == jnp.float64
        assert_near(fast(WEIGHT, X), 2 * (X @ WEIGHT))


def test_random_bits_are_the_same() -> None:
    def forward(weight, x, key, raw):
        hidden = x @ weight
        kept = jax.random.bernoulli(key, 0.5, hidden.shape)
        noise = jax.random.normal(raw, (5, 8))
        return (
            jnp.where(kept, hidden / 0.5, 0.0),
            kept,
            noise,
            jax.random.gumbel(key, (3,)),
            jax.random.uniform(key, (4,)),
        )

    key, raw = jax.random.key(0), jax.random.PRNGKey(1)
    found, expected = dj.autocast(forward, "bf16")(WEIGHT, X, key, raw), forward(WEIGHT, X, key, raw)
    assert_near(found[0], expected[0])
    for ours, own in zip(found[1:], expected[1:], strict=True):
        # XLA rounds a logarithm in another way where it compiles it alone
        assert np.allclose(ours, own, rtol=1e-6, atol=0)


def test_few_equations_are_added() -> None:
    def loss(weight, x):
        for _ in range(10):
            x = jax.nn.relu(x @ weight)
        return x.sum()

    plain, fast = counted(loss, WEIGHT, X), counted(dj.autocast(loss, "bf16", save="everything"), WEIGHT, X)
    # two casts for a product's operands, or one, and one in the end
    assert fast["convert_element_type"] <= 2 * 10 + 2
    assert fast.total() - fast["convert_element_type"] <= plain.total()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dj.autocast(3, "bf16"), "autocast takes a function, not 3"),
        (lambda: dj.autocast(jnp.sum, "bf16", argnums="x"), "argnums must be the number of an argument"),
        (lambda: dj.autocast(jnp.sum, "bf16", argnums=1)(X), "that argument 1 is a weight, but there are 1 positional"),
        (lambda: dj.autocast(jnp.sum, "bf16")(a=X), "that argument 0 is a weight, but there are 0 positional"),
    ],
)
def test_what_autocast_cannot_take(call, sentence: str) -> None:
    with pytest.raises(AutocastError, match=sentence):
        call()


def test_no_weights_and_several() -> None:
    assert operand_dtypes(dj.autocast(lambda x: x @ x.T, "bf16", argnums=()), X) == ["bfloat16"]
    fast = dj.autocast(lambda x, w, b: x @ w + b, "bf16", argnums=(1, -1))
    assert operand_dtypes(fast, X, WEIGHT, BIAS, of="add") == ["float32"]
    assert np.array_equal(bits(fast(X, WEIGHT, BIAS)), bits(fast(X, WEIGHT, BIAS).astype("bfloat16").astype("float32")))


def test_gradients_inside_of_the_function_are_added_in_fp32() -> None:
    def gradient(weight, x):
        return jax.grad(lambda weight: sum((x @ weight).sum() for _ in range(300)))(weight)

    assert dj.autocast(gradient, "bf16")(jnp.ones((1, 1)), jnp.ones((1, 1)))[0, 0] == 300


def test_sums_over_devices_are_fp32_inside() -> None:
    fast = dj.autocast(lambda weight, x: jax.vmap(lambda row: lax.psum(row @ weight, "i"), axis_name="i")(x), "bf16")
    assert_near(fast(WEIGHT, X), jnp.broadcast_to((X @ WEIGHT).sum(0), (5, 8)))

    def local(weight, x):
        return lax.psum(x @ weight, "i") * (x @ weight)

    program = jax.make_jaxpr(dj.autocast(local, "bf16"), axis_env=[("i", 2)])(WEIGHT, X)
    sums = [each for each in all_equations(program) if each.primitive.name.startswith("psum")]
    assert [str(each.invars[0].aval.dtype) for each in sums] == ["float32"]


def test_autocast_inside_of_autocast() -> None:
    exact = dj.autocast(lambda weight, x: x @ weight, "fp32")
    same = dj.autocast(lambda weight, x: jnp.tanh(x @ weight), "bf16")
    fast = dj.autocast(lambda weight, x: exact(weight, x @ weight) + same(weight, x), "bf16")
    assert sorted(operand_dtypes(fast, WEIGHT, X)) == ["bfloat16", "bfloat16", "float32"]


def test_16_bit_data_beside_weights_in_code_that_takes_one_dtype() -> None:
    kernel, image = jnp.ones((2, 3, 3, 3), jnp.bfloat16), jnp.ones((1, 3, 5, 5), jnp.bfloat16)

    def forward(kernel, image):
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME")

    with pytest.raises(TypeError) as raised:
        dj.autocast(forward, "bf16")(kernel, image)
    assert "write inputs=bfloat16 in the policy" in raised.value.__notes__[-1]
    assert dj.autocast(forward, "bf16,inputs=bfloat16")(kernel, image).max() == 27


def test_what_jax_lowers_in_two_steps() -> None:
    def forward(weight, x):
        return jnp.interp(x @ weight, jnp.linspace(-3, 3, 7), jnp.linspace(0, 1, 7))

    fast = dj.autocast(forward, "bf16")
    assert_near(jax.jit(fast)(WEIGHT, X), forward(WEIGHT, X))
