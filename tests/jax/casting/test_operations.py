"""Operations of jax.numpy, jax.nn, jax.lax and jax.scipy behind a 16-bit product: values and gradients as in FP32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy import special

import duotone.jax as dj

from .equations import WEIGHT, X, assert_near

ROWS = jnp.array([1, 2, 2, 0])
SEGMENTS = jnp.array([0, 0, 1, 1, 2])


def positive(h):
    return h.T @ h + 8 * jnp.eye(8)


def attention(h, **options):
    return jax.nn.dot_product_attention(*[h[None, :, None]] * 3, **options)[0, :, 0]


OPERATIONS = {
    "sort": lambda h: jnp.sort(h, -1),
    "top_k": lambda h: lax.top_k(h, 3)[0],
    "sort_pairs": lambda h: lax.sort((h, h * 2), num_keys=1)[1],
    "cumsum": lambda h: jnp.cumsum(h, -1),
    "cumprod": lambda h: jnp.cumprod(1 + 0.1 * h, -1),
    "cumlogsumexp": lambda h: lax.cumlogsumexp(h, axis=1),
    "gelu": jax.nn.gelu,
    "gelu_erf": lambda h: jax.nn.gelu(h, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "selu": jax.nn.selu,
    "mish": jax.nn.mish,
    "glu": jax.nn.glu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "softmax": jax.nn.softmax,
    "logsumexp": lambda h: jax.nn.logsumexp(h, -1),
    "standardize": jax.nn.standardize,
    "attention": attention,
    "causal_attention": lambda h: attention(h, is_causal=True),
    "norm": lambda h: jnp.linalg.norm(h, axis=-1),
    "median": lambda h: jnp.median(h, -1),
    "quantile": lambda h: jnp.quantile(h, 0.3, axis=-1),
    "power": lambda h: jnp.abs(h) ** 1.5,
    "reciprocal": lambda h: 1 / (2 + h**2),
    "hypot": lambda h: jnp.hypot(h, h + 1),
    "arctan2": lambda h: jnp.arctan2(h, h + 3),
    "lgamma": lambda h: lax.lgamma(h**2 + 1),
    "betainc": lambda h: special.betainc(2.0, 3.0, jax.nn.sigmoid(h)),
    "i0e": special.i0e,
    "entr": lambda h: special.entr(h**2),
    "fft": lambda h: jnp.abs(jnp.fft.fft(h)),
    "irfft": lambda h: jnp.fft.irfft(jnp.fft.rfft(h)),
    "solve": lambda h: jnp.linalg.solve(positive(h), h.T),
    "cholesky": lambda h: jnp.linalg.cholesky(positive(h)),
    "svd": lambda h: jnp.linalg.svd(h, compute_uv=False),
    "slogdet": lambda h: jnp.linalg.slogdet(positive(h))[1],
    "conjugate_gradients": lambda h: jax.scipy.sparse.linalg.cg(positive(h), h[0])[0],
    "gather": lambda h: h[ROWS],
    "dynamic_slice": lambda h: lax.dynamic_slice(h, (1, 1), (2, 2)),
    "dynamic_update_slice": lambda h: lax.dynamic_update_slice(h, h[:2] * 2, (1, 0)),
    "at_add": lambda h: h.at[ROWS].add(1.5),
    "at_set": lambda h: h.at[jnp.array([0, 3])].set(h[:2] * 2),
    "at_multiply": lambda h: h.at[jnp.array([0, 3])].multiply(h[:2], unique_indices=True),
    "at_max": lambda h: h.at[ROWS].max(h[:4]),
    "segment_sum": lambda h: jax.ops.segment_sum(h, SEGMENTS, 3),
    "concatenate": lambda h: jnp.concatenate([h, X], 0),
    "pad": lambda h: jnp.pad(h, ((1, 1), (0, 0)), constant_values=0.3),
    "pad_reflect": lambda h: jnp.pad(h, ((1, 1), (0, 0)), mode="reflect"),
    "repeat": lambda h: jnp.repeat(h, 2, 0),
    "roll": lambda h: jnp.roll(h, 1, 0),
    "mod": lambda h: jnp.mod(h, 4.0),
    "maximum_pool": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    "average_pool": lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 2), "VALID") / 2,
    "reduce": lambda h: lax.reduce(h, 0.0, lambda a, b: a + b, (1,)),
    "convolution": lambda h: lax.conv_general_dilated(h[None, None], jnp.ones((1, 1, 3, 3)) * 0.1, (1, 1), "SAME"),
    "resize": lambda h: jax.image.resize(h, (10, 16), "bilinear"),
    "outer": lambda h: jnp.einsum("i,j->ij", h[0], h[1]),
    "ragged_dot": lambda h: lax.ragged_dot(h, jnp.stack([WEIGHT] * 2), jnp.array([2, 3])),
    "reduce_precision": lambda h: lax.reduce_precision(h, 5, 10),
    "through_fp16": lambda h: h.astype(jnp.float16).astype(jnp.float32) * 2,
    "interp": lambda h: jnp.interp(h, jnp.linspace(-3, 3, 7), jnp.linspace(0, 1, 7)),
    "covariance": jnp.cov,
    "triangular": lambda h: jax.scipy.linalg.solve_triangular(jnp.tril(h.T @ h) + 8 * jnp.eye(8), h.T, lower=True),
    "lstm": lambda h: lax.scan(
        lambda c, a: (jax.nn.sigmoid(a) * c + jnp.tanh(a), jax.nn.sigmoid(a) * jnp.tanh(c)), jnp.zeros(8), h
    )[1],
}
# shares of the largest element
NEAR = {"bf16": 0.03, "fp16": 0.006}


def compare(name: str, policy: str) -> None:
    def forward(weight, x):
        return OPERATIONS[name](x @ weight)

    def weighted(function):
        def loss(weight):
            found = function(weight, X)
            return (found * jnp.cos(jnp.arange(found.size).reshape(found.shape))).sum(), found

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, found), gradient = weighted(dj.autocast(forward, policy))(WEIGHT)
    (_, expected), expected_gradient = weighted(forward)(WEIGHT)
    assert found.dtype == expected.dtype
    assert_near(found, expected, NEAR[policy])
    assert_near(gradient, expected_gradient, 2 * NEAR[policy])


@pytest.mark.parametrize("name", ["silu", "at_multiply", "maximum_pool"])
def test_some_operations(name: str) -> None:
    compare(name, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", NEAR)
def test_operations(name: str, policy: str) -> None:
    compare(name, policy)


def test_values_that_are_not_finite_stay_so() -> None:
    fast = dj.autocast(lambda weight, x: jnp.maximum(x @ weight, -1.0), "fp16")
    found = fast(jnp.eye(2), jnp.array([[jnp.nan, jnp.inf], [-jnp.inf, 1e6]]))
    assert np.isnan(found[0, 0])
    # FP16 ends at 65504: an overflow is Inf, as a loss scale must see
    large = dj.autocast(lambda weight, x: x @ weight, "fp16")(jnp.eye(2), jnp.array([[1e6, 0.0]]))
    assert not np.isfinite(large[0, 0])


@pytest.mark.parametrize(
    "function",
    [jax.nn.soft_sign, jnp.arctan, jnp.arcsinh, jnp.tanh, jax.nn.sigmoid, lambda h: 3 * h / (h * h + 300)],
    ids=["soft_sign", "arctan", "arcsinh", "tanh", "sigmoid", "quotient"],
)
def test_derivatives_are_computed_in_fp32(function) -> None:
    # of 300, FP16 has no square: 1 / (1 + x^2) was 0; of tanh(6) it has no 1 - tanh(6)^2
    x = jnp.array([3.0, -6.0, 11.0, 300.0])

    def loss(x):
        # a sum over one, so that numbers that are not finite spread to no others
        return (dj.autocast(lambda weight, x: function(x[:, None] @ weight), "fp16")(jnp.ones((1, 1)), x)).sum()

    found = jax.grad(lambda x: 1024 * loss(x))(x) / 1024
    assert np.allclose(found, jax.grad(lambda x: function(x).sum())(x), rtol=2e-3, atol=2**-34)


@pytest.mark.parametrize("function", [lambda h: jnp.sin(30.3 * h), special.ndtr], ids=["sin", "ndtr"])
def test_what_amplifies_rounding_is_given_fp32(function) -> None:
    x = jnp.linspace(-3, 3, 64).astype(jnp.bfloat16)[:, None]
    found = dj.autocast(lambda weight, x: function(x @ weight), "bf16")(jnp.ones((1, 1)), x)
    assert np.allclose(found, function(x.astype(jnp.float32)), rtol=2**-8)


def test_sums_of_one_s_own_stay_fp32() -> None:
    def forward(weight, x):
        hidden = x @ weight
        return lax.reduce(hidden, 0.0, lambda a, b: a + b, (0,)) / 2048 * hidden[0]

    x = jnp.full((2048, 1), 64.0)
    assert dj.autocast(forward, "fp16")(jnp.ones((1, 1)), x)[0] == 64 * 64
