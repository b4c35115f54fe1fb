"""A GPT in JAX in several precisions: quality, step time, saved bytes and bytes at rest, in one run.

    python benchmarks/jax_training.py             # measures, writes results/jax_training.json, fills docs/evidence.md
    python benchmarks/jax_training.py --tables    # fills docs/evidence.md from the results that are there

The model, the text, the optimizer and the length are those of `examples/jax_gpt.py`, and so are the seeds. The arms:

- `fp32`: Flax and Optax, with `clip_by_global_norm` in front of AdamW.
- `Flax, dtype=bfloat16`: the same with Flax's own argument, which casts weights and inputs of each layer.
- `jmp, compute=bfloat16`: that, with all weights cast to BF16 by jmp's policy, as its README has it. Without Flax's
  argument its embeddings give FP32, and FP32 goes through the whole model.
- `BF16 weights`: that, with weights in BF16 under the same optimizer, without masters.
- `bf16`, `fp16`: Duotone's policies.

FP16 under Flax and jmp does not run here: `jax.nn.dot_product_attention` takes no FP16 on CPUs. What JAX says to it is
in the results. Step times are of steps in turn; saved bytes are counted in the traced program, before XLA changes it.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import optax
import report
from flax import nnx
from jax.extend import core

import duotone.jax as dj
from duotone.corpus import standard_library

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import jax_gpt
from jax_gpt import GPT, Size

SEEDS = (0, 1)
SECONDS = 30.0
ROUNDS = (9, 101)
DUOTONES = ("bf16", "fp16")
LossFunction = Callable[[Any, Any], jax.Array]


@dataclass
class Arm:
    """One way to train.

    Attributes:
        loss_fn: of parameters and windows.
        carry: parameters, and the optimizer's state.
        step: jitted; takes and returns the carry, and returns the loss.
    """

    loss_fn: LossFunction
    carry: tuple[Any, Any]
    step: Any


def model_of(size: Size, seed: int, dtype: Any) -> tuple[LossFunction, Any]:
    """Return the loss as a function of parameters and windows, and the parameters."""
    definition, params = nnx.split(GPT(size, nnx.Rngs(seed), dtype))
    return lambda params, windows: jax_gpt.window_loss(nnx.merge(definition, params), windows), params


def by_jmp(loss_fn: LossFunction, policy: jmp.Policy) -> LossFunction:
    """Return the loss of parameters that are cast first."""
    return lambda params, windows: loss_fn(policy.cast_to_compute(params), windows)


def by_optax(size: Size, seed: int, *, dtype: Any = None, policy: str = "", param_dtype: Any = jnp.float32) -> Arm:
    """Return training by Flax, jmp and Optax alone."""
    loss_fn, params = model_of(size, seed, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    if policy:
        loss_fn = by_jmp(loss_fn, jmp.get_policy(policy))
    tx = optax.chain(optax.clip_by_global_norm(1.0), jax_gpt.optimizer_of(size))

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, windows: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return Arm(loss_fn, (params, tx.init(params)), step)


def by_duotone(size: Size, seed: int, *, policy: str) -> Arm:
    """Return training under one of Duotone's policies."""
    loss_fn, params = model_of(size, seed, None)
    loss_fn = dj.autocast(loss_fn, policy)
    tx = dj.masters(jax_gpt.optimizer_of(size), policy, clip_norm=1.0)
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, windows: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = dj.value_and_grad(loss_fn)(state, params, windows)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return Arm(loss_fn, (dj.cast(params, policy), state), step)


