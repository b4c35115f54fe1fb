"""A small transformer as plain functions of a pytree, for tests of autocast."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VOCABULARY, TOKENS, CHANNELS, HEADS = 61, 12, 32, 4


def parameters(n_layers: int) -> dict[str, Any]:
    """Return FP32 parameters; `blocks` is a list of layers."""
    # NumPy compiles nothing
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * scale, jnp.float32)

    def dense(n_in: int, n_out: int) -> dict[str, jax.Array]:
        return {"kernel": normal(n_in, n_out, scale=n_in**-0.5), "bias": normal(n_out, scale=0.1)}

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(CHANNELS), "bias": jnp.zeros(CHANNELS)}

    def block() -> dict[str, Any]:
        return {
            "norm1": norm(),
            "qkv": dense(CHANNELS, 3 * CHANNELS),
            "out": dense(CHANNELS, CHANNELS),
            "norm2": norm(),
            "up": dense(CHANNELS, 4 * CHANNELS),
            "down": dense(4 * CHANNELS, CHANNELS),
        }

    return {
        "tokens": normal(VOCABULARY, CHANNELS, scale=0.5),
        "positions": normal(1, TOKENS, CHANNELS, scale=0.1),
        "blocks": [block() for _ in range(n_layers)],
        "norm": norm(),
        "head": dense(CHANNELS, VOCABULARY),
    }


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with the layers stacked, for a scan over them."""
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])}


def _dense(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _norm(params: dict[str, Any], x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def _block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    shape = (*x.shape[:2], HEADS, CHANNELS // HEADS)
    q, k, v = (each.reshape(shape) for each in jnp.split(_dense(params["qkv"], _norm(params["norm1"], x)), 3, -1))
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(CHANNELS // HEADS)
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
    mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v).reshape(x.shape)
    x = x + _dense(params["out"], mixed)
    return x + _dense(params["down"], jax.nn.gelu(_dense(params["up"], _norm(params["norm2"], x))))


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Return the cross-entropy of the next tokens; layers are scanned if they are stacked."""
    x = params["tokens"][tokens[:, :-1]] + params["positions"]
    if isinstance(params["blocks"], list):
        for block in params["blocks"]:
            x = _block(block, x)
    else:
        x, _ = lax.scan(lambda x, block: (_block(block, x), None), x, params["blocks"])
    log_probabilities = jax.nn.log_softmax(_dense(params["head"], _norm(params["norm"], x)))
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1).mean()


def batch() -> jax.Array:
    """Return token numbers."""
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (4, TOKENS + 1)), jnp.int32)
