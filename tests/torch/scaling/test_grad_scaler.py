"""The stand-in for torch.amp.GradScaler: one interface, the same errors, and what torch's own tests of it assert."""

import copy
import inspect
import math
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleError
from duotone.torch.scaling import grad_scaler
from duotone.torch.scaling.scale_alarm import CEILING, FLOOR

SCALERS = pytest.mark.parametrize("kind", [torch.amp.GradScaler, dt.GradScaler], ids=["torch", "duotone"])
PUBLIC = sorted(name for name in vars(torch.amp.GradScaler) if not name.startswith("_"))


def parameter(value=1.0, dtype=torch.float32, grad=None):
    made = nn.Parameter(torch.full((3,), value, dtype=dtype))
    if grad is not None:
        made.grad = torch.full_like(made, grad)
    return made


def ready(kind=dt.GradScaler, **settings):
    """Return a scaler that has scaled a loss."""
    scaler = kind("cpu", **{"init_scale": 4.0, **settings})
    scaler.scale(torch.ones(()))
    return scaler


def sgd(grad=4.0, **settings):
    return torch.optim.SGD([parameter(grad=grad)], lr=1.0, **settings)


def weight_of(optimizer):
    return optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize("name", ["__init__", *PUBLIC])
def test_every_method_takes_what_torchs_takes(name):
    theirs, ours = (inspect.signature(getattr(kind, name)).parameters for kind in (torch.amp.GradScaler, dt.GradScaler))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_it_is_one_of_torchs():
    scaler = ready()
    assert isinstance(scaler, torch.amp.GradScaler)
    fresh = torch.amp.GradScaler("cpu")
    for name in vars(fresh):
        assert hasattr(scaler, name), name
    assert scaler._get_scale_async() is scaler._scale
    assert scaler._per_optimizer_states["another"] == fresh._per_optimizer_states["another"]


# what goes wrong, as a function of a kind of scaler; in both kinds it has to go wrong in the same way
MISUSES = {
    "growth": lambda kind: kind("cpu", growth_factor=1.0),
    "backoff": lambda kind: kind("cpu", backoff_factor=1.0),
    "no tensor": lambda kind: kind("cpu").scale(1.0),
    "no tensor in a list": lambda kind: kind("cpu").scale([torch.ones(1), (2.0,)]),
    "step first": lambda kind: kind("cpu").step(sgd()),
    "update first": lambda kind: kind("cpu").update(),
    "set first": lambda kind: kind("cpu").update(2.0),
    "unscale first": lambda kind: kind("cpu").unscale_(sgd()),
    "check first": lambda kind: kind("cpu")._check_inf_per_device(sgd()),
    "no step": lambda kind: ready(kind).update(),
    "closure": lambda kind: ready(kind).step(sgd(), closure=lambda: 0.0),
    "closure None": lambda kind: ready(kind).step(sgd(), closure=None),
    "empty state": lambda kind: kind("cpu").load_state_dict({}),
    "two elements": lambda kind: ready(kind).update(torch.ones(2)),
    "wants a gradient": lambda kind: ready(kind).update(torch.ones((), requires_grad=True)),
    "elsewhere": lambda kind: ready(kind).update(torch.ones((), device="meta")),
    "half": lambda kind: ready(kind).unscale_(torch.optim.SGD([parameter(dtype=torch.half, grad=1.0)])),
    "keys": lambda kind: kind("cpu").load_state_dict({"scale": 1.0}),
}


def twice(method):
    def misuse(kind):
        scaler, optimizer = ready(kind), sgd()
        getattr(scaler, method[0])(optimizer)
        getattr(scaler, method[1])(optimizer)

    return misuse


def in_mid_iteration(copies):
    def misuse(kind):
        scaler = ready(kind)
        scaler.unscale_(sgd())
        copies(scaler)

    return misuse


