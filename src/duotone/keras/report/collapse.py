"""The end of a run that only skips: which layers' gradients are not finite, or that the loss itself is not."""

import math
from collections.abc import Sequence
from typing import Any

from duotone.errors import LossScaleCollapse, NonFiniteLoss
from duotone.keras.optim.loss_scale_optimizer import StepReport
from duotone.keras.report.reading import readable
from duotone.loss_scale import LossScale
from duotone.policy import Policy
from duotone.wording import collapse as words
from duotone.wording.words import first_few

# from 2^32 to the floor it takes 32 skipped steps, and a growth into overflow one; this many is no accident
PATIENCE = 50


def raise_if_collapsed(model: Any, step: StepReport, *, patience: int, loss: float | None) -> None:
    """Raise if the last steps were skipped, and there is no hope that later ones will not be.

    Args:
        model: whose optimizer is a `LossScaleOptimizer` of Duotone's.
        step: what that reports of the last step.
        patience: how many steps in a row may be skipped; that many raise.
        loss: the mean of the epoch so far, from its logs; None for none. Inf and NaN stay in it, so it tells of them
            where the optimizer, which is given gradients alone, cannot.

    Raises:
        LossScaleCollapse: gradients overflow at the floor of the loss scale, or ever again.
        NonFiniteLoss: the loss is Inf or NaN itself.
    """
    if not step.loss_is_finite or (loss is not None and not math.isfinite(loss)):
        if step.skipped_in_a_row >= patience:
            raise non_finite_loss_error(step.skipped_in_a_row)
    # two in a row: a search for the scale begins there, and one batch alone may be at fault
    elif step.overflows_at_floor > 1 or step.skipped_in_a_row >= patience:
        optimizer = model.optimizer
        with readable(model):
            # a model that nobody named has another name in the next process
            names = [path.removeprefix(f"{model.name}/") for path in optimizer.non_finite()]
        paths = [variable.path.removeprefix(f"{model.name}/") for variable in model.trainable_variables]
        policy = str(optimizer.policy) if isinstance(optimizer.policy, Policy) else "fp16"
        raise collapse_error(names, paths, step.skipped_in_a_row, step.loss_scale, optimizer.settings, policy)


def collapse_error(
    names: Sequence[str], paths: Sequence[str], skipped: int, scale: float, settings: LossScale, policy: str = "fp16"
) -> LossScaleCollapse:
    """Return the error of a run whose every step is skipped.

    The backward pass goes through the layers from the last to the first, and an Inf or a NaN spreads from where it
    arises to all that comes after. So the layer to look at is that of the last of these variables, or one without
    variables that comes next.

    Args:
        names: paths of the variables whose last gradients were not finite, in the model's order.
        paths: of all variables that are trained, in that order.
        skipped: steps skipped in a row.
        scale: the loss scale of the last of them.
        settings: of the loss scale.
        policy: the model's, as text.

    >>> paths = ["up/kernel", "up/bias", "down/kernel"]
    >>> print(collapse_error(paths[:1], paths, 3, 1.0, LossScale()))
    3 steps in a row were skipped, the last at loss scale 1, its floor: 1 of 3 gradients are not finite (up/kernel);
    the backward pass met the first in layer "up", or between it and layer "down": keep that in FP32,
    dk.policy("fp16; up: float32"), ...
    """
    layer = _layer(names[-1]) if names else ""
    if not layer:
        advice = "keep the layer that overflows in FP32 by a rule of dk.policy"
    else:
        after = (_layer(path) for path in paths[max(index for index, path in enumerate(paths) if path in names) :])
        following = next((each for each in after if each != layer), None)
        or_after = (
            f'or between it and layer "{following}"' if following else "or in what comes after it, such as the loss"
        )
        advice = (
            f'the backward pass met the first in layer "{layer}", {or_after}: keep that in FP32, '
            f'dk.policy("{policy}; {layer}: float32")'
        )
    return words.overflow_error(
        skipped=skipped,
        scale=scale,
        settings=settings,
        failed=len(names),
        parameters=len(paths),
        shown=first_few(reversed(names)),
        advice=advice,
    )


def non_finite_loss_error(skipped: int) -> NonFiniteLoss:
    """Return the error of a run whose loss is not a number."""
    advice = (
        "look at the data and the learning rate, or keep the layer that overflows in FP32 by a rule of dk.policy; "
        "compile(run_eagerly=True) and look at the outputs of the layers to find it"
    )
    return words.non_finite_loss_error(skipped=skipped, loss="the last loss", advice=advice)


def _layer(path: str) -> str:
    """Return the path of the layer that a variable is of; empty if it is the model's own."""
    return path.rpartition("/")[0]
