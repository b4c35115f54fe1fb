"""Operations of kind `compute` that run in FP32 in a 16-bit model: every one is found and named."""

from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.explanation import explain

from ..casting.op_by_hand import CALLS, KINDS, arguments, run

PRODUCTS = [name for name, call in CALLS.items() if KINDS[call.name] == "compute"]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_a_product_in_float32_is_named(name):
    call = CALLS[name]
    args, kwargs = arguments(call, torch.float32)

    class Model(nn.Module):
        def forward(self) -> Any:
            with torch.autocast("cpu", enabled=False):
                return run(call, args, kwargs)

    found = explain(dt.cast(Model(), "bf16"))
    # a whole layer is the products that it is made of
    made_of = {"multi_head_attention_forward": ["addmm", "bmm"]}
    products = {each.name: each.compute_dtype for each in found.operations if each.kind == "compute"}
    assert products == dict.fromkeys(made_of.get(call.name, [call.name]), "float32")
    (finding,) = [each for each in found.findings if "ran in FP32" in each]
    assert f"({', '.join(products)}) ran in FP32 in the model at " in finding
