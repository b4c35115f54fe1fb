"""An optimizer's own step: what goes wrong with a cast model is said once, and nothing else is."""

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import duotone.torch as dt
from duotone.errors import DuotoneWarning, OptimizerError
from duotone.torch.parameters import plain_steps

X = torch.linspace(-1, 1, 12).view(4, 3)
LOST = "and not their FP32 masters"
UNSCALED = "but no scaler made this step of"


class Subclass(torch.optim.AdamW):
    """Somebody's own, with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


FOREIGN = {
    "AdamW": torch.optim.AdamW,
    "fused": lambda params: torch.optim.AdamW(params, fused=True),
    "foreach": lambda params: torch.optim.SGD(params, lr=0.1, foreach=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "subclass": Subclass,
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(X.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])
def test_masters_that_an_optimizer_does_not_see_are_named_once(kind, policy, said):
    model = dt.cast(net(), policy)
    train(model, FOREIGN[kind](model.parameters()))
    (message,) = said()
    assert LOST in message
    assert "duotone.torch.prepare(model, optimizer, policy)" in message


@pytest.mark.parametrize("kind", ["AdamW", "fused", "subclass"])
def test_gradients_in_another_dtype_than_weights_are_refused_in_a_sentence(kind, said):
    model = dt.cast(net(), "bf16,grad=float32")
    if kind == "subclass":
        # what it makes of them, it knows; torch's step, in this one
        with pytest.raises(RuntimeError, match="dtype"):
            train(model, FOREIGN[kind](model.parameters()))
        assert LOST in said()[0]
        return
    with pytest.raises(
        OptimizerError, match=r'"0.weight" is in torch.bfloat16 and its gradient in torch.float32.*prepare'
    ):
        train(model, FOREIGN[kind](model.parameters()))


def test_gradients_in_another_dtype_that_a_step_takes_are_warned_of(said):
    train(dt.cast(net(), "bf16,grad=float32"), FOREIGN["SGD"](net().parameters()))
    model = dt.cast(net(), "bf16,grad=float32")
    train(model, FOREIGN["SGD"](model.parameters()))
    (message,) = said()
    assert LOST in message


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_cast_models_too(copied, said):
    model = copied(dt.cast(net(), "bf16"))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    assert len(said()) == 1
    # once for each optimizer, and a copy is another one
    train(model, copy.deepcopy(optimizer), 0)
    train(model, torch.optim.AdamW(model.parameters()), 1)
    assert len(said()) == 2


def test_rounding_stochastically_is_done_by_duotones_optimizers_alone(said):
    model = dt.cast(net(), "bf16-true,rounding=stochastic")
    train(model, torch.optim.AdamW(model.parameters()))
    (message,) = said()
    assert "stochastically, but this AdamW rounds them to nearest" in message


@pytest.mark.parametrize(
    ("policy", "make"),
    [
        ("bf16", dt.AdamW),
        ("bf16", lambda params: dt.MasterWeights(torch.optim.NAdam(params))),
        ("bf16-true,rounding=stochastic", dt.AdamW),
        ("bf16-true,rounding=stochastic", lambda params: dt.MasterWeights(torch.optim.NAdam(params))),
        # lost on purpose
        ("bf16-true,rounding=nearest", torch.optim.AdamW),
        ("bf16-mixed", torch.optim.AdamW),
        ("fp32", torch.optim.AdamW),
        ("fp16,loss_scale=1", dt.AdamW),
    ],
)
def test_nothing_is_said_where_nothing_is_lost(policy, make, said):
    model = dt.cast(net(), policy)
    train(model, make(model.parameters()))
    assert said() == []


def test_models_that_were_never_cast_are_left_alone(said):
    dt.cast(net(), "bf16")
    for model in (net(), net().bfloat16(), dt.uncast(dt.cast(net(), "bf16"))):
        train(model, torch.optim.AdamW(model.parameters()))
    assert said() == []


def test_an_optimizer_that_another_one_is_inside_of_is_left_alone(said):
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    model = dt.cast(net(), "bf16")
    train(model, Around(dt.AdamW(model.parameters())))
    assert said() == []


def test_frozen_weights_count_when_they_are_trained(said):
    model = dt.cast(net(), "bf16").requires_grad_(False)
    head = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    train(nn.Sequential(model, head), optimizer)
    assert said() == []
    model.requires_grad_(True)
    train(nn.Sequential(model, head), optimizer)
    assert len(said()) == 1


def test_a_group_that_is_added_later_counts(said):
    model, other = net(), dt.cast(net(), "bf16")
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    optimizer.add_param_group({"params": other.parameters()})
    train(model, optimizer)
    assert len(said()) == 1


def test_a_cast_after_the_first_step_counts(said):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    dt.cast(model, "bf16")
    optimizer.state.clear()
    train(model, optimizer)
    assert len(said()) == 1


def test_one_that_refuses_to_step_is_not_warned_of_too(said):
    model = net()
    old = torch.optim.AdamW(model.parameters())
    dt.prepare(model, old, "bf16")
    inner = torch.optim.NAdam(dt.cast(net(), "bf16").parameters())
    dt.MasterWeights(inner)
    for optimizer in (old, inner):
        with pytest.raises(OptimizerError):
            optimizer.step()
    assert said() == []


def test_an_fp16_model_without_a_scaler_is_named_once(said):
    for make in (dt.AdamW, lambda params: dt.MasterWeights(torch.optim.NAdam(params))):
        model = dt.cast(net(), "fp16")
        train(model, make(model.parameters()))
    assert [UNSCALED in message for message in said()] == [True, True]


@pytest.mark.parametrize("make", [dt.AdamW, torch.optim.AdamW, FOREIGN["fused"]])
@pytest.mark.parametrize("kind", ["LossScaler", "dt.GradScaler", "torch.amp.GradScaler"])
def test_any_scaler_will_do(make, kind, said):
    makers = {"LossScaler": lambda: dt.LossScaler("fp16"), "dt.GradScaler": lambda: dt.GradScaler("cpu")}
    scaler = makers.get(kind, lambda: torch.amp.GradScaler("cpu"))()
    model = dt.cast(net(), "fp16-mixed")
    optimizer = make(model.parameters())
    for _ in range(2):
        loss = model(X).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        if not isinstance(scaler, dt.LossScaler):
            scaler.update()
    assert said() == []


def test_a_scaler_that_is_switched_off_will_not_do(said):
    scaler = dt.GradScaler("cpu", enabled=False)
    model = dt.cast(net(), "fp16-mixed")
    model(X).sum().backward()
    scaler.step(torch.optim.AdamW(model.parameters()))
    (message,) = said()
    assert UNSCALED in message


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("make", [dt.AdamW, torch.optim.AdamW])
def test_an_optimizer_that_was_looked_at_costs_two_calls(make):
    model = dt.cast(net(), "bf16")
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    calls = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(("plain_steps.py", "parameters/storage.py")):
            calls.append(frame.f_code.co_name)

    (hook,) = [each for each in hooks() if each.__module__ == "duotone.torch.parameters.plain_steps"]
    sys.setprofile(count)
    try:
        hook(optimizer, (), {})
        hook(optimizer, (), {"found_inf": torch.tensor(False)})
    finally:
        sys.setprofile(None)
    assert calls == ["_before_step", "storage_changes", "_before_step"]


def hooks() -> list[Any]:
    """Return torch's global hooks, and leave them as they are."""
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    handle.remove()
    return list(handle.hooks_dict_ref().values())


