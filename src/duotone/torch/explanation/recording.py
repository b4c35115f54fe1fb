"""Runs a model once under watch, and makes an `Explanation` of what was seen.

The run is a forward pass with gradients enabled. Afterwards the model is as it was: buffers, training flags, random
states, gradients; the hooks are gone. Left out: the backward pass, and what a compiler would fuse.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from duotone.errors import ExplainError
from duotone.policy import Policy
from duotone.torch.casting.cast import policy_of
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.explanation.explanation import Explanation
from duotone.torch.explanation.findings import findings_of
from duotone.torch.explanation.records import ModuleDtypes
from duotone.torch.explanation.totals import Totals
from duotone.torch.internals.compiler import original_of
from duotone.torch.parameters.storage import storage_of
from duotone.torch.watching import is_compiled, left_as_it_was, named_modules, watch
from duotone.torch.watching.saved import dtype_name
from duotone.wording.records import add_up, largest_first


def explain(model: nn.Module, *batch: Any, run: Callable[[], Any] | None = None, **kwargs: Any) -> Explanation:
    """Run a model once and say where its precision is: dtypes, casts, saved bytes, and what stands out.

    The model runs as it is, in training or evaluation, cast or not, with gradients enabled, forward only; it is left
    as it was. A compiled model is explained as it is written. Numbers are those of this batch: give one of the size
    that you train with.

    Args:
        model: any module.
        *batch: what the model is called with.
        run: called in place of the model, to explain a loss too: `run=lambda: loss_fn(model(x), y)`.
        **kwargs: what the model is called with by name.

    Returns:
        An `Explanation`; `print` it, or read its `findings`.

    Raises:
        ExplainError: the model is no module, run is no function, or there is both a run and a batch.

    >>> import torch, duotone.torch as dt
    >>> model = dt.cast(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "bf16")
    >>> explanation = explain(model, torch.ones(4, 8))
    >>> [(each.name, each.compute_dtype) for each in explanation.operations]
    [('linear', 'bfloat16'), ('relu', 'bfloat16')]
    >>> [(each.from_dtype, each.to_dtype, each.by, each.result_bytes) for each in explanation.casts]
    [('bfloat16', 'float32', 'duotone', 128), ('float32', 'bfloat16', 'duotone', 64)]
    >>> explanation.saved_for_backward.activation_bytes
    {'bfloat16': 128}
    """
    if not isinstance(model, nn.Module):
        raise ExplainError(f"got a {type(model).__name__} to explain; give a torch.nn.Module")
    if run is not None and not callable(run):
        raise ExplainError(f"run is a function without arguments, such as lambda: loss_fn(model(x), y), not {run!r}")
    if run is not None and (batch or kwargs):
        raise ExplainError("got both a batch and run; give the batch to the model inside run, or leave run out")
    compiled = is_compiled(model)
    model = original_of(model)
    policy = policy_of(model)
    totals = Totals(model, policy is not None)
    with left_as_it_was(model):
        watch(model, run or (lambda: model(*batch, **kwargs)), totals)
    policies = _policies(model)
    explanation = Explanation(
        model=type(model).__name__,
        policy=None if policy is None else policy.name,
        compiled=compiled,
        findings=(),
        modules=_modules(model, policies, totals),
        operations=totals.operations(),
        casts=largest_first(totals.casts),
        emulated_casts=largest_first(totals.emulated_casts),
        repeated_casts=totals.repeated_casts(),
        widenings=tuple(add_up(totals.widenings)),
        outputs=tuple(totals.outputs.values()),
        saved_for_backward=totals.saved_for_backward(),
    )
    return replace(explanation, findings=findings_of(explanation, policy, policies, _wide_as_planned(model)))


def _modules(model: nn.Module, policies: dict[str, Policy], totals: Totals) -> tuple[ModuleDtypes, ...]:
    return tuple(
        ModuleDtypes(
            path=path,
            type=type(module).__name__,
            calls=totals.modules[path].calls,
            policy=policies[path].name if path in policies else None,
            parameter_dtypes=tuple(
                dict.fromkeys(dtype_name(param.dtype) for param in module.parameters(recurse=False))
            ),
            input_dtypes=tuple(totals.modules[path].input_dtypes),
            output_dtypes=tuple(totals.modules[path].output_dtypes),
            saved_bytes=dict(totals.modules[path].saved_bytes),
            kept_float32_bytes=totals.modules[path].kept_float32_bytes,
        )
        for path, module in named_modules(model)
    )


def _wide_as_planned(model: nn.Module) -> frozenset[str]:
    """Return the modules whose own FP32 parameters are all so because the cast put them there."""
    wide = {
        path: [param for param in module.parameters(recurse=False) if param.dtype == torch.float32]
        for path, module in named_modules(model)
    }
    return frozenset(
        path for path, params in wide.items() if all(storage_of(param).param == torch.float32 for param in params)
    )


def _policies(model: nn.Module) -> dict[str, Policy]:
    """Return the policy of each module, by path, rules by path and by type applied.

    It is that of what stands in front of its forward; where nothing does, the module is under the policy of its parent.
    """
    policies: dict[str, Policy] = {}
    for path, module in named_modules(model):
        forward = cast_forward_of(module)
        parent = path.rpartition(".")[0]
        if forward is not None:
            policies[path] = forward.effective
        elif path and parent in policies:
            policies[path] = policies[parent]
    return policies