MISUSES |= {
    "unscale twice": twice(["unscale_", "unscale_"]),
    "step twice": twice(["step", "step"]),
    "unscale after step": twice(["step", "unscale_"]),
    "pickle": in_mid_iteration(pickle.dumps),
    "deepcopy": in_mid_iteration(copy.deepcopy),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_refused_as_in_torch(misuse):
    with pytest.raises((AssertionError, RuntimeError, ValueError, KeyError)) as theirs:
        MISUSES[misuse](torch.amp.GradScaler)
    with pytest.raises(theirs.type) as ours:
        MISUSES[misuse](dt.GradScaler)
    assert str(ours.value).startswith(str(theirs.value))


@SCALERS
def test_without_cuda_it_disables_itself_and_says_where(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: True)
    with pytest.warns(UserWarning, match="CUDA is not available") as caught:
        scaler = kind()
    (warning,) = caught
    assert warning.filename == __file__
    assert not scaler.is_enabled()
    assert not pickle.loads(pickle.dumps(scaler)).is_enabled()


def test_the_device_comes_first():
    with pytest.raises(LossScaleError, match=r'the first argument is 1024.0, .*write GradScaler\("cuda", 1024.0\)'):
        dt.GradScaler(1024.0)  # type: ignore[arg-type]
    scaler = ready(lambda device, **settings: dt.GradScaler(torch.device("cpu", 0), **settings))
    scaler.update(torch.tensor(8.0))
    assert scaler.get_scale() == 8.0


@SCALERS
def test_disabled_it_stands_aside(kind):
    scaler = kind("cpu", init_scale=8.0, enabled=False)
    loss, optimizer = torch.ones(1), sgd(grad=math.inf)
    assert scaler.scale(loss) is loss
    assert scaler.scale("anything") == "anything"
    scaler.unscale_(optimizer)
    assert scaler.step(optimizer, lambda: 7.0) == 7.0
    assert weight_of(optimizer).isinf().all()
    scaler.update()
    scaler.load_state_dict({})
    assert (scaler.get_scale(), scaler._get_growth_tracker(), scaler.state_dict()) == (1.0, 0, {})
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == {}


@SCALERS
def test_losses_in_lists_tuples_and_iterables(kind):
    scaler = kind("cpu", init_scale=2.0)
    fours = torch.full((1,), 4.0)
    nested = scaler.scale((fours, (fours, fours), [fours, (fours, fours)]))
    assert nested == (8.0, (8.0, 8.0), [8.0, (8.0, 8.0)])
    lazy = scaler.scale(loss for loss in [fours, fours])
    assert not isinstance(lazy, list | tuple)
    assert list(lazy) == [8.0, 8.0]
    assert scaler.scale([]) == []
    assert scaler.scale(torch.tensor(2)).dtype == torch.float32
    assert scaler.scale(torch.tensor(0.1, dtype=torch.float64)).item() == 0.2
    assert scaler._scale.device == fours.device
    # another device has a scale of its own
    there = fours.to("meta")
    assert [loss.device.type for loss in scaler.scale([fours, there, there])] == ["cpu", "meta", "meta"]


def test_a_word_is_no_iterable_of_losses():
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        dt.GradScaler("cpu").scale("loss")  # type: ignore[call-overload]


@SCALERS
def test_losses_that_were_scaled_together_may_go_backward_after_an_update(kind):
    scaler, param = kind("cpu", init_scale=2.0, growth_interval=1), parameter()
    alone, (together,) = scaler.scale(param.sum()), scaler.scale([param.sum()])
    scaler.step(sgd())
    scaler.update()
    together.backward()
    assert param.grad.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alone.backward()


@SCALERS
@pytest.mark.parametrize("is_begun", [False, True])
def test_states_go_to_and_from_torch(kind, is_begun):
    other = {torch.amp.GradScaler: dt.GradScaler, dt.GradScaler: torch.amp.GradScaler}[kind]
    saved = kind("cpu", init_scale=3.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=5)
    saved.scale(torch.ones(()))
    for _ in range(2):
        saved.step(sgd())
        saved.update()
    loaded = other("cpu", init_scale=6.0, growth_factor=7.0, backoff_factor=0.8, growth_interval=1)
    loaded._init_growth_tracker = 7
    if is_begun:
        loaded.scale(torch.ones(()))
    state = saved.state_dict()
    assert state == {
        "scale": 3.0,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "growth_interval": 5,
        "_growth_tracker": 2,
    }
    loaded.load_state_dict(state)
    assert loaded.state_dict() == state
    assert loaded._init_growth_tracker == 2
    loaded.scale(torch.ones(()))
    for _ in range(3):
        loaded.step(sgd())
        loaded.update()
    assert loaded.get_scale() == 12.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies_begin_where_the_original_stands(copied):
    scaler = ready(growth_interval=3)
    scaler.step(sgd())
    scaler.update()
    scaler.set_growth_factor(8.0)
    scaler.set_backoff_factor(0.125)
    scaler.set_growth_interval(2)
    other = copied(scaler)
    assert other.state_dict() == scaler.state_dict()
    assert (other.get_growth_factor(), other.get_backoff_factor(), other.get_growth_interval()) == (8.0, 0.125, 2)
    other.scale(torch.ones(()))
    other.step(sgd())
    other.update()
    assert (other.get_scale(), scaler.get_scale()) == (32.0, 4.0)
    assert other._per_optimizer_states["another"]["found_inf_per_device"] == {}


@SCALERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
def test_gradients_of_any_dtype_and_layout_are_unscaled_and_checked(kind, dtype, bad):
    layouts = [
        torch.full((20, 20), 4.0, dtype=dtype),
        torch.full((20, 20), 4.0, dtype=dtype)[:, :5],
        torch.full((20, 5), 4.0, dtype=dtype).t(),
        torch.empty((0, 3), dtype=dtype),
        torch.full((), 4.0, dtype=dtype),
    ]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in layouts]
    for param, grad in zip(params, layouts, strict=True):
        param.grad = grad
    if bad is not None:
        layouts[1][19, 3] = bad
    scaler = ready(kind)
    quarter, zero = torch.full((1,), 0.25), torch.zeros(1)
    found = scaler._unscale_grads_(torch.optim.SGD(params), quarter, zero, True)
    assert {device: flag.item() for device, flag in found.items()} == {torch.device("cpu"): float(bad is not None)}
    assert zero == 0.0
    if bad is None:
        assert all((grad == 1.0).all() for grad in layouts)


