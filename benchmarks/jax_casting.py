"""Casting in JAX against its peers: dtypes first, then what is saved for the backward pass, and time of a step.

    python benchmarks/jax_casting.py             # checks, measures, writes results, fills docs/evidence.md
    python benchmarks/jax_casting.py --tables    # fills docs/evidence.md from the results that are there

One GPT of Flax Linen, FP32 parameters, `optax.adamw` under `jax.jit`, in turn within each round:

- `fp32`: as it is written.
- `flax bf16`: `dtype=jnp.bfloat16` in every module.
- `jmp bf16`: parameters cast by a jmp policy before the model is called.
- `bf16`, `fp16`: `dj.autocast`, which saves results of products; `save='everything'` leaves saving to JAX.
- `bf16, 16-bit weights and masters`: with `dj.cast` and `dj.masters(optax.adamw)` as well.

Saved bytes are counted in the traced program, as `jax.ad_checkpoint.print_saved_residuals` lists them: what a third
layer adds, without arguments. Peak memory is not measured, for XLA's compiler for CPUs undoes checkpointing.
"""

import time
from typing import Any

import report

SECONDS = 60.0
ROUNDS = (5, 41)
LAYERS, WINDOWS = 2, 16


def check() -> dict[str, float]:
    """Check that every product of Duotone's arms reads 16 bits, and that losses are near FP32's.

    Raises:
        SystemExit: it is not so; nothing is measured then.
    """
    import jax_arms

    losses = jax_arms.loss_functions(1)
    wide = {arm: jax_arms.products_in(dtype, losses[arm]) for arm, dtype in (("bf16", "bfloat16"), ("fp16", "float16"))}
    params, tokens = jax_arms.parameters(1), jax_arms.tokens_of(2)
    values = {arm: float(loss(params, tokens)) for arm, loss in losses.items()}
    distance = {arm: abs(value - values["fp32"]) / values["fp32"] for arm, value in values.items()}
    if any(wide.values()) or max(distance["bf16"], distance["fp16"]) > 1e-2:
        raise SystemExit(f"products that are not 16-bit: {wide}; losses {values}; nothing was timed")
    return distance


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Check, then measure everything."""
    import jax_arms

    results: dict[str, Any] = {"machine": report.machine() | jax_arms.versions(), "device": device}
    results["distance_of_loss_to_fp32"] = check()
    print("saved for the backward pass", flush=True)
    results["saved_bytes_per_token_and_channel"] = jax_arms.saved_bytes()
    print("training steps", flush=True)
    arms = jax_arms.training_steps(LAYERS, WINDOWS)
    timed = {arm: [] for arm in arms}
    for step in arms.values():
        step()
    begun = time.perf_counter()
    rounds = 0
    while rounds < ROUNDS[0] or (time.perf_counter() - begun < seconds and rounds < ROUNDS[1]):
        for arm, step in arms.items():
            started = time.perf_counter()
            step()
            timed[arm].append(time.perf_counter() - started)
        rounds += 1
    results["milliseconds"] = report.milliseconds(timed)
    results["times_faster_than"] = {
        peer: {arm: report.times_faster(timed, arm)[peer] for arm in arms if arm != peer}
        for peer in ("fp32", "flax bf16")
    }
    results["compile_seconds"] = {arm: step.compile_seconds for arm, step in arms.items()}
    return results


def tables(results: dict[str, Any]) -> str:
    """Return the table of docs/evidence.md in Markdown."""
    saved, faster = results["saved_bytes_per_token_and_channel"], results["times_faster_than"]
    lines = [
        "| arm | saved by a block, bytes per token and channel | a step, ms | times faster than `fp32` | "
        "times faster than `flax bf16` | traced and compiled in, s |",
        "|---|---|---|---|---|---|",
    ]
    for arm, milliseconds in results["milliseconds"].items():
        ratios = [report.with_quartiles(faster[peer][arm]) if arm != peer else "" for peer in faster]
        bytes_saved = f"{saved[arm]:.1f}" if arm in saved else ""
        lines.append(
            f"| `{arm}` | {bytes_saved} | {milliseconds['median']:.4g} | {' | '.join(ratios)} | "
            f"{results['compile_seconds'][arm]:.1f} |"
        )
    where = results["machine"]
    libraries = ", ".join(f"{name} {where[name]}" for name in ("jax", "flax", "jmp", "optax"))
    return "\n".join(lines) + (
        "\n\nMedians, with quartiles, of ratios taken round by round. "
        f"{report.provenance(where, 'make bench-jax', libraries)}"
    )


def main() -> None:
    """Run as the command line says."""
    report.run("jax_casting", __doc__, measure, tables, SECONDS)


if __name__ == "__main__":
    main()
