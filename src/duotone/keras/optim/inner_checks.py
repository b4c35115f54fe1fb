"""What `LossScaleOptimizer` refuses or warns of: settings of Keras' own, two loss scales, 16-bit variables alone."""

from collections.abc import Sequence
from typing import Any

import keras

from duotone.call_site import warn
from duotone.errors import LossScaleError, OptimizerError
from duotone.keras import internals
from duotone.keras.optim.masters import Masters
from duotone.keras.optim.narrow_variables import check_variables
from duotone.loss_scale import LossScale
from duotone.policy import Policy
from duotone.wording.words import SIXTEEN_BITS


def refuse_settings_of_keras(arguments: dict[str, Any]) -> None:
    """Raise if arguments are those by which Keras' own LossScaleOptimizer is told how the scale moves."""
    if not arguments.pop("dynamic", True):
        raise LossScaleError(
            "dynamic=False is said by the policy here; write the scale into it, "
            'LossScaleOptimizer(optimizer, "fp16-mixed,loss_scale=1024")'
        )
    names = {"initial_scale": "init_scale", "dynamic_growth_steps": "growth_interval"}
    given = {names[name]: arguments[name] for name in names if name in arguments}
    if given:
        settings = ", ".join(f"{name}={value}" for name, value in given.items())
        raise LossScaleError(
            f"{' and '.join(name for name in names if name in arguments)}: settings of the scale come as one argument "
            f"here; write LossScaleOptimizer(optimizer, LossScale({settings})), in powers of two"
        )


def check_inner(optimizer: Any) -> None:
    """Raise if there would be two loss scales; warn where the inner optimizer's own is taken away.

    A bare optimizer's `loss_scale_factor` would divide once more what has been divided.
    """
    for each in internals.nested_optimizers(optimizer):
        if isinstance(each, keras.optimizers.LossScaleOptimizer):
            raise OptimizerError(
                f"the inner optimizer is, or holds, a {type(each).__name__}; one loss scale is enough: write "
                "LossScaleOptimizer(keras.optimizers.Adam(1e-3), policy)"
            )
        if isinstance(each, Masters):
            # its factor is its inner optimizer's
            continue
        if each.loss_scale_factor is not None:
            warn(
                f"loss_scale_factor={each.loss_scale_factor:g} of {each.name} is not used, for the loss is scaled "
                "around it; leave it out, or for a static scale write "
                f'LossScaleOptimizer(optimizer, "fp16-mixed,loss_scale={each.loss_scale_factor:g}")',
            )
            each.loss_scale_factor = None


def check_masters(policy: LossScale | Policy, optimizer: Any, variables: Sequence[Any]) -> None:
    """Raise, or warn where no policy says what is meant, if 16-bit variables would be updated in 16 bits.

    Args:
        policy: of `optimizer`.
        optimizer: a `LossScaleOptimizer`, whose inner optimizer is built.
        variables: all that are trained.
    """
    if isinstance(policy, Policy) and policy.param in SIXTEEN_BITS and policy.master is None:
        # rounding=nearest says that it is on purpose
        return
    for finding in check_variables(optimizer, variables):
        warn(finding)


def refuse_narrow(policy: LossScale | Policy, inner: Any, variables: Sequence[Any]) -> None:
    """Raise if the policy has masters, and variables in 16 bits would have none."""
    narrow = [variable for variable in variables if keras.backend.standardize_dtype(variable.dtype) in SIXTEEN_BITS]
    if not narrow or any(isinstance(each, Masters) for each in internals.nested_optimizers(inner)):
        return
    if isinstance(policy, Policy) and policy.master is not None:
        first = f"{getattr(narrow[0], 'path', narrow[0].name)} is {keras.backend.standardize_dtype(narrow[0].dtype)}"
        raise OptimizerError(
            f"{len(narrow)} of {len(variables)} variables are kept in 16 bits ({first}), and small updates to them "
            f'would be lost, but policy "{policy.name}" has masters; write LossScaleOptimizer(Masters(optimizer), '
            f'"{policy.name}"), or give the layers dtype="mixed_float16", which keeps variables in FP32'
        )
