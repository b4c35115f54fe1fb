"""What happens on an accelerator, on a CPU: the same states and learning rates, one step later, and no waiting."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import duotone.torch as dt
from duotone.torch.scaling import device_scale

from .settled import settled

# each letter is a step: o overflows, n has a loss that is not finite, e has no gradient at all
RUNS = ["....", "o..o", "oo.o.o..", "n.", ".nn..o", "e.e", "oe.", ".oeo..", "ono.n.."]


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that has scalers treat every device as one that is to be waited for, or as it is."""
    true = device_scale.is_on_host

    def choose(on_device):
        monkeypatch.setattr(device_scale, "is_on_host", (lambda device: False) if on_device else true)

    return choose


def recording(kind):
    """Return a kind of optimizer that writes down with which learning rate each of its updates was called."""

    class Recording(kind):
        def step(self, *arguments, **settings):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **settings)

    rates = []
    return Recording, rates


def run(steps, kind, policy="fp16-mixed", **settings):
    """Return weights, states after each step, learning rates at each update, and the reports, of a run."""
    kind, rates = recording(kind)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = dt.LossScaler(policy, **settings)
    states, reports = [], []
    for step in steps:
        factor = {"o": 3e38, "n": math.nan}.get(step, 1.0)
        if step == "e":
            scaler.scale(torch.ones(()))
        else:
            for _ in range(2):
                scaler.backward(model(torch.randn(4, 3)).square().mean() * factor)
        report = scaler.step(optimizer, scheduler=scheduler, clip_norm=1.0)
        optimizer.zero_grad()
        # not state_dict, which would have the scheduler advance now
        leaves = vars(scaler._scale.state).values()
        states.append([torch.as_tensor(leaf).item() for leaf in leaves])
        reports.append([float(value) for value in (report.skipped, report.grad_norm, report.loss_scale)])
    scaler.drain()
    rates.append(optimizer.param_groups[0]["lr"])
    weights = [param.tolist() for param in model.parameters()]
    return weights, states, rates, repr(reports), scaler.state_dict()


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("steps", RUNS)
@pytest.mark.parametrize("kind", [dt.AdamW, torch.optim.SGD])
def test_both_ways_lead_to_the_same(steps, kind, pretend):
    runs = []
    for on_device in (False, True):
        pretend(on_device)
        runs.append(run(steps, kind, hysteresis=2, growth_interval=2))
    assert runs[0] == runs[1]


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("policy", ["bf16-mixed", "fp16-mixed,loss_scale=8"])
def test_both_ways_lead_to_the_same_where_the_scale_stands_still(policy, pretend):
    runs = []
    for on_device in (False, True):
        pretend(on_device)
        runs.append(run(".on.", dt.SGD, policy))
    assert runs[0] == runs[1]


def test_saving_drains_the_last_step(pretend):
    pretend(True)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=1.0), dt.LossScaler("fp16")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for drain in (lambda: None, scaler.drain, scaler.state_dict, lambda: copy.deepcopy(scaler), lambda: None):
        scaler.backward(parameter.sum())
        scaler.step(optimizer, scheduler=scheduler)
        drain()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.25, 0.125, 0.0625, 0.0625]


def test_a_state_moves_between_host_and_device(pretend):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), settled(dt.LossScaler("fp16"))
    for on_device in (False, True, False, True):
        pretend(on_device)
        scaler.backward(parameter.sum() * 3e38)
        scaler.step(optimizer)
        assert isinstance(scaler._scale.state.scale, torch.Tensor) == on_device
    assert (scaler.loss_scale.item(), scaler.loss_scale.dtype) == (2.0**12, torch.float32)
    assert (scaler.skipped.item(), scaler.skipped.dtype) == (4, torch.int32)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("policy", ["fp16-mixed", "fp16-mixed,loss_scale=8"])
def test_the_state_on_a_device_stays_where_it_is(pretend, policy):
    # a captured CUDA graph reads and writes the same memory in every replay
    pretend(True)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler(policy)
    addresses, scales, reports, copies = [], [], [], []
    for factor in (3e38, 3e38, 1.0, 1.0):
        scaler.backward(parameter.sum() * factor)
        scales.append(scaler.loss_scale)
        reports.append(scaler.step(optimizer))
        optimizer.zero_grad()
        leaves = vars(scaler._scale.state)
        addresses.append([leaves[name].data_ptr() for name in ("scale", "growth_tracker", "skipped_in_a_row")])
        copies.append(copy.copy(scaler))
    assert all(each == addresses[0] for each in addresses)
    # what was given out is as it was then
    expected = [8.0] * 4 if "loss_scale" in policy else [2.0**16, 1.0, 4.0, 16.0]
    assert [scale.item() for scale in scales] == [report.loss_scale.item() for report in reports] == expected
    assert [each.loss_scale.item() for each in copies] == [*expected[1:], 8.0 if "loss_scale" in policy else 64.0]


