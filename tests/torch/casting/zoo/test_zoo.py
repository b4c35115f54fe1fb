"""Fifteen families of models learn in FP32, BF16 and FP16: as well as in FP32, in 16 bits, and nothing lost."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from duotone.torch.casting.half_on_cpu import cpu_has_half_products

from .training import Run, train
from .zoo import ZOO

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# torch multiplies several times inside of these; on a CPU without FP16 products, all of it is in FP32
COMPOSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# of how far the loss falls in FP32; at most 0.013 was measured
TOLERANCE = 0.05
# two in the search for the scale, and one where gradients grow later
CALIBRATION = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:this CPU has no FP16 matrix products"),
]
families = pytest.mark.parametrize("name", ZOO)
policies = pytest.mark.parametrize("policy", DTYPES)


@functools.cache
def run_of(name: str, policy: str) -> Run:
    return train(ZOO[name], policy)


@families
@policies
def test_it_learns_as_in_float32(name, policy):
    run, exact = run_of(name, policy), run_of(name, "fp32")
    fall = exact.start - exact.final
    assert fall >= 0.3 * exact.start
    assert abs(run.final - exact.final) <= TOLERANCE * fall


@families
@policies
def test_everything_is_finite_and_no_step_is_skipped_but_to_calibrate(name, policy):
    run = run_of(name, policy)
    assert all(map(math.isfinite, run.losses))
    assert all(master.isfinite().all() for master in run.masters.values())
    assert run.skipped <= (CALIBRATION if policy == "fp16" else 0)


@families
@policies
def test_weights_are_rounded_masters_and_no_bit_is_lost(name, policy, same_bits):
    run = run_of(name, policy)
    assert run.masters.keys() == run.weights.keys() == run.recast.keys()
    for path, master in run.masters.items():
        assert master.dtype == torch.float32
        assert same_bits(run.recast[path], master), path
        assert same_bits(run.weights[path], nearest(master, run.weights[path].dtype)), path
    if policy != "fp32":
        # there were bits to lose
        assert any((run.weights[path] != master).any() for path, master in run.masters.items())


@families
@policies
def test_every_parameter_learns_from_a_gradient_in_its_dtype(name, policy):
    run = run_of(name, policy)
    in_float32 = {
        f"{place}.{path}.{own}"
        for place, model in enumerate(run.models)
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if isinstance(module, NORMS)
    }
    # where the residual stream starts
    in_float32 |= {path for path in run.weights if path.endswith((".class_token", ".positions"))}
    for path, grad in run.gradients.items():
        assert grad is not None, path
        expected = torch.float32 if path in in_float32 else DTYPES[policy]
        assert (grad.dtype, run.weights[path].dtype) == (expected, expected), path
        assert grad.any(), path


@families
@policies
def test_products_multiply_what_the_policy_holds(name, policy):
    run = run_of(name, policy)
    assert run.products
    if policy != "fp16" or cpu_has_half_products():
        assert {operand for operand in run.products if operand.dtype != DTYPES[policy]} == set()
    elif not any(isinstance(module, COMPOSED) for model in run.models for module in model.modules()):
        # here the arithmetic is FP32's, but on FP16's values
        assert {operand for operand in run.products if not operand.is_in_float16} == set()


@families
@policies
def test_layers_return_the_policys_dtype(name, policy):
    run = run_of(name, policy)
    assert run.outputs
    lookups = {
        f"{place}.{path}"
        for place, model in enumerate(run.models)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    for path, dtypes in run.outputs.items():
        # a residual stream starts in FP32
        assert dtypes == {torch.float32 if path in lookups else DTYPES[policy]}, path


@families
@policies
def test_inputs_come_as_they_are(name, policy):
    run = run_of(name, policy)
    assert run.borders
    assert all(got is given for given, got in run.borders)


def nearest(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a master is rounded to: to nearest, ties away from zero in BF16."""
    if dtype == torch.bfloat16:
        return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return master.to(dtype)