_JMP = "params=float32,compute={},output=float32"
ARMS: dict[str, Callable[[Size, int], Arm]] = {
    "fp32": by_optax,
    "Flax, dtype=bfloat16": partial(by_optax, dtype=jnp.bfloat16),
    "jmp, compute=bfloat16": partial(by_optax, dtype=jnp.bfloat16, policy=_JMP.format("bfloat16")),
    "BF16 weights": partial(by_optax, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    **{policy: partial(by_duotone, policy=policy) for policy in DUOTONES},
}
NOT_POSSIBLE: dict[str, Callable[[Size, int], Arm]] = {
    "Flax, dtype=float16": partial(by_optax, dtype=jnp.float16),
    "jmp, compute=float16": partial(by_optax, dtype=jnp.float16, policy=_JMP.format("float16")),
}


def saved_bytes(make: Callable[[Size, int], Arm], size: Size) -> float:
    """Return what a block saves for its backward pass, in bytes per token and channel."""
    totals = []
    for layers in (1, 2):
        # so many tokens that copies of weights do not count
        shape = replace(size, layers=layers, windows=512)
        arm = make(shape, 0)
        windows = jax.ShapeDtypeStruct((shape.windows, shape.context + 1), jnp.uint8)

        def backward(params: Any, windows: Any, loss_fn: LossFunction = arm.loss_fn) -> list[Any]:
            return jax.tree.leaves(jax.vjp(lambda params: loss_fn(params, windows), params)[1])

        program = jax.make_jaxpr(backward)(arm.carry[0], windows).jaxpr
        arguments = {*program.invars, *program.constvars}
        saved = {each for each in program.outvars if not isinstance(each, core.Literal)} - arguments
        totals.append(sum(each.aval.size * each.aval.dtype.itemsize for each in saved))
    return (totals[1] - totals[0]) / (512 * size.context * size.width)


def trained(arm: Arm, size: Size, text: Any, seed: int) -> tuple[float, int]:
    """Return bits per held-out byte after training, and how many steps were skipped."""
    for windows in jax_gpt.batches(text.train, size, seed):
        arm.carry, _ = arm.step(arm.carry, jnp.asarray(windows))
    params, state = arm.carry
    loss = jax_gpt.held_out_loss(jax.jit(arm.loss_fn), params, text, size)
    skipped = int(dj.report(state).skipped_in_all) if hasattr(state, "tails") else 0
    return loss / math.log(2), skipped


def timed(arms: dict[str, Arm], windows: Any, at_least: float) -> dict[str, list[float]]:
    """Time a step of every arm in turn, round by round, in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    started = time.perf_counter()
    first = next(iter(seconds.values()))
    while len(first) < ROUNDS[0] or (time.perf_counter() - started < at_least and len(first) < ROUNDS[1]):
        for name, arm in arms.items():
            begun = time.perf_counter()
            arm.carry, loss = arm.step(arm.carry, windows)
            loss.block_until_ready()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def message_of(make: Callable[[Size, int], Arm], size: Size, windows: Any) -> str:
    """Return what JAX says to an arm that it does not run; empty if it does."""
    try:
        arm = make(size, 0)
        arm.step(arm.carry, windows)
    except ValueError as error:
        return str(error).splitlines()[0]
    return ""


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Train every arm, and time its steps."""
    size, text = Size(), standard_library()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "jmp")},
        "steps": size.steps,
        "arms": {},
    }
    arms: dict[str, Arm] = {}
    windows = jnp.asarray(next(jax_gpt.batches(text.train, size, 0)))
    results["not_possible"] = {name: message_of(make, size, windows) for name, make in NOT_POSSIBLE.items()}
    for name, make in ARMS.items():
        print(name, flush=True)
        found = []
        for seed in SEEDS:
            arms[name] = make(size, seed)
            found.append(trained(arms[name], size, text, seed))
        params = sum(leaf.size for leaf in jax.tree.leaves(arms[name].carry[0]))
        compiled = arms[name].step.lower(arms[name].carry, windows).compile()
        results["arms"][name] = {
            "bits_per_byte": [bits for bits, _ in found],
            "skipped": [skipped for _, skipped in found],
            "saved_bytes_per_token_and_channel": saved_bytes(make, size),
            "bytes_per_parameter": sum(leaf.nbytes for leaf in jax.tree.leaves(arms[name].carry)) / params,
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    samples = timed(arms, windows, seconds)
    results["milliseconds"] = report.milliseconds(samples)
    results["times_faster"] = {name: report.times_faster(samples, name) for name in DUOTONES}
    return results


def tables(results: dict[str, Any]) -> str:
    """Return the tables of docs/evidence.md in Markdown."""
    lines = [
        f"| {results['steps']} steps | bits per held-out byte | a step, ms | saved by a block, bytes per token and "
        "channel | weights, tails and moments, bytes per parameter | temporary memory of a step, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in results["arms"].items():
        bits = " and ".join(f"{each:.3f}" for each in arm["bits_per_byte"])
        lines.append(
            f"| `{name}` | {bits} | {results['milliseconds'][name]['median']:.0f} "
            f"| {arm['saved_bytes_per_token_and_channel']:.1f} | {arm['bytes_per_parameter']:.2f} "
            f"| {arm['temporary_bytes'] / 1e6:.1f} |"
        )
    lines += ["", "| Duotone's | times faster than |", "|---|---|"]
    for name, peers in results["times_faster"].items():
        faster = "; ".join(f"`{peer}` " + report.with_quartiles(ratio) for peer, ratio in peers.items())
        lines.append(f"| `{name}` | {faster} |")
    said = {message for message in results["not_possible"].values() if message}
    refused = " and ".join(f"`{name}`" for name, message in results["not_possible"].items() if message)
    lines += ["", f"Not possible here: {refused} ({'; '.join(sorted(said))})." if said else ""]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    text = "\n".join(lines) + "\n\nMedians, with quartiles, of ratios taken round by round; "
    return text + f"{versions}. " + report.provenance(results["machine"], "make bench-jax")


def main() -> None:
    """Run as the command line says."""
    report.run("jax_training", __doc__, measure, tables, SECONDS)


if __name__ == "__main__":
    main()
