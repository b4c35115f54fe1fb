"""Devices that are not there and their compilers, and what these make of updates and steps: see `jax_compiled.py`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

# libtpu looks for a machine that is not there, and JAX's CUDA plugin for a driver
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import optax
from compiled_program import CompiledProgram
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import duotone.jax as dj
from duotone.jax.optim import pieces

_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  reserved_shared_memory_per_block: 1024
  max_blocks_per_multiprocessor: 32
  driver_version: "13.0.0"
  runtime_version: "13.2.0"
  compile_time_toolkit_version: "13.2.0"
  dnn_version: "9.23.0"
}
"""
_H100 = {"topology": "1x1x1", "target_config": _TARGET}
SIDE = 8192
SHAPES = {"one array": [(SIDE, SIDE)], "16 arrays": [(SIDE // 4, SIDE // 4)] * 16}
LAYERS, WIDTH, BATCH = 4, 4096, 64


@dataclass(frozen=True)
class Arm:
    """One way to keep weights.

    Attributes:
        tx: the optimizer.
        policy: what weights are cast to; None for FP32.
        grad_dtype: of the gradients that its update takes.
        has_kernel: whether updates on a TPU run as the kernel of `duotone.jax.optim.tpu_kernel`.
    """

    tx: Any
    policy: str | None = None
    grad_dtype: Any = jnp.float32
    has_kernel: bool = True

    def start(self, shapes: list[tuple[int, ...]]) -> tuple[Any, Any]:
        """Return parameters and state, as shapes and dtypes."""
        params = {f"w{index}": jax.ShapeDtypeStruct(shape, jnp.float32) for index, shape in enumerate(shapes)}
        state = jax.eval_shape(self.tx.init, params)
        if (policy := self.policy) is not None:
            params = jax.eval_shape(lambda params: dj.cast(params, policy), params)
        return params, state

    def update(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """Return parameters and state after an update."""
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(self, params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        """Return parameters, state and loss after a training step."""
        if self.policy is None:
            loss, grads = jax.value_and_grad(_loss)(params, *batch)
        else:
            loss, grads = dj.value_and_grad(dj.autocast(_loss, self.policy))(state, params, *batch)
        return *self.update(params, state, grads), loss


def arms() -> dict[str, Arm]:
    """Return the ways to keep weights."""
    return {
        "fp32": Arm(optax.adamw(1e-3)),
        "fp32, clip": Arm(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))),
        "bf16": Arm(dj.masters(optax.adamw(1e-3), "bf16"), "bf16", jnp.bfloat16),
        "bf16, without the kernel": Arm(dj.masters(optax.adamw(1e-3), "bf16"), "bf16", jnp.bfloat16, has_kernel=False),
        "fp16, clip": Arm(dj.masters(optax.adamw(1e-3), "fp16", clip_norm=1.0), "fp16"),
    }


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for layer in range(LAYERS):
        x = jnp.tanh(x @ params[f"w{layer}"])
    return jnp.square(x - y).mean()


class Device:
    """A device that is not there, and its compiler.

    Args:
        name: `h100` or `v5e`.

    Raises:
        SystemExit: its compiler is not installed.
    """

    def __init__(self, name: str) -> None:
        kind, package, settings = {
            "h100": ("cuda", "jax[cuda12-local]", {"topology_name": "1x1x1"} | _H100),
            "v5e": ("tpu", "jax[tpu]", {"topology_name": "v5e:2x2"}),
        }[name]
        try:
            topology = topologies.get_topology_desc(platform=kind, **settings)
        except (NotImplementedError, RuntimeError) as error:
            raise SystemExit(
                f'JAX has no compiler for {kind} here; pip install "{package}", or name the other device with '
                f"--device ({str(error).splitlines()[0]})"
            ) from error
        self.kind = topology.devices[0].device_kind
        self.has_kernels = kind == "tpu"
        self._sharding = SingleDeviceSharding(topology.devices[0])

    def compiled(
        self,
        function: Callable[..., Any],
        arguments: Any,
        *,
        donated: tuple[int, ...] = (0, 1),
        has_kernel: bool = True,
    ) -> Any:
        """Return a function, compiled for shapes and dtypes, as a process that has the device alone would do it."""
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), arguments)
        is_on = self.has_kernels and has_kernel
        with (
            mock.patch.object(pieces, "are_possible", return_value=False),
            mock.patch.object(pieces, "kernels_are_possible", return_value=is_on),
        ):
            return jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*placed).compile()


def measure_update(device: Device, arm: Arm, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Return what an update needs and does, by parameter."""
    params, state = arm.start(shapes)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arm.grad_dtype), params)
    compiled = device.compiled(arm.update, (params, state, grads), has_kernel=arm.has_kernel)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    memory, program = compiled.memory_analysis(), CompiledProgram(compiled.as_text())
    found = {
        "argument_bytes": memory.argument_size_in_bytes / count,
        "bytes_besides": memory.temp_size_in_bytes / count,
        "kernels": program.kernels(),
        "hand_written_kernels": program.hand_written(),
        "kernels_over_parameters": program.kernels(least_bytes=count // len(shapes) // 4),
        "bytes_moved": program.bytes_moved() / count,
        "fewest_bytes_moved": (memory.argument_size_in_bytes + memory.alias_size_in_bytes) / count,
    }
    if arm.policy is not None:
        found["tail_is_computed"] = _tail_is_computed(program, arm, params, state)
    return found


def _tail_is_computed(program: CompiledProgram, arm: Arm, params: Any, state: Any) -> bool:
    """Return whether every new tail is computed from what only the new master could bring there."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((params, state))]
    tails = [number for number, path in enumerate(paths) if ".tails" in path]
    moments = [number for number, path in enumerate(paths) if ".nu[" in path]
    if not tails or len(tails) != len(moments):
        raise SystemExit(f"the state of masters around AdamW has other leaves than expected: {paths}")
    # parameters and state are the first arguments, and the results, in the same order
    return all(moment in program.made_from(tail) for tail, moment in zip(tails, moments, strict=True))


def measure_step(device: Device, arm: Arm) -> dict[str, float]:
    """Return the bytes by parameter of a whole training step: its arguments, and all at the peak."""
    params, state = arm.start([(WIDTH, WIDTH)] * LAYERS)
    batch = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    compiled = device.compiled(arm.step, (params, state, batch, batch), has_kernel=arm.has_kernel)
    memory = compiled.memory_analysis()
    count = LAYERS * WIDTH * WIDTH
    rest = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"argument_bytes": memory.argument_size_in_bytes / count, "bytes_at_the_peak": rest / count}


def conversions_survive(device: Device, dtype: Any) -> bool:
    """Return whether a tail that is written as a conversion to 16 bits and back is computed at all."""

    def tail(master: jax.Array) -> jax.Array:
        rounded = master.astype(dtype).astype(jnp.float32)
        bits = [jax.lax.bitcast_convert_type(each, jnp.int32) for each in (master, rounded)]
        return (bits[0] - bits[1]).astype(jnp.int16)

    compiled = device.compiled(tail, (jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32),), donated=())
    return 0 in CompiledProgram(compiled.as_text()).made_from(0)
