"""Which gradients are not finite, and the errors that a run ends with if it only skips.

The backward pass goes through the modules from the last to the first, and an Inf or a NaN spreads from where it arises
to all that comes after. So the module to look at is that of the last parameter, in the order of the model, whose
gradient is not finite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duotone.errors import LossScaleCollapse, NonFiniteLoss
from duotone.loss_scale import LossScale
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.parameters.shards import local
from duotone.torch.parameters.storage import storage_of
from duotone.wording import collapse as words

_SHOWN = 3


def non_finite_gradients(
    optimizers: Sequence[torch.optim.Optimizer], agreement: Agreement | None = None
) -> tuple[list[str], int]:
    """Return the names of parameters whose gradients hold an Inf or a NaN, in the model's order, of how many.

    That order is known of a model that was cast; else it is the optimizers', whose groups may mix layers.

    Args:
        optimizers: whose parameters are checked. A name is the one in the model that was cast, else the one that the
            optimizer was given, else index and shape: `"parameter 3 (64, 64)"`.
        agreement: of the ranks, which then all return the same; None for this rank's own part.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.named_parameters())
    >>> model.weight.grad = torch.tensor([[1.0, torch.inf]])
    >>> non_finite_gradients([optimizer])
    (['weight'], 1)
    """
    named: list[tuple[str, Tensor]] = []
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        for index, param in enumerate(params):
            label = given[index] if len(given) == len(params) else f"parameter {index} {tuple(param.shape)}"
            named.append((storage_of(param).name or label, param))
    if all(storage_of(param).name for _, param in named):
        named.sort(key=lambda each: storage_of(each[1]).order)
    flags = torch.tensor([param.grad is not None and not _is_finite(param.grad) for _, param in named])
    if agreement is not None and named:
        flags = agreement.any(flags.to(local(named[0][1]).device))
    names = [name for (name, _), flag in zip(named, flags.tolist(), strict=True) if flag]
    return names, sum(param.grad is not None for _, param in named)


def collapse_error(
    names: Sequence[str], parameters: int, skipped: int, scale: float, settings: LossScale
) -> LossScaleCollapse:
    """Return the error of a run whose every step is skipped.

    Args:
        names: of the parameters whose gradients are not finite, in the model's order.
        parameters: how many parameters have a gradient.
        skipped: steps skipped in a row.
        scale: the loss scale that the gradients carried.
        settings: the loss scale's.

    >>> print(collapse_error(["a.weight", "b.weight"], 6, 3, 1.0, LossScale()))
    3 steps in a row were skipped, the last at loss scale 1, its floor: 2 of 6 gradients are not finite (a.weight,
    b.weight); the backward pass met the first in "b": keep that in FP32 by a rule, "b:
    param=float32,compute=float32,output=float32", ...
    """
    module = names[-1].rpartition(".")[0] if names else ""
    if not module:
        advice = "keep the part that overflows in FP32 by a rule"
    else:
        or_after = ", or in what comes after it, such as the loss" if len(names) == parameters else ""
        rule = f'"{module}: param=float32,compute=float32,output=float32"'
        advice = f'the backward pass met the first in "{module}"{or_after}: keep that in FP32 by a rule, {rule}'
    return words.overflow_error(
        skipped=skipped,
        scale=scale,
        settings=settings,
        failed=len(names),
        parameters=parameters,
        shown=some_of(names),
        advice=advice,
    )


def some_of(names: Sequence[str]) -> str:
    """Return a few names, the last among them, as text.

    >>> some_of(["a", "b", "c"]), some_of(["a", "b", "c", "d"])
    ('a, b, c', 'a, b, ..., d')
    """
    return ", ".join(names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "...", names[-1]])


def non_finite_loss_error(step: int, batch: int | None, skipped: int, where: str | None = None) -> NonFiniteLoss:
    """Return the error of a run whose loss is not a number in step after step.

    Args:
        step: the last of them, counted from 1.
        batch: which of its losses, counted from 1; None if it was on another rank.
        skipped: steps skipped in a row.
        where: what a search has found, as the end of a sentence; None for nothing.
    """
    found = f"{where}; " if where else ""
    advice = (
        f"{found}look at the data and the learning rate, or keep the module that overflows in FP32 by a rule "
        "(duotone.torch.explain shows where 16 bits are)"
    )
    return words.non_finite_loss_error(skipped=skipped, loss=loss_at(step, batch), advice=advice)


def loss_at(step: int, batch: int | None) -> str:
    """Return which loss, in words.

    >>> loss_at(3, 1), loss_at(3, None)
    ('loss 1 of step 3', 'a loss of step 3 on another rank')
    """
    return f"a loss of step {step} on another rank" if batch is None else f"loss {batch} of step {step}"


def _is_finite(grad: Tensor) -> bool:
    part = local(grad)
    values = part.coalesce().values() if part.is_sparse else part
    return bool(values.isfinite().all())
