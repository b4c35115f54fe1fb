"""Runs a model once and watches: modules by hooks, functions and kernels by modes, saved tensors by autograd's hooks.

The run is a forward pass with gradients enabled. Afterwards the model is as it was: buffers, training flags, random
states, gradients; the hooks are gone. Left out: the backward pass, and what a compiler would fuse.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from duotone.errors import ExplainError
from duotone.policy import Policy
from duotone.torch.casting.cast import policy_of
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.explanation.explanation import OUTSIDE, Explanation, ModuleDtypes
from duotone.torch.explanation.findings import with_findings
from duotone.torch.explanation.ledger import Ledger, tensors_in
from duotone.torch.explanation.modes import Functions, Kernels
from duotone.torch.explanation.restore import left_as_it_was
from duotone.torch.explanation.saved import dtype_name, in_backward, watch_saved


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

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "bf16")
    >>> found = explain(model, torch.ones(4, 8))
    >>> [(each.name, each.compute_dtype) for each in found.operations]
    [('linear', 'bfloat16'), ('relu', 'bfloat16')]
    >>> [(each.from_dtype, each.to_dtype, each.by, each.result_bytes) for each in found.casts]
    [('bfloat16', 'float32', 'duotone', 128), ('float32', 'bfloat16', 'duotone', 64)]
    """
    if not isinstance(model, nn.Module):
        raise ExplainError(f"got a {type(model).__name__} to explain; give a torch.nn.Module")
    if run is not None and not callable(run):
        raise ExplainError(f"run is a function without arguments, such as lambda: loss_fn(model(x), y), not {run!r}")
    if run is not None and (batch or kwargs):
        raise ExplainError("got both a batch and run; give the batch to the model inside run, or leave run out")
    compiled = any(_is_compiled(module) for module in model.modules())
    model = getattr(model, "_orig_mod", model)
    policy = policy_of(model)
    ledger = Ledger(model, policy is not None)
    with ExitStack() as around:
        around.enter_context(left_as_it_was(model))
        if compiled or "torch._dynamo" in sys.modules:
            around.enter_context(torch.compiler.set_stance("force_eager"))
        around.enter_context(_hooks(model, ledger))
        _run(run or (lambda: model(*batch, **kwargs)), ledger)
    return with_findings(
        Explanation(
            model=type(model).__name__,
            policy=None if policy is None else policy.name,
            compiled=compiled,
            findings=(),
            modules=_modules(model, ledger),
            operations=ledger.operations(),
            casts=ledger.casts(),
            emulated_casts=ledger.emulated_casts(),
            repeated_casts=ledger.repeated_casts(),
            widenings=ledger.widenings(),
            outputs=ledger.outputs(),
            saved_activation_bytes=ledger.saved.activation_bytes,
            saved_parameter_bytes=ledger.saved.resident_bytes,
            saved_outside_bytes=dict(ledger.saved_by_module[OUTSIDE]),
        )
    )


def _run(run: Callable[[], Any], ledger: Ledger) -> None:
    functions = Functions(ledger, _run.__code__)
    kernels = Kernels(ledger, functions, _run.__code__)
    with torch.inference_mode(False), torch.enable_grad(), watch_saved(ledger.note_saved), kernels, functions:
        run()
    functions.finish()


@contextmanager
def _hooks(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Follow which module is running, and note what each takes and returns."""
    handles = []
    try:
        for path, module in _named_modules(model):
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                ledger.running.append(path)
                # a part that is computed again on the way back has been counted
                if in_backward():
                    return
                notes = ledger.modules[path]
                notes.calls += 1
                notes.inputs.update((dtype_name(tensor.dtype), None) for tensor in tensors_in((args, kwargs)))

            def after(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                ledger.running.pop()
                if in_backward():
                    return
                notes = ledger.modules[path]
                notes.outputs.update((dtype_name(tensor.dtype), None) for tensor in tensors_in(output))
                if path == "":
                    ledger.note_outputs(output)

            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            # also after an error, which the model may catch
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules(model: nn.Module, ledger: Ledger) -> tuple[ModuleDtypes, ...]:
    effective = _policies(model)
    found = []
    for path, module in _named_modules(model):
        notes = ledger.modules[path]
        parameters = dict.fromkeys(dtype_name(param.dtype) for param in module.parameters(recurse=False))
        policy = effective.get(path)
        found.append(
            ModuleDtypes(
                path=path,
                type=type(module).__name__,
                calls=notes.calls,
                policy=None if policy is None else policy.name,
                parameter_dtypes=tuple(parameters),
                input_dtypes=tuple(notes.inputs),
                output_dtypes=tuple(notes.outputs),
                saved_bytes=dict(ledger.saved_by_module[path]),
                kept_float32_bytes=ledger.kept_by_module[path],
            )
        )
    return tuple(found)


def _policies(model: nn.Module) -> dict[str, Policy]:
    """Return the policy of each module, by path, rules by path and by type applied.

    It is that of what stands in front of its forward; where nothing does, the module is under the policy around it.
    """
    found: dict[str, Policy] = {}
    for path, module in _named_modules(model):
        forward = cast_forward_of(module)
        if forward is not None:
            # a cast model's own has the rules, and the model itself may be of a type that one names
            classes = {"": tuple(kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module))}
            found[path] = forward.policy.for_module("", classes)
        elif path and path.rpartition(".")[0] in found:
            found[path] = found[path.rpartition(".")[0]]
    return found


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module with its path as written, without what torch.compile puts around modules."""
    for path, module in model.named_modules():
        if not hasattr(module, "_orig_mod"):
            yield ".".join(name for name in path.split(".") if name != "_orig_mod"), module


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
