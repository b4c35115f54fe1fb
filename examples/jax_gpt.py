"""A GPT in Flax NNX that learns the source of Python's standard library, in the precision that is asked for.

    python examples/jax_gpt.py --policy fp16

A policy is "fp32", "bf16" or "fp16", or any other policy's text. What Duotone does are four calls: `masters`, `cast`
and `autocast` in `prepare`, and `value_and_grad` in `step`. Needs `pip install "duotone[jax]" flax`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import duotone.jax as dj
from duotone.corpus import Bytes, Corpus, standard_library

LossFunction = Callable[..., jax.Array]


@dataclass(frozen=True)
class Size:
    """The shape of a model, and how long it trains: a step reads `windows` pieces of `context` bytes."""

    layers: int = 2
    heads: int = 4
    width: int = 128
    context: int = 64
    windows: int = 16
    steps: int = 400
    learning_rate: float = 3e-3


class Block(nnx.Module):
    """Attention and a GELU network of four times the width, each added to the residual stream."""

    def __init__(self, size: Size, rngs: nnx.Rngs, dtype: Any) -> None:
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads = size.heads
        self.attention_norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.to_qkv, self.to_residual = linear(size.width, 3 * size.width), linear(size.width, size.width)
        self.mlp_norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(size.width, 4 * size.width), linear(4 * size.width, size.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        query_key_value = self.to_qkv(self.attention_norm(x)).reshape(*x.shape[:-1], 3, self.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(query_key_value, -3, 0), is_causal=True)
        x = x + self.to_residual(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A decoder over bytes. `dtype` is Flax's own way to 16-bit arithmetic; with Duotone it stays out of the model."""

    def __init__(self, size: Size, rngs: nnx.Rngs, dtype: Any = None) -> None:
        self.embedding = nnx.Embed(256, size.width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(size.context, size.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(size, rngs, dtype) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(size.width, 256, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def window_loss(model: GPT, windows: jax.Array) -> jax.Array:
    """Return the mean of -ln p(byte | those before it) in windows of bytes, uint8, (B, T + 1)."""
    tokens = windows.astype(jnp.int32)
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def batches(text: Bytes, size: Size, seed: int) -> Iterator[Bytes]:
    """Yield the batches of a run, uint8, (B, T + 1)."""
    random = np.random.default_rng(seed)
    for _ in range(size.steps):
        starts = random.integers(len(text) - size.context, size=(size.windows, 1))
        yield text[starts + np.arange(size.context + 1)]


def optimizer_of(size: Size) -> optax.GradientTransformation:
    """Return AdamW under warm-up and cosine, as it would be without Duotone."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, size.learning_rate, size.steps // 10, size.steps)
    return optax.adamw(schedule, b2=0.95, weight_decay=0.1)


def prepare(policy: str, size: Size, seed: int = 0) -> tuple[GPT, nnx.Optimizer, LossFunction]:
    """Return a model, its optimizer, made before the cast takes bits from the weights, and the loss of the policy."""
    model = GPT(size, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, dj.masters(optimizer_of(size), policy, clip_norm=1.0), wrt=nnx.Param)
    return dj.cast(model, policy), optimizer, dj.autocast(window_loss, policy)


def step(loss_fn: LossFunction, model: GPT, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    """Update a model, and return the loss that it had."""
    loss, grads = dj.value_and_grad(loss_fn)(optimizer, model, windows)
    optimizer.update(model, grads)
    return loss


def train(policy: str, size: Size, corpus: Corpus, seed: int = 0) -> tuple[list[float], float]:
    """Return the loss of every step, and the loss on held-out text, both in nats."""
    model, optimizer, loss_fn = prepare(policy, size, seed)
    compiled = nnx.jit(partial(step, loss_fn))
    losses = []
    for number, windows in enumerate(batches(corpus.train, size, seed)):
        losses.append(compiled(model, optimizer, jnp.asarray(windows)))
        if number % 100 == 99:
            dj.raise_if_collapsed(optimizer)
            print(f"step {number + 1}: loss {losses[-1]:.4f}, {dj.report(optimizer)}")
    return [loss.item() for loss in losses], held_out_loss(nnx.jit(loss_fn), model, corpus, size)


def held_out_loss(loss_fn: LossFunction, model: GPT, corpus: Corpus, size: Size, windows: int = 512) -> float:
    """Return the mean loss of windows of held-out text that do not overlap."""
    text = corpus.held_out[: windows * size.context + 1]
    pieces = np.lib.stride_tricks.sliding_window_view(text, size.context + 1)[:: size.context]
    parts = [loss_fn(model, jnp.asarray(part)).item() for part in np.split(pieces, len(pieces) // size.windows)]
    return math.fsum(parts) / len(parts)


def main() -> None:
    """Train once and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="bf16", help="fp32, bf16, fp16, or any other policy")
    parser.add_argument("--steps", type=int, default=Size.steps)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    _, loss = train(arguments.policy, replace(Size(), steps=arguments.steps), standard_library())
    print(f"{arguments.policy}: {loss / math.log(2):.4f} bits per held-out byte, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