def test_a_loss_that_is_taken_backward_after_a_step_has_the_scale_of_then(pretend):
    grads = []
    for on_device in (False, True):
        pretend(on_device)
        first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        scaler = settled(dt.LossScaler("fp16"))
        scaler.backward(first.sum() * 3e38)
        later = scaler.scale(second.sum())
        scaler.step(dt.SGD([first], lr=0.0))
        later.backward()
        grads.append(second.grad.item())
    # on a device, of the scale that the next step takes out
    assert grads == [2.0**16, 2.0**15]


class NoWaiting(TorchDispatchMode):
    """Raises where the host would read a value of the device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Raises where Python asks a tensor for its value: on a CPU some of that does not reach the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["fp16", "bf16", "fp16,loss_scale=8"])
@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_step_waits_for_nothing_but_what_was_sent_one_step_ago(policy, overflows, pretend, monkeypatch):
    pretend(True)
    # what kernels do in between has tests of its own
    monkeypatch.setattr(dt.SGD, "step", lambda self, **scalars: None)
    model = dt.cast(nn.Linear(3, 2), policy)
    optimizers = [dt.SGD([param], lr=0.5) for param in model.parameters()]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    scaler, flag = dt.LossScaler(policy), torch.tensor(overflows)
    stats = torch.ones((), dtype=torch.float64), flag
    monkeypatch.setattr("duotone.torch.kernels.grad_stats", lambda *arguments: stats)
    received = []

    def waiting_is_fine_in(readback, values):
        receive = readback.receive

        def waiting_is_fine_here():
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                values.append(receive())
            return values[-1]

        monkeypatch.setattr(readback, "receive", waiting_is_fine_here)

    waiting_is_fine_in(scaler._monitor._readback, received)
    waiting_is_fine_in(scaler._loop._readback, [])
    data = torch.randn(4, 3)
    scaler.scale(torch.ones(()))
    with NoReading(), NoWaiting():
        for ahead in (False, True, False):
            for _ in range(2):
                scaler.backward(model(data).mean())
            if ahead:
                scaler.unscale_(optimizers[0])
            report = scaler.step(*optimizers, scheduler=schedulers)
    assert report.skipped.item() == overflows
    assert [values is None for values in received] == [True, False, False]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == ([0.5] * 2 if overflows else [0.125] * 2)
    with pytest.raises(AssertionError, match="item"), NoReading():
        flag.item()
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        bool(flag)


@pytest.mark.parametrize("make", [lambda: dt.LossScaler("fp16", init_scale=8), lambda: dt.GradScaler("cpu", 8.0)])
def test_a_loss_of_an_evaluation_leaves_a_scale_to_train_with(pretend, make):
    pretend(True)
    scaler, parameter = make(), nn.Parameter(torch.ones(1))
    with torch.inference_mode():
        assert scaler.scale(parameter.sum()).item() == 8.0
    scaler.scale(parameter.sum()).backward()
    assert parameter.grad.item() == 8.0


@pytest.mark.parametrize("on_device", [False, True])
def test_a_search_goes_on_from_a_state_dict_and_there_is_none_in_those_of_earlier_versions(pretend, on_device):
    pretend(on_device)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16")
    scales = []
    for step in "o...o.":
        scaler.backward(parameter.sum() * (3e38 if step == "o" else 1.0))
        scaler.step(optimizer)
        optimizer.zero_grad()
        scales.append(scaler.loss_scale.item())
        packed = scaler.state_dict()
        scaler = dt.LossScaler("fp16")
        scaler.load_state_dict(packed)
    assert scales == [1, 4, 16, 64, 16, 16]
    earlier = {name: value for name, value in dt.LossScaler("fp16").state_dict()["state"].items() if name != "search"}
    scaler.load_state_dict({**packed, "state": earlier})
    scaler.backward(parameter.sum() * 3e38)
    scaler.step(optimizer)
    assert scaler.loss_scale.item() == 2.0**15


def test_once_the_host_knows_that_the_scale_is_settled_the_device_computes_no_search(pretend):
    pretend(True)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16")
    kinds = []
    for _ in range(4):
        scaler.backward(parameter.sum())
        scaler.step(optimizer)
        kinds.append(type(scaler._scale.state.search))
    # what the first step did is known when the second begins
    assert kinds == [torch.Tensor, int, int, int]
