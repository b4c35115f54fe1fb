"""Casting inside and outside of torch.func's transforms and forward-mode derivatives, of functions and models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn import functional as F

import duotone.torch as dt

from .computation import NARROW, Model, cast_model, compute, data, exact_gradients, gradients, loss_of, weights

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
# around the transform, and around the function inside of it
WHERE = pytest.mark.parametrize("is_outside", [True, False], ids=["around", "inside"])
Loss = Callable[..., Tensor]


def loss(*operands: Tensor) -> Tensor:
    return loss_of(compute(*operands))


def transformed(transform: Callable[[Loss], Loss], function: Loss, dtype: torch.dtype, is_outside: bool) -> Loss:
    """Return a transformed function that computes in 16 bits."""
    cast = dt.autocast("cpu", dtype)
    return cast(transform(function)) if is_outside else transform(cast(function))


def near(got: Tensor, exact: Tensor, share: float = 0.02) -> bool:
    return bool((got.double() - exact.double()).norm() <= share * exact.double().norm())


@HALVES
@WHERE
def test_gradients_are_those_of_autograd(is_outside, dtype):
    found = transformed(lambda f: grad(f, argnums=(0, 1, 2, 3)), loss, dtype, is_outside)(data(), *weights())
    cast = dt.autocast("cpu", dtype)(compute)
    for got, expected, exact in zip(found, gradients(cast), exact_gradients(), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.005)
        assert near(got, exact)


@HALVES
@WHERE
def test_a_pullback_that_is_called_outside_of_the_region(is_outside, dtype):
    with dt.autocast("cpu", dtype) if is_outside else torch.enable_grad():
        _, pull = vjp(loss if is_outside else dt.autocast("cpu", dtype)(loss), data(), *weights())
    for got, exact in zip(pull(torch.ones(())), exact_gradients(), strict=True):
        assert got.dtype == torch.float32
        assert near(got, exact)


def small(x: Tensor) -> Tensor:
    """Return three numbers of four, with a product, a norm, exponentials and sums."""
    product = x[None] @ torch.linspace(-0.7, 0.9, 12).view(4, 3)
    return (F.layer_norm(product, (3,)) * 0.3 + product.exp()).sum(0) / (1e-6 + product.softmax(-1).sum())


POINT = torch.tensor([0.3, -0.2, 0.5, 0.1])


@HALVES
@WHERE
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians_are_near_those_of_float64(transform, is_outside, dtype):
    exact = transform(small_exactly)(POINT.double())
    got = transformed(transform, small, dtype, is_outside)(POINT)
    assert got.dtype == torch.float32
    assert near(got, exact)


def small_exactly(x: Tensor) -> Tensor:
    product = x[None] @ torch.linspace(-0.7, 0.9, 12).view(4, 3).double()
    return (F.layer_norm(product, (3,)) * 0.3 + product.exp()).sum(0) / (1e-6 + product.softmax(-1).sum())


@HALVES
@WHERE
def test_directional_derivatives(is_outside, dtype):
    direction = torch.tensor([1.0, 0.5, -1.0, 2.0])
    value, slope = jvp(small_exactly, (POINT.double(),), (direction.double(),))

    def derive(function: Loss) -> Loss:
        return lambda x, v: torch.stack(jvp(function, (x,), (v,)))

    got = transformed(derive, small, dtype, is_outside)(POINT, direction)
    assert near(got, torch.stack([value, slope]))
    # the same without torch.func
    with forward_ad.dual_level(), dt.autocast("cpu", dtype):
        dual = small(forward_ad.make_dual(POINT, direction))
        assert near(forward_ad.unpack_dual(dual).tangent, slope)


@HALVES
@WHERE
def test_second_derivatives(is_outside, dtype):
    def curved(x: Tensor) -> Tensor:
        return ((x[None] @ torch.linspace(-0.7, 0.9, 12).view(4, 3).to(x.dtype)).exp() ** 2).sum()

    got = transformed(hessian, curved, dtype, is_outside)(POINT)
    assert got.dtype == torch.float32
    assert near(got, hessian(curved)(POINT.double()), 0.04)


@HALVES
@WHERE
def test_vmap_gives_what_a_loop_gives(is_outside, dtype):
    batch = torch.stack([data(), data() * 2, data() - 1])
    cast = dt.autocast("cpu", dtype)(compute)
    expected = [cast(each, *weights()) for each in batch]
    got = transformed(lambda f: vmap(f, in_dims=(0, None, None, None)), compute, dtype, is_outside)(batch, *weights())
    for name, rows in got.items():
        assert rows.dtype == expected[0][name].dtype, name
        torch.testing.assert_close(rows, torch.stack([each[name] for each in expected]), rtol=0.02, atol=0.02)


@HALVES
@WHERE
def test_gradients_of_each_sample(is_outside, dtype):
    batch = torch.stack([data(), data() * 2])
    each_sample = transformed(
        lambda f: vmap(grad(f, argnums=(1, 2, 3)), in_dims=(0, None, None, None)), loss, dtype, is_outside
    )
    for number, x in enumerate(batch):
        leaves = [each.detach().double().requires_grad_() for each in weights()]
        exact = torch.autograd.grad(loss(x.double(), *leaves), leaves)
        for got, want in zip(each_sample(batch, *weights()), exact, strict=True):
            assert got.dtype == torch.float32
            assert near(got[number], want)


@HALVES
def test_randomness_in_vmap(dtype):
    # a rule may not draw once where torch draws for each
    with dt.autocast("cpu", dtype):
        got = vmap(lambda x: F.dropout(x @ x.mT, 0.5).sum(-1), randomness="different")(torch.ones(8, 4, 4))
    assert got.dtype == torch.float32
    assert len({tuple(each) for each in got.tolist()}) > 1


# --- cast models


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_a_functional_call_takes_other_weights(policy, same_bits):
    model = cast_model(policy)
    others = {name: param.detach() * 2 for name, param in model.named_parameters()}
    got = functional_call(model, others, (data(),))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(others[name])
    assert same_bits(got, model(data()))


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_cast_model_under_transforms(policy):
    model = cast_model(policy)
    params = {name: param.detach() for name, param in model.named_parameters()}

    def of_params(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    found, value = grad_and_value(of_params)(params, data())
    exact = Model().double()
    exact(data().double()).backward()
    assert value.dtype == torch.float32
    for name, param in exact.named_parameters():
        assert found[name].dtype == params[name].dtype
        assert near(found[name], param.grad, 0.05)
    batch = torch.stack([data(), data() * 2])
    each = vmap(grad(of_params), in_dims=(None, 0))(params, batch)
    for name, rows in each.items():
        want = torch.stack([grad(of_params)(params, x)[name] for x in batch])
        torch.testing.assert_close(rows.float(), want.float(), rtol=0.03, atol=0.03)


def test_an_ensemble_of_cast_models():
    torch.manual_seed(0)
    models = [dt.cast(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), "bf16") for _ in range(3)]
    params, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (data(),)))(params, buffers)
    expected = torch.stack([model(data()) for model in models])
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
