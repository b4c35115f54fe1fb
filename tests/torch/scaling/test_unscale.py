"""Gradients made true in place: no bit of an FP16 gradient lost, dtypes given back, and steps with what comes of it."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import duotone.torch as dt
from duotone.torch.internals.training import check_and_unscale
from duotone.torch.scaling import unscale
from duotone.torch.scaling.unscale import check_and_multiply, narrow, unscale_, unscale_and_check_

INVERSES = [1.0, 2.0**-16, 2.0**-32]


def with_gradient(grad):
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad.clone()
    return parameter


def every_half():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("inverse", INVERSES)
def test_every_float16_survives(inverse):
    bits = every_half()
    parameter = with_gradient(bits)
    assert unscale_([parameter], torch.tensor(inverse)) == [parameter]
    assert parameter.grad.dtype == parameter.grad_dtype == torch.float32
    expected = bits.double() * inverse
    finite = bits.isfinite()
    assert torch.equal(parameter.grad[finite].double(), expected[finite])
    assert torch.equal(parameter.grad.signbit()[finite], bits.signbit()[finite])
    assert torch.equal(parameter.grad.isnan(), bits.isnan())
    assert torch.equal(parameter.grad.isinf(), bits.isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", INVERSES)
def test_other_dtypes_stay(dtype, inverse, same_bits):
    values = [0.0, -0.0, 1.0, -3.0, 2.0**-60, 1e30, math.inf, -math.inf, math.nan]
    grad = torch.tensor(values, dtype=dtype)
    parameter = with_gradient(grad)
    held = parameter.grad
    assert unscale_([parameter], torch.tensor(inverse)) == []
    # in place: whoever holds the gradient sees it
    assert parameter.grad is held
    assert same_bits(held, (grad.double() * inverse).to(dtype))


def test_dtypes_mixed_empty_and_absent():
    parameters = [
        with_gradient(torch.full((3,), 2.0, dtype=dtype)) for dtype in (torch.float16, torch.float32, torch.bfloat16)
    ]
    parameters += [with_gradient(torch.zeros(0, dtype=torch.float16)), nn.Parameter(torch.zeros(2))]
    widened = unscale_(parameters, torch.tensor(0.5))
    assert [any(param is each for each in widened) for param in parameters] == [True, False, False, True, False]
    assert [param.grad.tolist() for param in parameters[:4]] == [[1.0] * 3] * 3 + [[]]
    assert unscale_([], torch.tensor(0.5)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_narrowing_gives_the_old_dtype_back(dtype):
    # an FP32 weight may have FP16 gradients
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    parameter.grad_dtype = torch.float16
    parameter.grad = torch.tensor([1.0, 2.0**-24, math.inf], dtype=torch.float16)
    narrow(unscale_([parameter], torch.tensor(2.0**-2)))
    assert parameter.grad_dtype == parameter.grad.dtype == torch.float16
    assert parameter.grad.tolist() == [0.25, 0.0, math.inf]


def test_narrowing_a_gradient_that_was_let_go():
    parameter = with_gradient(torch.ones(2, dtype=torch.float16))
    widened = unscale_([parameter], torch.tensor(0.5))
    parameter.grad = None
    narrow(widened)
    assert parameter.grad is None
    assert parameter.grad_dtype == torch.float16
    narrow([])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
def test_a_transposed_gradient(shape):
    grad = torch.randn(shape).half().transpose(0, -1)
    parameter = with_gradient(grad)
    unscale_([parameter], torch.tensor(0.25))
    assert torch.equal(parameter.grad, grad.float() / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_without_torchs_kernel_every_bit_is_the_same(dtype, inverse, found, same_bits):
    values = [0.0, -0.0, 1.0, -3.0, 2.0**-14, 6e4]
    for bad in ([], [math.inf], [-math.inf], [math.nan]):
        grads = [torch.tensor([*values, *bad]).to(dtype), torch.linspace(-3, 3, 6).to(dtype).view(2, 3).t()]
        others, flags = [grad.clone() for grad in grads], [torch.tensor(found) for _ in range(2)]
        check_and_multiply(grads, flags[0], torch.tensor(inverse))
        check_and_unscale(others, flags[1], torch.tensor(inverse))
        assert all(map(same_bits, grads, others))
        assert torch.equal(*flags)


class Operators(TorchDispatchMode):
    """Notes which of torch's operators are called on tensors of which dtypes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operands = args[0] if args and isinstance(args[0], list) else args
        self.calls.append((func.overloadpacket.__name__, {each.dtype for each in operands if torch.is_tensor(each)}))
        return func(*args, **(kwargs or {}))


