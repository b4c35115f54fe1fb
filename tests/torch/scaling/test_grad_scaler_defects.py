"""Where torch.amp.GradScaler goes wrong: each defect shown there, and right in the stand-in."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, LossScaleCollapse, OptimizerError
from duotone.torch.internals.training import takes_scale
from duotone.torch.parameters.shards import local

BOTH = (torch.amp.GradScaler, dt.GradScaler)


def parameter(grad=None, dtype=torch.float32):
    made = nn.Parameter(torch.ones(3, dtype=dtype))
    if grad is not None:
        made.grad = torch.full_like(made, grad)
    return made


def ready(kind, scale=4.0, **settings):
    """Return a scaler that has scaled a loss."""
    scaler = kind("cpu", init_scale=scale, **settings)
    scaler.scale(torch.ones(()))
    return scaler


def collapsed(kind):
    """Let every step overflow, 200 times or until it is warned of; return the scaler."""
    param = parameter()
    optimizer = torch.optim.SGD([param], lr=1.0)
    scaler = ready(kind, 2.0**16)
    for _ in range(200):
        param.grad = torch.full_like(param, math.nan)
        scaler.step(optimizer)
        scaler.update()
    return scaler


def test_the_scale_has_a_floor_and_says_so(recwarn):
    theirs = collapsed(torch.amp.GradScaler)
    assert theirs.get_scale() == 0.0
    assert not recwarn
    with pytest.raises(
        LossScaleCollapse, match=r"2\*\*-126: 1 of 1 gradients are not finite now \(parameter 0 \(3,\)\)"
    ):
        collapsed(dt.GradScaler)
    (warning,) = recwarn
    assert isinstance(warning.message, DuotoneWarning)
    assert "below 1, to 0.5" in str(warning.message)
    assert warning.filename == __file__


def test_after_a_collapse_it_goes_on_if_told_to():
    param = parameter(math.inf)
    optimizer = torch.optim.SGD([param], lr=1.0)
    scaler = ready(dt.GradScaler, 2.0**-125)
    scaler.step(optimizer)
    with pytest.raises(LossScaleCollapse):
        scaler.update()
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == 2.0**-126
    # the scale's inverse is finite, so gradients are
    param.grad = torch.full_like(param, 2.0**-126)
    scaler.step(optimizer)
    scaler.update(2.0**16)
    assert param.tolist() == [0.0] * 3
    assert scaler.get_scale() == 2.0**16


def test_an_odd_backoff_stops_at_the_floor_too():
    for factor in (0.3, 0.0, -1.0):
        scaler = ready(dt.GradScaler, 2.0**-125, backoff_factor=factor)
        scaler.step(torch.optim.SGD([parameter(math.inf)]))
        with pytest.raises(LossScaleCollapse):
            scaler.update()
        assert scaler.get_scale() == 2.0**-126


@pytest.mark.parametrize("backward_at", ["step", "unscale_"])
def test_clipping_before_unscaling_is_clipping_what_is_scaled(backward_at):
    # this one stays: neither scaler sees it
    steps = []
    for kind in BOTH:
        param = parameter(0.1 * 2.0**16)
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler = ready(kind, 2.0**16)
        if backward_at == "unscale_":
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([param], 1.0)
        scaler.step(optimizer)
        steps.append(1.0 - param[0].item())
    assert steps[0] == steps[1]
    assert steps[0] == pytest.approx(0.1 if backward_at == "unscale_" else 0.577 * 2.0**-16, rel=0.2)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [False, True])
def test_float16_weights_without_masters_are_refused_by_fused_optimizers_too(make, fused):
    for kind in BOTH:
        param = parameter(1.0, torch.float16)
        # too small for FP16 beside 1
        optimizer, scaler = make([param], lr=1e-4, fused=fused), ready(kind, 1.0)
        # torch asks FP16 gradients of those alone that do not take the scale out themselves, Adagrad of 2.11 for one
        if takes_scale(optimizer) and kind is torch.amp.GradScaler:
            scaler.step(optimizer)
            assert param.tolist() == [1.0] * 3
            continue
        with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients\.") as caught:
            scaler.step(optimizer)
    assert isinstance(caught.value, OptimizerError)
    assert "use duotone.torch.MasterWeights(optimizer)" in str(caught.value)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_float16_weights_with_masters_keep_small_updates(unscale, wrapped):
    param = parameter(1.0, torch.float16)
    optimizer = dt.MasterWeights(torch.optim.SGD([param], lr=1e-4)) if wrapped else dt.SGD([param], lr=1e-4)
    scaler = ready(dt.GradScaler, 1.0)
    for _ in range(10):
        param.grad = torch.ones_like(param)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert param[0].item() == pytest.approx(0.999, abs=5e-4)


def test_unscaled_float16_gradients_do_not_underflow():
    param = parameter(2.0**-10, torch.float16)
    optimizer, scaler = dt.SGD([param], lr=1.0), ready(dt.GradScaler, 2.0**20)
    scaler.unscale_(optimizer)
    assert param.grad.tolist() == [2.0**-30] * 3
    param.grad.mul_(2.0**20)
    scaler.step(optimizer)
    assert param.tolist() == [1.0 - 2.0**-10] * 3
    scaler.update()
    assert param.grad.dtype == torch.float16
    # an update without a step gives gradients their dtype back, too
    scaler.unscale_(optimizer)
    scaler.update()
    assert param.grad.dtype == torch.float16


@pytest.mark.parametrize("fused", [False, True])
def test_a_closure_is_refused_in_any_place(fused):
    called = []

    def closure():
        called.append(1)

    param = parameter(1.0)
    optimizer = torch.optim.AdamW([param], fused=fused)
    with pytest.raises(RuntimeError, match=r"^Closure use is not currently supported if GradScaler is enabled\.$"):
        ready(dt.GradScaler).step(optimizer, closure)
    assert not called
    assert param.tolist() == [1.0] * 3
    ready(torch.amp.GradScaler).step(optimizer, closure)
    assert called == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_losses_are_scaled_in_float32(dtype, shape):
    loss = torch.full(shape, 3.0, dtype=dtype)
    theirs, ours = (kind("cpu").scale(loss) for kind in BOTH)
    assert theirs.dtype == (torch.float32 if shape == () else dtype)
    assert theirs.isinf().all() == (dtype == torch.float16 and shape != ())
    assert ours.dtype == torch.float32
    assert (ours == 3.0 * 2.0**16).all()
    assert (dt.GradScaler("cpu").scale([loss])[0] == 3.0 * 2.0**16).all()


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}, None])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_iteration_without_gradients_is_one(how, unscale):
    for kind in BOTH:
        param = parameter()
        optimizer = dt.AdamW([param]) if how is None else torch.optim.AdamW([param], **how)
        scaler = ready(kind, growth_interval=2)
        if unscale:
            scaler.unscale_(optimizer)
        if kind is torch.amp.GradScaler:
            if how != {"fused": True}:
                with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
                    scaler.step(optimizer)
                continue
            scaler.step(optimizer)
            with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
                scaler.update()
            continue
        assert scaler.step(optimizer) is None
        with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
            scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale(), scaler._get_growth_tracker()) == (4.0, 0)
        assert param.tolist() == [1.0] * 3
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            scaler.update()


@pytest.mark.parametrize("grad", [1.0, math.inf])
def test_an_optimizer_without_gradients_beside_one_with(grad):
    scaler = ready(dt.GradScaler)
    idle, busy = torch.optim.SGD([parameter()]), torch.optim.SGD([parameter(grad)])
    scaler.step(idle)
    scaler.step(busy)
    scaler.update()
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == ((4.0, 1) if grad == 1.0 else (2.0, 0))


@pytest.mark.usefixtures("poisoned_memory")
def test_a_first_step_that_overflows_leaves_no_momentum_behind():
    for kind in BOTH:
        param = parameter(math.inf)
        optimizer, scaler = torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True), ready(kind)
        for _ in range(2):
            scaler.step(optimizer)
            scaler.update()
            param.grad = torch.ones_like(param)
        if kind is torch.amp.GradScaler:
            assert param.isnan().all()
        else:
            assert param.tolist() == pytest.approx([1.0 - 0.1 / 2] * 3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_only_momentum_to_be_is_waited_for(momentum):
    called = []
    optimizer = torch.optim.SGD([parameter(math.inf)], lr=0.1, momentum=momentum, fused=True)
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scaler = ready(dt.GradScaler)
    scaler.step(optimizer)
    # its kernel skips by itself where it leaves nothing behind
    assert called == ([] if momentum else [1])


def sharded(kind):
    """Return weights, scale and gradients of several optimizers after one rank alone has overflowed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from duotone.torch.distributed.agreement import set_ranks

    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    bad = math.inf if rank == 1 else 4.0

    def dtensor(grad, placement):
        made = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [placement]))
        made.grad = DTensor.from_local(torch.full((3,), grad), mesh, [placement])
        return made

    def plain(grad):
        made = parameter(grad)
        if kind == "duotone":
            set_ranks(made, dist.group.WORLD)
        return made

    cases = {
        # the form that FSDP1 gives its parameters: plain, and another part on each rank
        "plain": lambda: [plain(bad)],
        "sharded": lambda: [dtensor(bad, Shard(0))],
        "replicated and sharded": lambda: [dtensor(4.0, Replicate()), dtensor(bad, Shard(0))],
        "mixed": lambda: [dtensor(bad, Shard(0)), parameter(1.0)],
        "clean": lambda: [dtensor(4.0, Shard(0)), parameter(4.0)],
        "nothing": lambda: [nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Shard(0)]))],
    }
    if kind == "duotone":
        # in torch this rank would wait for ever
        cases["on one rank"] = cases["sharded" if rank == 1 else "nothing"]
    ends = {}
    for name, make in cases.items():
        for how in ("plain", "fused", "duotone"):
            for unscale in (False, True):
                params = make()
                # torch's fused kernels take no mixed group
                groups = [{"params": [param]} for param in params]
                if how == "duotone":
                    optimizer = dt.SGD(groups, lr=0.1)
                else:
                    optimizer = torch.optim.Adam(groups, lr=0.1, eps=0.0, fused=how == "fused")
                made = dt.GradScaler if kind == "duotone" else ShardedGradScaler if name == "plain" else BOTH[0]
                scaler = made("cpu", init_scale=4.0)
                scaler.scale(torch.ones(()))
                try:
                    if unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                except (RuntimeError, AssertionError) as error:
                    ends[name, how, unscale] = str(error)
                    continue
                weights = [local(param)[0].item() for param in params]
                ends[name, how, unscale] = weights, scaler.get_scale(), scaler._get_growth_tracker()
    return ends


def test_ranks_skip_together(ranks):
    theirs, ours = (ranks.run(2, sharded, kind) for kind in ("torch", "duotone"))
    # one rank steps, the other does not
    assert theirs[0]["plain", "fused", False] != theirs[1]["plain", "fused", False]
    assert theirs[0]["replicated and sharded", "fused", False] != theirs[1]["replicated and sharded", "fused", False]
    assert "got mixed torch.Tensor and DTensor" in theirs[0]["mixed", "plain", True]
    assert "No inf checks" in theirs[0]["nothing", "plain", False]
    assert ours[0] == ours[1]
    for (name, how, unscale), (weights, scale, tracker) in ours[0].items():
        if name == "nothing":
            expected = [1.0], 4.0, 0
        elif name == "clean":
            expected = [pytest.approx(0.9)] * 2, 4.0, 1
        else:
            expected = [1.0] * len(weights), 2.0, 0
        assert (weights, scale, tracker) == expected, (name, how, unscale)
