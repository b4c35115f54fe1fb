"""A tree of one leaf that is kept in 16 bits and one that stays FP32, its gradients, and an inner optimizer."""

import jax
import optax

INNER = optax.sgd(0.25, momentum=0.5)
# what is True is frozen
MASK = {"dense": True, "LayerNorm_0": False}


def parameters() -> dict:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (3, 4))},
        "LayerNorm_0": {"scale": 1 + jax.random.normal(keys[1], (4,)) / 8},
    }


def gradients(seed: int) -> dict:
    return jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.fold_in(jax.random.key(seed), leaf.ndim), leaf.shape), parameters()
    )