def test_bfloat16_gradients_on_a_gpu_do_not_go_to_the_kernel_that_has_no_bfloat16(monkeypatch):
    # https://github.com/pytorch/pytorch/issues/127176
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    read = []

    def grad_stats(grads, inverse_scale):
        read.extend(grad.dtype for grad in grads)
        return inverse_scale.double(), inverse_scale > 1

    monkeypatch.setattr(unscale, "grad_stats", grad_stats)
    with FakeTensorMode(), Operators() as operators:
        parameters = [with_gradient(torch.empty(3, dtype=dtype, device="cuda")) for dtype in dtypes]
        one = torch.ones((), device="cuda")
        (flag,) = unscale_and_check_(parameters, one, torch.zeros((), device="cuda")).values()
    assert (flag.dtype, flag.device.type) == (torch.float32, "cuda")
    assert read == [torch.bfloat16]
    checked = [seen for name, seen in operators.calls if name == "_amp_foreach_non_finite_check_and_unscale_"]
    assert checked == [{torch.float16}, {torch.float32}]
    assert ("_foreach_mul_", {torch.bfloat16}) in operators.calls


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_a_grad_scaler_takes_a_cast_model_on_a_gpu(policy):
    model = dt.cast(nn.Linear(8, 8).cuda(), policy)
    optimizer, scaler = dt.AdamW(model.parameters()), dt.GradScaler("cuda", init_scale=2.0**4)
    before = model.weight.detach().clone()
    for factor in (1.0, math.inf):
        scaler.scale(model(torch.ones(2, 8, device="cuda")).float().sum() * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**3
    assert not torch.equal(model.weight, before)


OPTIMIZERS = {
    "adamw": lambda params: dt.AdamW(params, lr=0.5),
    "sgd": lambda params: dt.SGD(params, lr=0.5, momentum=0.5),
    "lion": lambda params: dt.Lion(params, lr=0.5),
    "wrapped": lambda params: dt.MasterWeights(torch.optim.NAdam(params, lr=0.5)),
    "wrapped fused": lambda params: dt.MasterWeights(torch.optim.Adam(params, lr=0.5, fused=True)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["fp16", "bf16", "fp16-mixed", "fp16,grad=float32"])
@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_step_is_the_same_with_and_without_and_later_gradients_have_their_own_dtype(kind, policy, same_bits):
    models, dtypes = [], []
    for ahead in (False, True):
        torch.manual_seed(0)
        model = dt.cast(nn.Linear(3, 2), policy)
        optimizer = OPTIMIZERS[kind](model.parameters())
        scaler = dt.LossScaler(policy)
        for step in range(3):
            scaler.backward(model(torch.randn(4, 3)).square().mean() * 2.0**-12)
            scaler.backward(model(torch.randn(4, 3)).square().mean() * 2.0**-12)
            dtypes.append([param.grad.dtype for param in model.parameters()])
            if ahead and step != 1:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            dtypes.append([param.grad.dtype for param in model.parameters()])
            optimizer.zero_grad(set_to_none=step == 0)
        models.append(model)
    assert len(set(map(tuple, dtypes))) == 1
    for first, second in zip(dt.master_weights(models[0]).values(), dt.master_weights(models[1]).values(), strict=True):
        assert same_bits(first, second)