def test_the_first_cast_sets_a_hook(monkeypatch):
    # another hook comes with the first cast of a process
    dt.cast(net(), "bf16")
    monkeypatch.setattr(plain_steps, "_registered", [])
    before = hooks()
    for _ in range(2):
        dt.cast(net(), "bf16")
    (handle,) = plain_steps._registered
    try:
        assert len(hooks()) == len(before) + 1
    finally:
        handle.remove()
    assert hooks() == before


def warned_on_shards(policy: str) -> list[list[str]]:
    each = []
    for make in (torch.optim.AdamW, dt.AdamW):
        model = dt.cast(net(), policy)
        dt.fully_shard(model)
        optimizer = make(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer)
        messages = [str(warning.message) for warning in caught if issubclass(warning.category, DuotoneWarning)]
        each.append([message for message in messages if "this CPU has no FP16" not in message])
    return each


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "bf16-true,rounding=stochastic"])
def test_shards_are_looked_at_on_every_rank(policy, ranks):
    expected = {"bf16": [LOST], "fp16": [LOST, UNSCALED], "bf16-mixed": []}.get(policy, ["stochastically, but this"])
    for foreign, ours in ranks.run(2, warned_on_shards, policy):
        assert len(foreign) == len(expected)
        assert all(part in message for part, message in zip(expected, foreign, strict=True))
        assert [UNSCALED in message for message in ours] == ([True] if policy == "fp16" else [])


@pytest.mark.slow
def test_no_import_sets_a_hook():
    code = (
        "import torch, duotone.torch as dt\n"
        "from torch.optim.optimizer import register_optimizer_step_pre_hook as register\n"
        "count = lambda: len(register(lambda *_: None).hooks_dict_ref())\n"
        "cast = lambda: dt.cast(torch.nn.Linear(1, 1), 'bf16')\n"
        "print(count()); cast(); print(count()); cast(); print(count())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # counting registers a hook each time; the first cast registers two, the second none
    assert result.stdout.split() == ["1", "4", "5"]


@pytest.mark.slow
def test_a_model_that_another_process_has_pickled_sets_the_hook(tmp_path):
    torch.save(dt.cast(net(), "bf16"), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "model(torch.ones(1, 3)).sum().backward(); optimizer.step()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert LOST in result.stderr


@pytest.mark.slow
def test_a_compiled_step_is_looked_at(said):
    model = dt.cast(net(), "bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        model(X).sum().backward()
        step()
    assert len(said()) == 1
