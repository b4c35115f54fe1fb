"""MasterWeights: bit for bit the wrapped optimizer on FP32 weights; skips, failures and refusals leave no trace."""

import copy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.internals.training import takes_scale
from duotone.torch.kernels import Rounding
from duotone.torch.parameters.masters import ensure_tail, read_master, write_master
from duotone.torch.parameters.storage import Storage, set_storage, storage_of

from .bits import bits_of, everything_of
from .other_optimizers import FUSED, KINDS, Failing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ((5, 7), (), (33,), (2, 3, 4))
SKIP, GO = torch.tensor(True), torch.tensor(False)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_weights(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    """Return parameters that always have the same masters, 1 to 2 in size, which FP16 and its tail hold exactly."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in shapes:
        drawn = torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)
        weight = nn.Parameter((drawn + drawn.sign()).to(dtype))
        if dtype != torch.float32:
            ensure_tail(weight)
            write_master(weight, drawn + drawn.sign())
        weights.append(weight)
    return weights


def states_of(optimizer: torch.optim.Optimizer) -> Any:
    states = optimizer.state_dict()["state"]
    without_tails = {index: {k: v for k, v in states[index].items() if k != "tail"} for index in states}
    return bits_of({index: state for index, state in without_tails.items() if state})


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_optimizer_on_float32_weights(give_gradients, same_bits, kind, dtype):
    wide, narrow = make_weights(torch.float32), make_weights(dtype)
    addresses = [(weight.data_ptr(), ensure_address(weight)) for weight in narrow]
    reference, optimizer = KINDS[kind](wide), dt.MasterWeights(KINDS[kind](narrow))
    multiplier = torch.tensor(0.3 * 2.0**-8)
    for step in range(30):
        give_gradients(narrow, step)
        for one, other in zip(wide, narrow, strict=True):
            one.grad = other.grad.float() * multiplier
        # torch's fused SGD cannot begin with some of its momenta only
        if step in (0, 7) and kind != "SGD fused":
            wide[0].grad = narrow[0].grad = None
        grads = [weight.grad for weight in narrow]
        before = bits_of(grads)
        reference.step()
        optimizer.step(grad_multiplier=multiplier, found_inf=GO)
        assert all(same_bits(one, read_master(other)) for one, other in zip(wide, narrow, strict=True))
        assert all(weight.grad is grad for weight, grad in zip(narrow, grads, strict=True))
        assert bits_of(grads) == before
    assert states_of(optimizer) == states_of(reference)
    assert not any(torch.equal(one, other) for one, other in zip(wide, make_weights(torch.float32), strict=True))
    assert [(weight.data_ptr(), ensure_address(weight)) for weight in narrow] == addresses
    assert {weight.dtype for weight in narrow} == {dtype}


def ensure_address(weight: Tensor) -> int | None:
    tail = storage_of(weight).tail
    return None if tail is None else tail.data_ptr()


def test_without_a_multiplier_it_is_one(give_gradients, same_bits):
    first, second = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    optimizers = [dt.MasterWeights(KINDS["NAdam"](weights)) for weights in (first, second)]
    for step in range(3):
        give_gradients(first, step)
        give_gradients(second, step)
        optimizers[0].step()
        optimizers[1].step(grad_multiplier=torch.ones(()))
    assert all(same_bits(read_master(one), read_master(other)) for one, other in zip(first, second, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_might_as_well_not_have_been(train, kind, dtype, value):
    skipping, other = (dt.MasterWeights(KINDS[kind](make_weights(dtype))) for _ in range(2))

    def skip(times: int) -> None:
        for _ in range(times):
            before = everything_of(skipping)
            for weight in skipping.param_groups[0]["params"]:
                weight.grad = torch.full_like(weight, value)
            skipping.step(grad_multiplier=torch.ones(()), found_inf=SKIP)
            assert everything_of(skipping) == before

    states = len(skipping.state)
    skip(2)
    assert len(skipping.state) == states
    for steps in (range(2), range(2, 4)):
        for optimizer in (skipping, other):
            train(optimizer, steps, grad_multiplier=torch.tensor(0.5), found_inf=GO)
        skip(2)
    assert everything_of(skipping) == everything_of(other)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("found_inf", [SKIP, GO])
def test_a_fused_optimizer_does_not_wait_for_the_device(train, monkeypatch, kind, found_inf):
    optimizer = dt.MasterWeights(KINDS[kind](make_weights(torch.bfloat16)))
    if not takes_scale(optimizer.optimizer):
        pytest.skip(f"{kind} of torch {torch.__version__} does not skip on the device: Adagrad of 2.11")
    train(optimizer, range(1), found_inf=GO)

    def waiting(tensor: Tensor) -> bool:
        raise AssertionError("the host looked at a tensor")

    before = everything_of(optimizer)
    with monkeypatch.context() as patched:
        for name in ("__bool__", "__float__", "__int__", "item"):
            patched.setattr(Tensor, name, waiting)
        train(optimizer, range(1, 2), grad_multiplier=torch.tensor(0.5), found_inf=found_inf)
    assert (everything_of(optimizer) == before) == found_inf.item()
    assert not hasattr(optimizer.optimizer, "found_inf")
    assert not hasattr(optimizer.optimizer, "grad_scale")


@pytest.mark.parametrize("kind", FUSED)
def test_a_skip_on_the_device_leaves_edited_weights_alone(train, kind):
    weight = make_weights(torch.bfloat16, ((33,),))[0]
    optimizer = dt.MasterWeights(KINDS[kind]([weight]))
    train(optimizer, range(2), found_inf=GO)
    # such a weight is not what its tail was made for
    weight.data[::2] = 0.0
    before = everything_of(optimizer)
    train(optimizer, range(2, 3), found_inf=SKIP)
    assert everything_of(optimizer) == before


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_optimizer_that_is_told_not_to_be_still_skips(train, kind):
    optimizer = dt.MasterWeights(KINDS[kind](make_weights(torch.bfloat16)))
    train(optimizer, range(1), found_inf=GO)
    # as loading the state of one that is not fused would
    optimizer.param_groups[0]["fused"] = False
    before = everything_of(optimizer)
    train(optimizer, range(1, 2), found_inf=SKIP)
    assert everything_of(optimizer) == before
    train(optimizer, range(1, 2), found_inf=GO)
    assert everything_of(optimizer) != before


def test_one_optimizer_takes_every_dtype(give_gradients, same_bits):
    mixed, alone = ([make_weights(dtype) for dtype in DTYPES] for _ in range(2))
    together = dt.MasterWeights(torch.optim.NAdam([{"params": weights} for weights in mixed], lr=1e-3))
    optimizers = [dt.MasterWeights(torch.optim.NAdam(weights, lr=1e-3)) for weights in alone]
    for step in range(5):
        for weights in (*mixed, *alone):
            give_gradients(weights, step)
        for optimizer in (together, *optimizers):
            optimizer.step()
    for one, other in zip(chain(*mixed), chain(*alone), strict=True):
        assert same_bits(read_master(one), read_master(other))


@pytest.mark.parametrize("kind", ["NAdam", "Adam fused", "Adafactor", "Recent"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(train, same_bits, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    square, image = (torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 5), (2, 3, 4, 5)))
    plain = [square.t().contiguous(), image.clone(), square[:, 0].clone()]
    strided = [square.t(), image.contiguous(memory_format=torch.channels_last), square.clone()[:, 0]]
    assert not any(tensor.is_contiguous() for tensor in strided)
    plain, strided = ([nn.Parameter(tensor) for tensor in tensors] for tensors in (plain, strided))
    strides = [weight.stride() for weight in strided]
    for weights in (plain, strided):
        train(dt.MasterWeights(KINDS[kind](weights)), range(3))
    for one, other in zip(plain, strided, strict=True):
        # sums over another layout, as in Adafactor, may differ in their last bit
        same = torch.allclose if kind == "Adafactor" else same_bits
        assert same(read_master(one), read_master(other))
    assert [weight.stride() for weight in strided] == strides


@pytest.mark.parametrize("kind", ["NAdam", "Adam fused", "SGD", "Recent"])
def test_empty_weights_and_empty_steps_are_fine(train, kind):
    weights = make_weights(torch.bfloat16, ((0, 3), (2,)))
    optimizer = dt.MasterWeights(KINDS[kind](weights))
    optimizer.step()
    optimizer.step(found_inf=SKIP)
    train(optimizer, range(2), found_inf=GO)
    assert weights[0].shape == (0, 3)
    before = [read_master(weight) for weight in weights]
    optimizer.zero_grad()
    optimizer.step(found_inf=GO)
    assert all(torch.equal(a, read_master(b)) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_that_of_our_own_optimizers(train, same_bits, layout, dtype):
    def make() -> list[nn.Parameter]:
        weights = [torch.ones(20, 30, dtype=dtype), torch.ones(7, 3, dtype=dtype)]
        made = [nn.Parameter(weight.t() if layout == "transposed" else weight) for weight in weights]
        for weight in made:
            set_storage(weight, Storage(rounding=Rounding.STOCHASTIC))
        return made

    def run(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        train(optimizer, range(2), found_inf=GO)
        train(optimizer, range(2, 4), found_inf=SKIP)
        train(optimizer, range(4, 8), found_inf=GO)
        return [param.detach() for param in optimizer.param_groups[0]["params"]]

    expected = run(dt.SGD(make(), lr=2.0**-9, seed=3))
    for fused in (False, True):
        wrapped = dt.MasterWeights(torch.optim.SGD(make(), lr=2.0**-9, fused=fused), seed=3)
        assert all(same_bits(a, b) for a, b in zip(run(wrapped), expected, strict=True))
    other = run(dt.MasterWeights(torch.optim.SGD(make(), lr=2.0**-9), seed=4))
    assert not torch.equal(other[0], expected[0])


def test_named_plain_rounding_rounds_to_nearest(train, same_bits):
    weight, wide = nn.Parameter(torch.ones(50, dtype=torch.bfloat16)), nn.Parameter(torch.ones(50))
    set_storage(weight, Storage(rounding=Rounding.NEAREST))
    train(dt.MasterWeights(torch.optim.SGD([weight], lr=0.1)), range(1))
    train(torch.optim.SGD([wide], lr=0.1), range(1))
    assert same_bits(weight, wide.bfloat16())
    assert storage_of(weight).tail is None


def test_freezing_is_followed(train, same_bits):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    dt.cast(model, "bf16")
    whole = nn.Parameter(model.weight.detach().float())
    optimizer = dt.MasterWeights(torch.optim.NAdam(model.parameters()))
    train(optimizer, range(2))
    assert same_bits(model.weight.float(), whole)
    assert storage_of(model.weight).tail is None
    model.weight.requires_grad_(True)
    model.bias.requires_grad_(False)
    model.bias.grad, bias = None, read_master(model.bias)
    train(optimizer, range(5))
    train(torch.optim.NAdam([whole]), range(5))
    assert same_bits(read_master(model.weight), whole)
    assert same_bits(read_master(model.bias), bias)


def test_a_cast_after_it_was_built_is_followed(train, same_bits):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = copy.deepcopy(model)
    optimizer, plain = (
        dt.MasterWeights(torch.optim.NAdam(model.parameters())),
        torch.optim.NAdam(reference.parameters()),
    )
    for policy in ("bf16", "fp32", "bf16"):
        dt.cast(model, policy)
        for each in (optimizer, plain):
            train(each, range(3))
    assert same_bits(dt.master_weights(model, optimizer)["weight"], reference.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_failing_optimizer_takes_nothing_along(give_gradients, dtype):
    weights = make_weights(dtype)
    optimizer = dt.MasterWeights(Failing(weights, lr=0.1, momentum=0.9))
    give_gradients(weights, 0)
    grads = [weight.grad for weight in weights]
    before = bits_of([grads, [ensure_address(weight) for weight in weights]])
    masters = [read_master(weight) for weight in weights]
    with pytest.raises(ArithmeticError, match="failed on purpose"):
        optimizer.step(grad_multiplier=torch.tensor(0.5))
    assert bits_of([grads, [ensure_address(weight) for weight in weights]]) == before
    assert all(weight.grad is grad for weight, grad in zip(weights, grads, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], weights, strict=True))
    assert all(a is b for a, b in zip(optimizer.state, weights, strict=True))
    if dtype != torch.float32:
        assert all(torch.equal(a, read_master(b)) for a, b in zip(masters, weights, strict=True))


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["NAdam", "Unseen"])
def test_a_backward_through_changed_weights_raises(kind, policy):
    model = dt.cast(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)), policy)
    optimizer = dt.MasterWeights(KINDS[kind](model.parameters()))
    losses = [model(torch.ones(1, 2)).sum() for _ in range(3)]
    losses[0].backward()
    optimizer.step(found_inf=SKIP)
    losses[1].backward()
    optimizer.step(found_inf=GO)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[2].backward()


def test_what_ddp_attached_to_a_parameter_stays(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = dt.cast(nn.Linear(2, 1), "bf16")
        wrapped = nn.parallel.DistributedDataParallel(model)
        reduced: list[int] = []

        def note(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            reduced.append(1)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, note)
        optimizer = dt.MasterWeights(torch.optim.NAdam(model.parameters()))
        for step in range(3):
            wrapped(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            assert len(reduced) == step + 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("on_the_wrapped", [True, False])
def test_a_scheduler_may_be_built_on_either(on_the_wrapped, recwarn):
    weight = nn.Parameter(torch.ones(1))
    optimizer = dt.MasterWeights(torch.optim.NAdam([weight], lr=1.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer if on_the_wrapped else optimizer, 0.5)
    scaler, rates = dt.LossScaler("fp16"), []
    for value in (torch.inf, 1.0, torch.nan, 1.0):
        weight.grad = torch.tensor([value])
        scaler.scale(torch.ones(()))
        assert scaler.step(optimizer, clip_norm=1.0, scheduler=scheduler).skipped.item() == (value != 1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.5, 0.5, 0.25]
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_closure_is_called_once_before_the_step():
    weight = nn.Parameter(torch.ones(2))
    optimizer, called = dt.MasterWeights(torch.optim.NAdam([weight])), []

    def closure() -> Tensor:
        called.append(weight.dtype)
        loss = (3.0 * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert len(called) == 1
    assert (weight < 1.0).all()
    with pytest.raises(OptimizerError, match="the closure changed the gradients after the scaler had read them"):
        optimizer.step(closure, found_inf=GO)


def test_notes_on_a_parameter_are_seen_by_the_optimizer():
    seen = []

    class Looks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append([(type(p), p.dtype, p.requires_grad, p.note) for p in self.param_groups[0]["params"]])

    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weight.note, weight.grad = "no decay", torch.ones(2, dtype=torch.bfloat16)
    dt.MasterWeights(Looks([weight])).step()
    assert seen == [[(nn.Parameter, torch.float32, True, "no decay")]]


def test_state_that_was_made_in_16_bits_becomes_float32():
    weights = make_weights(torch.bfloat16)
    inner = torch.optim.Adagrad(weights, initial_accumulator_value=0.5)
    assert inner.state[weights[0]]["sum"].dtype == torch.bfloat16
    optimizer = dt.MasterWeights(inner)
    assert all(torch.equal(optimizer.state[w]["sum"], torch.full(w.shape, 0.5)) for w in weights)


def test_groups_can_be_added(train):
    first, second = nn.Parameter(torch.ones(2).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())
    optimizer = dt.MasterWeights(torch.optim.NAdam([first], lr=1e-3))
    optimizer.add_param_group({"params": [second], "lr": 1e-4})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [1e-3, 1e-4]
    train(optimizer, range(2))
    assert storage_of(second).tail.any()
    with pytest.raises(OptimizerError, match=r"cannot update a parameter in torch\.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1).double())]})
    assert len(optimizer.param_groups) == 2


def test_it_is_shown_as_what_it_is():
    optimizer = dt.MasterWeights(torch.optim.NAdam([nn.Parameter(torch.ones(2))]))
    assert repr(optimizer).startswith("MasterWeights (")
    assert optimizer.defaults is optimizer.optimizer.defaults
    assert optimizer.param_groups is optimizer.optimizer.param_groups
