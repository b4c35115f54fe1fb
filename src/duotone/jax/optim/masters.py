"""FP32 masters around any Optax optimizer: `masters` makes a gradient transformation of another.

    master = weight + tail                                       (decoded, bit by bit)
    true   = gradient * min(1, clip_norm / grad_norm)
    inner optimizer: (true, master) -> new master, in FP32
    weight, tail = encode(new master)                            (nothing at all if a gradient is not finite)

The inner optimizer sees FP32 masters and FP32 true gradients, and no difference to training in FP32. A skipped step
leaves its state as it was, so that counts and schedules hold. Source: Micikevicius et al., arXiv:1710.03740, section 3.
"""

from typing import Any

import optax

from duotone.errors import LossScaleError, OptimizerError, PolicyError
from duotone.jax.optim.agreement import AxisName
from duotone.jax.optim.masters_step import MastersStep
from duotone.jax.optim.start import start
from duotone.jax.optim.state import MastersState
from duotone.jax.policies import read
from duotone.loss_scale import LossScale
from duotone.policy import Policy


def masters(
    inner: optax.GradientTransformation,
    policy: Policy | str,
    *,
    clip_norm: float | None = None,
    loss_scale: LossScale | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that updates FP32 masters of 16-bit weights with any Optax optimizer.

    `init` takes the FP32 parameters, before or instead of their cast, and keeps what 16 bits lack of them in its state.
    Parameters that are 16-bit already are taken as exact, and `report` says so. `update` takes true gradients: plain
    ones, or those of `duotone.jax.value_and_grad` where the policy has a loss scale. A step whose gradients hold an
    Inf or a NaN changes nothing but the loss scale and the counts of skipped steps.

    What `update` returns for a 16-bit weight can only be added to it: by `optax.apply_updates`,
    `equinox.apply_updates`, `nnx.Optimizer` or `TrainState`. What is to scale, clip or decide on updates goes inside;
    `optax.MultiSteps`, `optax.masked` and `optax.partition` may also stand around `masters`.

    Args:
        inner: an Optax optimizer, a chain, or whatever else has `init` and `update`. It gets extra arguments if it
            takes them.
        policy: a `Policy` or its text; the one that parameters are cast to.
        clip_norm: the largest norm of the true gradient that `inner` sees; None for no clipping.
        loss_scale: settings that take the place of the policy's.
        axis_name: axes of a `shard_map` with `check_vma=False`, a `pmap` or a `vmap`, whose ranks each hold a part of
            every gradient: they agree on the norm and on whether the step is skipped. Not needed where gradients are
            averaged over the axis already, nor where JAX knows what varies, nor where XLA partitions the program.

    Returns:
        A gradient transformation; its state is a `MastersState`.

    Raises:
        PolicyError: the policy cannot be read, JAX cannot have it, or it has no masters.
        LossScaleError: `loss_scale` is no settings, or the policy needs none.
        OptimizerError: `inner` is no optimizer, or `clip_norm` is not positive.

    >>> import jax.numpy as jnp
    >>> import duotone.jax as dj
    >>> params = {"w": jnp.float32([1.0, 1.001])}
    >>> tx = dj.masters(optax.sgd(2.0**-12), "bf16")
    >>> state = tx.init(params)
    >>> params = dj.cast(params, "bf16")
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"].dtype, dj.master_weights(params, state)["w"]
    (dtype(bfloat16), Array([0.9992676, 1.0002676], dtype=float32))
    """
    _check(inner, clip_norm)
    found = _read_policy(policy)
    settings = _read_settings(found, loss_scale)
    extended = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return start(params, extended.init, found, settings)

    # the names of Optax's arguments, by which they may be given
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None:
            raise OptimizerError(
                "masters decodes FP32 weights from the parameters; write tx.update(grads, state, params)"
            )
        if not isinstance(state, MastersState):
            raise OptimizerError(
                f"tx.update takes the state that tx.init of this very optimizer returned, not {type(state).__name__}; "
                "in a chain, that is the chain's own init"
            )
        step = MastersStep.read(params, updates, state, found, clip_norm, axis_name)
        return step.apply(extended.update, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _read_policy(policy: Policy | str) -> Policy:
    found = read(policy)
    if found.master is None:
        raise PolicyError(
            f'policy "{found.name}" has no masters, so duotone.jax.masters has nothing to do; write master=float32, or '
            "give the parameters to the Optax optimizer itself"
        )
    if found.state != "float32":
        raise PolicyError(
            f"state={found.state} is not possible in JAX, where moments are made by Optax; leave it out, and "
            'give the optimizer its own argument, such as optax.adamw(1e-3, mu_dtype="bfloat16")'
        )
    return found


def _read_settings(policy: Policy, settings: LossScale | None) -> LossScale:
    if settings is None:
        return LossScale.parse(policy.loss_scale)
    if not isinstance(settings, LossScale):
        raise LossScaleError(
            f"loss_scale is {settings!r}; give the settings as LossScale(growth_interval=1000), or write the scale "
            "into "
            'the policy, "fp16,loss_scale=1024"'
        )
    if not settings.is_none and not policy.needs_loss_scale:
        raise LossScaleError(
            f'policy "{policy.name}" needs no loss scale, for no gradient passes through float16; leave loss_scale out'
        )
    return settings


def _check(inner: Any, clip_norm: float | None) -> None:
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        raise OptimizerError(
            f"masters goes around an Optax optimizer, not {inner!r}; write masters(optax.adamw(3e-4), policy)"
        )
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        raise OptimizerError(f"clip_norm is {clip_norm!r}; it must be positive, or None for no clipping")
