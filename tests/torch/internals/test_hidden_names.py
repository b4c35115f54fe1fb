"""With any one private name of torch hidden, `import duotone.torch` and a plain training loop still work."""

import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.errors import BackendError
from duotone.torch.internals import autograd, compiler, tensors, training
from duotone.torch.internals.lookup import HAS

ATTRIBUTES = [
    (module, constant)
    for module in (autograd, compiler, tensors, training)
    for constant, value in vars(module).items()
    if isinstance(value, str) and constant.isupper() and value.startswith("_")
]
NAMES = sorted(HAS)


def train(policy: str) -> list[float]:
    """Train a small model with everything that most loops have, and return its losses."""
    torch.manual_seed(0)
    model = dt.cast(
        nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)), policy
    )
    optimizer = dt.AdamW(model.parameters(), lr=1e-2)
    scaler = dt.LossScaler(policy)
    x = torch.randn(16, 8)
    losses = []
    for _ in range(4):
        loss = nn.functional.mse_loss(model(x).float(), x.sum(1, keepdim=True))
        scaler.backward(loss)
        scaler.step(optimizer, clip_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_child(work: Callable[[], object]) -> None:
    """Run `work` in a fork of this process, which has loaded torch already.

    Raises:
        AssertionError: it raised; with the traceback.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        message = ""
        try:
            work()
        except BaseException:  # the child must not go on as a test run
            message = traceback.format_exc()
        os.write(writing, message.encode()[-60_000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        message = answer.read()
    os.waitpid(child, 0)
    assert not message, message


def import_anew() -> ModuleType:
    """Import duotone.torch as if for the first time."""
    for name in [name for name in sys.modules if name.split(".")[0] == "duotone"]:
        del sys.modules[name]
    import duotone.torch as fresh

    globals()["dt"] = fresh
    return fresh


def without(name: str) -> ModuleType:
    """Import duotone.torch anew from a torch that has not got a name."""
    resolve: Any = pkgutil.resolve_name

    def hiding(asked: str) -> Any:
        if asked == name:
            raise AttributeError(asked)
        return resolve(asked)

    pkgutil.resolve_name = hiding
    fresh = import_anew()
    assert sys.modules["duotone.torch.internals.lookup"].HAS[name] is False
    return fresh


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from starting threads, which a fork would not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    # what the CPU's kernels are compiled for is in memory then, in every fork
    return {policy: train(policy) for policy in ("bf16", "fp16")}


@pytest.mark.parametrize("name", NAMES)
def test_training_works_with_a_name_of_torch_missing(name, losses):
    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without(name)
            assert {policy: train(policy) for policy in losses} == losses

    in_child(work)


@pytest.mark.parametrize(("module", "constant"), ATTRIBUTES, ids=[constant for _, constant in ATTRIBUTES])
def test_training_works_with_an_attribute_of_torch_missing(module, constant, losses, monkeypatch):
    monkeypatch.setattr(module, constant, "_not_there")
    assert train("bf16") == losses["bf16"]


def test_both_lists_are_what_they_should_be():
    assert len(NAMES) > 35
    assert all(HAS.values()), f"this torch lacks {[name for name in NAMES if not HAS[name]]}"
    assert {"LOCAL_TENSOR", "PARAMETERS", "STEPPED", "CONSTANT"} <= {constant for _, constant in ATTRIBUTES}


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("torch:_amp_update_scale_", lambda dt: stepped(dt.GradScaler("cpu"))),
        ("torch:_amp_foreach_non_finite_check_and_unscale_", lambda dt: stepped(dt.GradScaler("cpu"))),
        ("torch.amp.grad_scaler:OptState", lambda dt: dt.GradScaler("cpu")),
        ("torch.utils._pytree:tree_flatten", lambda dt: dt.checkpoint_activations(nest(), "0")(torch.ones(1, 2))),
        ("torch.utils._python_dispatch:TorchDispatchMode", lambda dt: dt.explain(nest(), torch.ones(1, 2))),
        ("torch:ops.aten._to_copy", lambda dt: dt.explain(nest(), torch.ones(1, 2))),
    ],
)
def test_what_does_not_work_without_a_name_says_so(name, use):
    def work() -> None:
        fresh = without(name)
        with pytest.raises(sys.modules["duotone.errors"].BackendError, match=f"has no {name.replace(':', '.')}, .*"):
            use(fresh)

    in_child(work)


@pytest.mark.parametrize("name", training.SCALER_ATTRIBUTES)
def test_a_grad_scaler_of_torch_that_is_made_otherwise_is_refused(name, monkeypatch):
    monkeypatch.setattr(training, "SCALER_ATTRIBUTES", (f"{name}_renamed",))
    with pytest.raises(BackendError, match=f"GradScaler.{name}_renamed, on which duotone.torch.GradScaler stands"):
        dt.GradScaler("cpu")


def test_a_module_without_its_parameters_is_refused(monkeypatch):
    monkeypatch.setattr(training, "PARAMETERS", "_not_there")
    with pytest.raises(BackendError, match=r"torch.nn.Module._not_there, which checkpoint_activations"):
        dt.checkpoint_activations(nest(), "0")(torch.ones(1, 2))


def test_hooks_that_cannot_be_taken_over_are_named(monkeypatch):
    monkeypatch.setattr(training, "PRE_HOOKS", "_not_there")
    model = nest()
    with pytest.warns(dt_warning(), match="register it on the new optimizer"):
        dt.prepare(model, torch.optim.AdamW(model.parameters()), "bf16")


@pytest.mark.parametrize(
    "name",
    [
        "torch.utils.checkpoint:_CheckpointFrame",
        "torch.utils.checkpoint:CheckpointFunction.forward",
        "torch._C._autograd:_top_saved_tensors_default_hooks",
        "torch._C:_set_grad_enabled",
    ],
)
def test_a_checkpoint_that_cannot_be_followed_is_named_once(name):
    def work() -> None:
        fresh = without(name)
        model = fresh.cast(nest(), "bf16")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                checkpoint(model, torch.ones(1, 2), use_reentrant=False).sum().backward()
                model.zero_grad()
        named = [each for each in caught if "torch.utils.checkpoint of torch" in str(each.message)]
        assert len(named) == 1
        reentrant = name in ("torch.utils.checkpoint:CheckpointFunction.forward", "torch._C:_set_grad_enabled")
        assert f"(use_reentrant={reentrant})" in str(named[0].message)

    in_child(work)


def nest() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def dt_warning() -> type[Warning]:
    return sys.modules["duotone.errors"].DuotoneWarning


def stepped(scaler: Any) -> None:
    model = nest()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
