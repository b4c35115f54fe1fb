"""The arms of benchmarks/jax_casting.py: a GPT of Flax in several precisions, what it saves, its training steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import optax
from jax.extend import core

import duotone.jax as dj

CONTEXT, WIDTH, HEADS, VOCABULARY = 64, 256, 4, 256
LIBRARIES = ("jax", "flax", "jmp", "optax")

Loss = Callable[[Any, jax.Array], jax.Array]


class Block(nn.Module):
    """A pre-norm transformer block as people write it; `dtype` is Flax's own way to 16-bit arithmetic."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, T, C) to the same."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        attention = nn.MultiHeadDotProductAttention(HEADS, dtype=self.dtype)
        x = x + attention(nn.LayerNorm(dtype=self.dtype)(x), mask=mask)
        hidden = nn.Dense(4 * WIDTH, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(WIDTH, dtype=self.dtype)(nn.gelu(hidden))


class GPT(nn.Module):
    """A decoder over bytes."""

    layers: int
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map (B, T) to (B, T, 256)."""
        x = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype)(tokens)
        x = x + nn.Embed(CONTEXT, WIDTH, dtype=self.dtype)(jnp.arange(tokens.shape[1]))
        for _ in range(self.layers):
            x = Block(self.dtype)(x)
        return nn.Dense(VOCABULARY, use_bias=False, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


def loss_of(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Return the mean of -ln p(next byte), in FP32."""
    logits: Any = model.apply(params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])
    return losses.mean()


def loss_functions(layers: int) -> dict[str, Loss]:
    """Return the loss of FP32 parameters and tokens in each arm."""
    plain = partial(loss_of, GPT(layers))
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")

    def by_jmp(params: Any, tokens: jax.Array) -> jax.Array:
        return plain(policy.cast_to_compute(params), tokens)

    return {
        "fp32": plain,
        "flax bf16": partial(loss_of, GPT(layers, jnp.bfloat16)),
        "jmp bf16": by_jmp,
        "bf16, save='everything'": dj.autocast(plain, "bf16", save="everything"),
        "bf16": dj.autocast(plain, "bf16"),
        "fp16": dj.autocast(plain, "fp16"),
    }


def parameters(layers: int) -> Any:
    """Return a model's FP32 parameters."""
    return jax.jit(GPT(layers).init)(jax.random.key(0), tokens_of(1)[:, :-1])


def tokens_of(windows: int) -> jax.Array:
    """Return random bytes, (B, T + 1)."""
    return jax.random.randint(jax.random.key(1), (windows, CONTEXT + 1), 0, VOCABULARY)


def saved_bytes(windows: int = 128) -> dict[str, float]:
    """Return what a block inside of a model saves for the backward pass, in bytes per token and channel."""
    found: dict[str, list[int]] = {}
    for layers in (2, 3):
        params = jax.eval_shape(partial(parameters, layers))
        tokens = jax.ShapeDtypeStruct((windows, CONTEXT + 1), jnp.int32)
        for arm, loss in loss_functions(layers).items():
            found.setdefault(arm, []).append(_residual_bytes(loss, params, tokens))
    return {arm: (more - less) / (windows * CONTEXT * WIDTH) for arm, (less, more) in found.items()}


def _residual_bytes(loss: Loss, params: Any, tokens: Any) -> int:
    def backward(params: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, jnp.zeros(tokens.shape, tokens.dtype)), params)[1])

    program = jax.make_jaxpr(backward)(params).jaxpr
    arguments = {*program.invars, *program.constvars}
    saved = {v for v in program.outvars if not isinstance(v, core.Literal) and v not in arguments}
    arrays: list[Any] = [v.aval for v in saved]
    return sum(array.size * array.dtype.itemsize for array in arrays)


@dataclass
class Arm:
    """A compiled training step, AdamW included, and what it goes on from.

    Attributes:
        step: updates parameters and optimizer state, and returns the loss.
        state: those.
        compile_seconds: what tracing and compiling took.
    """

    step: Callable[..., Any]
    state: tuple[Any, Any]
    tokens: jax.Array
    compile_seconds: float

    def __call__(self) -> float:
        """Take a step and return its loss."""
        *state, loss = self.step(*self.state, self.tokens)
        self.state = (state[0], state[1])
        return float(loss)


def training_steps(layers: int, windows: int) -> dict[str, Arm]:
    """Return a training step of each arm from the same parameters: plain optax.adamw, but for the last."""
    tokens = tokens_of(windows)
    arms = {arm: _compiled(loss, optax.adamw(1e-4), layers, tokens) for arm, loss in loss_functions(layers).items()}
    loss = dj.autocast(partial(loss_of, GPT(layers)), "bf16")
    arms["bf16, 16-bit weights and masters"] = _compiled(
        loss, dj.masters(optax.adamw(1e-4), "bf16"), layers, tokens, "bf16"
    )
    return arms


def _compiled(loss: Loss, tx: Any, layers: int, tokens: jax.Array, cast_to: str = "fp32") -> Arm:
    params = parameters(layers)
    state = (dj.cast(params, cast_to), tx.init(params))

    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    begun = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, tokens).compile()
    return Arm(compiled, state, tokens, time.perf_counter() - begun)


def products_in(dtype: str, loss: Loss) -> list[str]:
    """Return the dtypes of products' operands in a gradient that are not `dtype`."""
    program = jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(partial(parameters, 1)), tokens_of(1))
    return [each for each in _operands(program.jaxpr) if each != dtype]


def _operands(program: core.Jaxpr) -> list[str]:
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            found += [str(getattr(v.aval, "dtype", "")) for v in eqn.invars]
        for inner in core.jaxprs_in_params(eqn.params):
            found += _operands(inner)
    return found


def versions() -> dict[str, str]:
    """Return the libraries' versions."""
    return {name: version(name) for name in LIBRARIES}