@SCALERS
def test_sparse_gradients(kind):
    scaler = ready(kind)
    flags = []
    for values, dtype in [
        ([16.0, 32.0, 64.0], torch.float32),
        ([16.0, math.inf, 64.0], torch.float32),
        ([math.nan, 32.0, 64.0], torch.float32),
        ([16.0, 32.0, 64.0], torch.float16),
        # each is finite, their sum in one element is not
        ([64000.0, 32.0, 64000.0], torch.float16),
    ]:
        param = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        param.grad = torch.sparse_coo_tensor([[0, 1, 0], [2, 0, 2]], values, (2, 3), dtype=dtype)
        optimizer = torch.optim.SGD([param], lr=1.0)
        (found,) = scaler._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True).values()
        flags.append(found.item())
        if not found:
            assert param.grad.to_dense().tolist() == [[0, 0, 20], [8, 0, 0]]
    assert flags == [0, 1, 1, 0, 1]


@SCALERS
def test_a_gradient_that_asks_for_gradients_itself(kind):
    scaler, optimizer = ready(kind), sgd()
    weight_of(optimizer).grad = torch.full((3,), 4.0, requires_grad=True)
    scaler.unscale_(optimizer)
    assert weight_of(optimizer).grad.tolist() == [1.0] * 3


@SCALERS
def test_what_others_look_at_between_the_calls(kind):
    scaler, clean, bad = ready(kind), sgd(), sgd(grad=math.nan)
    assert scaler._found_inf_per_device(clean) == {}
    scaler.unscale_(clean)
    scaler._check_inf_per_device(bad)
    flags = [scaler._found_inf_per_device(optimizer) for optimizer in (clean, bad)]
    assert [sum(flag.item() for flag in each.values()) for each in flags] == [0.0, 1.0]
    assert weight_of(clean).grad[0] == 1.0
    scaler.step(clean)
    scaler.step(bad)
    scaler.update()
    assert scaler._found_inf_per_device(bad) == {}
    assert (weight_of(clean)[0].item(), weight_of(bad)[0].item(), scaler.get_scale()) == (0.0, 1.0, 2.0)


@pytest.mark.parametrize("given", [16.0, 16, torch.tensor(16.0), torch.tensor([16.0])])
def test_a_scale_of_ones_own(given):
    scaler = ready(growth_interval=2)
    scaler.step(sgd())
    scaler.update(given)
    if isinstance(given, torch.Tensor):
        given.fill_(3.0)
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (16.0, 0)
    scaler.step(sgd())
    scaler.update()
    assert scaler._get_growth_tracker() == 1


@SCALERS
def test_the_scale_does_not_grow_beyond_fp32(kind):
    scaler = ready(kind, init_scale=1e38, growth_factor=2.0**4, growth_interval=1)
    scaler.step(sgd())
    scaler.update()
    assert math.isfinite(scaler.get_scale())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, 2.0**-127, 1e39])
def test_scales_that_are_none(scale):
    said = "a loss scale is a number from 2"
    with pytest.raises(LossScaleError, match=re.escape(f"init_scale is {scale}, but {said}")):
        dt.GradScaler("cpu", init_scale=scale)
    scaler = ready()
    for given in (scale, torch.tensor(scale, dtype=torch.float64)):
        with pytest.raises(LossScaleError, match=f"new_scale is .*, but {said}"):
            scaler.update(given)
    with pytest.raises(LossScaleError, match=re.escape(f"the scale in the state is {scale}, but {said}")):
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "growth_interval": 7})
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (4.0, 2000)


def test_a_scale_that_is_not_read_is_brought_into_range(monkeypatch):
    monkeypatch.setattr(grad_scaler, "check_scale", lambda name, value: value)
    scaler = ready()
    ends = {0.0: FLOOR, -8.0: FLOOR, math.nan: FLOOR, -math.inf: FLOOR, math.inf: CEILING, 8.0: 8.0}
    for given, expected in ends.items():
        scaler.update(torch.tensor(given))
        assert scaler.get_scale() == expected


def test_scales_below_one_and_others_are_allowed_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (2.0**-126, 0.3, 1000.0):
            scaler = ready(init_scale=scale)
            scaler.step(sgd())
            scaler.update()
            assert scaler.get_scale() == torch.tensor(scale).item()
