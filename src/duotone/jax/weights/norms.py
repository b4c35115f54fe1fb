"""Which weights stay FP32 whatever the policy's `param`: those of norms, and what a residual stream starts with.

There are few of them, and small updates to numbers near 1 are what 16 bits lose first. Where a container has a class
(Equinox, NNX) a norm is known by its name; in dicts (Linen, Haiku, an NNX state) by the name of the part, `ln_1` or
`LayerNorm_0`, or by what is in it: `scale` with `bias` or `offset` beside it, and nothing else. So a module and its
state have the same norms, but for those whose class alone says so.
"""

import re
from collections.abc import Mapping
from typing import Any

from duotone.jax.trees import Leaf, children_of

_CLASS = re.compile(r"norm(\d+d)?$", re.IGNORECASE)
_PART = re.compile(r"(layer|batch|group|rms|instance)_?norm|(^|_)norm($|_|\d)|(^|_)ln($|_|\d)", re.IGNORECASE)
# running statistics of an NNX state among them
_BESIDE_SCALE = {"scale", "bias", "offset", "mean", "var"}
# operands of products, whatever their shape
_OPERANDS = {"kernel", "weight", "w", "embedding", "embeddings"}


def is_of_norm(leaf: Leaf, classes: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether a leaf is a weight of a norm.

    >>> from duotone.jax.trees import leaves_of
    >>> tree = {"ln_f": {"g": 1.0}, "Dense_0": {"kernel": 1.0}, "x": {"scale": 1.0, "bias": 0.0}}
    >>> [leaf.path for leaf in leaves_of(tree) if is_of_norm(leaf, {})]
    ['ln_f.g', 'x.bias', 'x.scale']
    """
    part, _, _ = leaf.path.rpartition(".")
    if any(_CLASS.search(name) for name in classes.get(part, ())):
        return True
    if _PART.search(part.rpartition(".")[2]):
        return True
    names = _names_in(leaf.owner)
    return "scale" in names and names <= _BESIDE_SCALE


def starts_stream(leaf: Leaf) -> bool:
    """Return whether a leaf is added to every item of a batch: a class token, a position embedding.

    The first of its several dimensions is 1, and it is named unlike an operand of a product.
    """
    shape = getattr(leaf.value, "shape", ())
    return len(shape) > 1 and shape[0] == 1 and leaf.path.rpartition(".")[2] not in _OPERANDS


def _names_in(owner: Any) -> set[str]:
    if not isinstance(owner, Mapping):
        return set()
    return {str(getattr(key, "key", key)) for key, _ in children_of(owner)}
