"""What XLA makes of `duotone.jax` for an H100 and a TPU v5e, compiled on a machine that has neither.

    make bench-jax-compiled                         # compiles, writes results, fills docs/evidence.md; five minutes
    python benchmarks/jax_compiled.py               # prints the tables
    python benchmarks/jax_compiled.py --json        # prints the results
    python benchmarks/jax_compiled.py --device h100 # one device only

It needs JAX's compilers for both, `pip install "jax[cuda12-local]" "jax[tpu]"`: the CUDA plugin, without CUDA itself,
and libtpu. Where one is missing the program says so. Nothing is run: what is said comes from the compiled programs'
memory analysis and from their optimised HLO, see `compiled_program.py`.

- An update of 16-bit weights by `dj.masters(optax.adamw)`, weights and state donated, of one array or of 16, beside
  `optax.adamw` on FP32 weights: the bytes that XLA needs besides its arguments; the kernels that pass over parameters;
  the bytes that they move, and the fewest possible: arguments read once, what is donated written once. Both sides also
  read the gradients once for their norm, if they are clipped or checked.
- A whole training step of four layers: arguments and all besides, at the peak.
- Whether the new tail is still computed from the new master: whether the second moment, which nothing else would bring
  there, is among what it is computed from. Beside it the same for a tail that is written as conversions. Where the
  update is a Pallas kernel the check says nothing, for nothing outside of a kernel changes what is in it.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import report

DEVICES = ("h100", "v5e")


def measure(names: list[str]) -> dict[str, Any]:
    """Compile everything for the named devices."""
    from jax_absent_devices import SHAPES, Device, arms, conversions_survive, measure_step, measure_update

    versions = {name: version(name) for name in ("jax", "jaxlib", "optax")}
    results: dict[str, Any] = {
        "machine": {"date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(), **versions},
        "devices": {},
    }
    for name, device in {name: Device(name) for name in names}.items():
        ways = {name: arm for name, arm in arms().items() if arm.has_kernel or device.has_kernels}
        results["devices"][name] = {
            "kind": device.kind,
            "updates": {
                layout: {arm: measure_update(device, each, shapes) for arm, each in ways.items()}
                for layout, shapes in SHAPES.items()
            },
            "steps": {arm: measure_step(device, each) for arm, each in ways.items()},
            "tails_by_conversion_are_computed": {
                dtype: conversions_survive(device, dtype) for dtype in ("bfloat16", "float16")
            },
        }
    return results


def tables(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    lines = []
    for found in results["devices"].values():
        lines += [
            f"{found['kind']}, bytes per parameter:",
            "",
            "| an update of | arm | arguments | besides | kernels over parameters | read and written | fewest possible "
            "| tails are computed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for layout, updates in found["updates"].items():
            lines += [_row(layout, arm, update) for arm, update in updates.items()]
        lines += ["", "| a whole step of four layers | arguments | at the peak |", "|---|---|---|"]
        lines += [
            f"| `{arm}` | {step['argument_bytes']:.2f} | {step['bytes_at_the_peak']:.2f} |"
            for arm, step in found["steps"].items()
        ]
        survive = found["tails_by_conversion_are_computed"].values()
        lines += ["", f"A tail written as conversions is {'' if all(survive) else 'not '}computed there.", ""]
    where = results["machine"]
    return "\n".join(lines) + (
        f"\nCompiled, not run, {where['date']} with JAX {where['jax']}, jaxlib {where['jaxlib']}, optax "
        f"{where['optax']}, Python {where['python']}. Repeat it with `make bench-jax-compiled`.\n"
    )


def _row(layout: str, arm: str, update: dict[str, Any]) -> str:
    computed = {True: "yes", False: "**no**", None: ""}[update.get("tail_is_computed")]
    computed = "in the kernel" if update["hand_written_kernels"] else computed
    return (
        f"| {layout} | `{arm}` | {update['argument_bytes']:.2f} | {update['bytes_besides']:.2f} | "
        f"{update['kernels_over_parameters']} | {update['bytes_moved']:.1f} | {update['fewest_bytes_moved']:.1f} | "
        f"{computed} |"
    )


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, action="append", help="compile for this one alone")
    parser.add_argument("--json", action="store_true", help="print the results instead of tables")
    parser.add_argument(
        "--evidence", action="store_true", help="write results/jax_compiled.json, fill docs/evidence.md"
    )
    arguments = parser.parse_args()
    results = measure(arguments.device or list(DEVICES))
    if arguments.evidence:
        text = json.dumps(results, indent=1) + "\n"
        (report.RESULTS / "jax_compiled.json").write_text(text, encoding="utf-8")
        report.fill(report.EVIDENCE, "jax_compiled", tables(results))
    print(json.dumps(results, indent=1) if arguments.json else tables(results))


if __name__ == "__main__":
    main()
