"""Functions that the tests explain: their arguments are shapes alone."""

import jax
import jax.numpy as jnp

FLOAT = jnp.float32


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def block_weights() -> dict[str, jax.ShapeDtypeStruct]:
    return {"up": shape(16, 64), "down": shape(64, 16), "scale": shape(16)}


def block(weights: dict, x: jax.Array) -> jax.Array:
    with jax.named_scope("norm"):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weights["scale"]
    with jax.named_scope("mlp"):
        return x + jax.nn.relu(normed @ weights["up"]) @ weights["down"]


def stack(weights: list[dict], x: jax.Array) -> jax.Array:
    for number, each in enumerate(weights):
        with jax.named_scope(f"block_{number}"):
            x = block(each, x)
    return (x**2).mean()
