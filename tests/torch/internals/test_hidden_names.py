"""With any one private name of torch hidden, `import duotone.torch` and a plain training loop still work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.torch.internals import hiding

import duotone.torch as dt
from duotone.errors import BackendError, DuotoneWarning
from duotone.torch.internals import autograd, compiler, tensors, training
from duotone.torch.internals.lookup import HAS

ATTRIBUTES = [
    (module, constant)
    for module in (autograd, compiler, tensors, training)
    for constant, value in vars(module).items()
    if isinstance(value, str) and constant.isupper() and value.startswith("_")
]
NAMES = sorted(HAS)
REFUSED = {
    "torch:_amp_update_scale_": "scale",
    "torch:_amp_foreach_non_finite_check_and_unscale_": "scale",
    "torch.amp.grad_scaler:OptState": "scale",
    "torch.utils._pytree:tree_flatten": "recompute",
    "torch.utils._python_dispatch:TorchDispatchMode": "explain",
    "torch:ops.aten._to_copy": "explain",
}
# and which kind of checkpoint cannot be followed then
FOLLOWED = {
    "torch.utils.checkpoint:_CheckpointFrame": False,
    "torch.utils.checkpoint:CheckpointFunction.forward": True,
    "torch._C._autograd:_top_saved_tensors_default_hooks": False,
    "torch._C:_set_grad_enabled": True,
}
JOBS = [("", "train"), *((name, "train") for name in NAMES), *REFUSED.items(), *((n, "checkpoint") for n in FOLLOWED)]


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], list[str]]:
    """Return what came of each job, all of them in one process that forks."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hiding.py"))],
        input=json.dumps(JOBS),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(JOBS, json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_training_works_with_a_name_of_torch_missing(name, answers):
    failure, losses = answers[name, "train"]
    assert not failure, failure
    assert losses == answers["", "train"][1]


@pytest.mark.parametrize(("module", "constant"), ATTRIBUTES, ids=[constant for _, constant in ATTRIBUTES])
def test_training_works_with_an_attribute_of_torch_missing(module, constant, monkeypatch):
    expected = hiding.losses(dt, "bf16")
    monkeypatch.setattr(module, constant, "_not_there")
    assert hiding.losses(dt, "bf16") == expected


def test_both_lists_are_what_they_should_be():
    assert len(NAMES) > 35
    assert all(HAS.values()), f"this torch lacks {[name for name in NAMES if not HAS[name]]}"
    assert {"LOCAL_TENSOR", "PARAMETERS", "STEPPED", "CONSTANT"} <= {constant for _, constant in ATTRIBUTES}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_without_a_name_says_so(name, answers):
    failure, message = answers[name, REFUSED[name]]
    assert not failure, failure
    assert f"has no {name.replace(':', '.')}, " in message


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_checkpoint_that_cannot_be_followed_is_named_once(name, answers):
    failure, warned = answers[name, "checkpoint"]
    assert not failure, failure
    assert warned.count("torch.utils.checkpoint of torch") == 1
    assert f"(use_reentrant={FOLLOWED[name]})" in warned


@pytest.mark.parametrize("name", training.SCALER_ATTRIBUTES)
def test_a_grad_scaler_of_torch_that_is_made_otherwise_is_refused(name, monkeypatch):
    monkeypatch.setattr(training, "SCALER_ATTRIBUTES", (f"{name}_renamed",))
    with pytest.raises(BackendError, match=f"GradScaler.{name}_renamed, on which duotone.torch.GradScaler stands"):
        dt.GradScaler("cpu")


def test_a_module_without_its_parameters_is_refused(monkeypatch):
    monkeypatch.setattr(training, "PARAMETERS", "_not_there")
    with pytest.raises(BackendError, match=r"torch.nn.Module._not_there, which checkpoint_activations"):
        dt.checkpoint_activations(hiding.nest(), "0")(torch.ones(1, 2))


def test_hooks_that_cannot_be_taken_over_are_named(monkeypatch):
    monkeypatch.setattr(training, "PRE_HOOKS", "_not_there")
    model = hiding.nest()
    with pytest.warns(DuotoneWarning, match="register it on the new optimizer"):
        dt.prepare(model, torch.optim.AdamW(model.parameters()), "bf16")
