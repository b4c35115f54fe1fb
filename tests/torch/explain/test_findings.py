"""What stands out, on models made to have one thing wrong, and on models that have nothing wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.explain import Explanation, explain
from duotone.torch.explain.findings import NOTHING

WIDTH = 64


class Model(nn.Module):
    """Two linear layers with something done in between, and a loss, so that nothing large leaves."""

    def __init__(self, between: Callable[[Tensor, "Model"], Tensor] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.between = between or (lambda y, model: F.relu(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x), self)).amax()


def explained(between: Callable[[Tensor, Model], Tensor] | None = None, policy: str = "bf16") -> Explanation:
    return explain(dt.cast(Model(between), policy), torch.ones(32, WIDTH))


def the_only(found: Explanation, start: str) -> str:
    fitting = [each for each in found.findings if start in each]
    assert len(fitting) == 1, found.findings
    return fitting[0]


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_nothing_stands_out(policy):
    assert explained(policy=policy).findings == (NOTHING,)


def test_without_a_policy():
    (finding,) = explain(Model(), torch.ones(32, WIDTH)).findings
    assert "under no policy and computes in FP32" in finding


def test_nothing_ran():
    (finding,) = explain(Model(), run=lambda: None).findings
    assert "call the model with a batch" in finding


def test_a_result_that_leaves_in_float32():
    model = dt.cast(nn.Sequential(nn.Linear(WIDTH, 1000), nn.ReLU(), nn.Linear(1000, 1000)), "bf16")
    found = explain(model, torch.ones(300, WIDTH))
    finding = the_only(found, "leaves the model in FP32")
    assert "1.2 MB (300 x 1000)" in finding
    assert "output=bfloat16" in finding
    # in 16 bits, and where FP32 was computed, there is nothing to say
    for policy in ("bf16,output=bfloat16", "bf16; 2: compute=float32,param=float32,output=float32"):
        findings = explain(dt.cast(model, policy), torch.ones(300, WIDTH)).findings
        assert not any("leaves" in each for each in findings)


def test_casts_of_the_same_tensor():
    def between(y: Tensor, model: Model) -> Tensor:
        return (y.float() * y.float() + y.float()).to(y.dtype)

    found = explained(between)
    finding = the_only(found, "casts of the same tensor")
    assert finding.startswith("3 casts of the same tensor from BF16 to FP32 in the model at ")
    assert "test_findings.py:" in finding
    assert "16.4 kB written again" in finding
    (repeated,) = found.repeated_casts
    assert (repeated.times, repeated.wasted_bytes, repeated.shape) == (3, 2 * 32 * WIDTH * 4, (32, WIDTH))
    assert repeated.name is None


def test_a_tensor_that_changes_between_its_casts_is_another():
    def between(y: Tensor, model: Model) -> Tensor:
        y = y.detach()
        first = y.float()
        y.add_(1)
        return (first + y.float()).to(y.dtype)

    assert explained(between).repeated_casts == ()


def test_parts_of_a_tensor_are_not_the_same():
    def between(y: Tensor, model: Model) -> Tensor:
        return torch.cat([part.float() for part in y.chunk(2)]).to(y.dtype)

    assert explained(between).repeated_casts == ()


def test_a_weight_that_is_cast_again_is_named():
    def between(y: Tensor, model: Model) -> Tensor:
        return model.last(F.relu(y))

    finding = the_only(explained(between, policy="bf16-mixed"), "(last.weight)")
    assert finding.startswith("2 casts of the same tensor (last.weight) from FP32 to BF16 in last")


def test_products_in_float32():
    def between(y: Tensor, model: Model) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(y.float(), model.last.weight.float()).to(y.dtype)

    finding = the_only(explained(between), "ran in FP32")
    assert finding.startswith("1 matrix product (linear) ran in FP32 in the model at ")
    assert "test_findings.py:" in finding


def test_products_that_a_rule_keeps_in_float32_are_meant():
    found = explained(policy="bf16; last: param=float32,compute=float32")
    assert any(each.name == "linear" and each.compute_dtype == "float32" for each in found.operations)
    assert not any("ran in FP32" in each or "FP32 parameters" in each for each in found.findings)


def test_parameters_in_float32():
    model = Model()
    model.norm = nn.BatchNorm1d(WIDTH)
    dt.cast(model, "bf16")
    model.late = nn.Linear(2, 2)
    finding = the_only(explain(model, torch.ones(32, WIDTH)), "FP32 parameters")
    assert "1 module that is no norm" in finding
    assert "late (Linear)" in finding


def test_upcasts_of_the_models_own():
    def between(y: Tensor, model: Model) -> Tensor:
        return F.relu(y.float()).to(y.dtype)

    finding = the_only(explained(between), "the model's own code casts BF16 to FP32")
    assert "test_findings.py:" in finding
    assert "1 cast, 8.19 kB" in finding


def test_a_residual_stream_in_float32():
    def between(y: Tensor, model: Model) -> Tensor:
        x = torch.ones(32, WIDTH)
        for _ in range(3):
            x = x + y
        return x

    finding = the_only(explained(between), "gave FP32")
    assert finding.startswith("3 additions of a 16-bit and an FP32 tensor gave FP32 in the model at ")
    # a bias beside a large tensor is no stream
    found = explained(lambda y, model: (y + torch.ones(WIDTH)).to(y.dtype))
    assert not any("gave FP32" in each for each in found.findings)


def test_the_share_of_float32_in_what_is_saved():
    def between(y: Tensor, model: Model) -> Tensor:
        return y.float().sin().to(y.dtype)

    # a toy's share is none
    assert not any("of what is saved" in each for each in explained(between).findings)
    found = explain(dt.cast(Model(between), "bf16"), torch.ones(320, WIDTH))
    finding = the_only(found, "of what is saved for backward")
    total = sum(found.saved_activation_bytes.values())
    assert f"FP32 is {found.saved_activation_bytes['float32'] / total:.0%}" in finding
    assert "the largest parts: the model (81.9 kB)" in finding


def test_layers_that_are_alike_are_one_sentence():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x.float() + x.float()).to(x.dtype))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.amax()

    found = explain(dt.cast(Stack(), "bf16"), torch.ones(32, WIDTH))
    assert "in layers.* at" in the_only(found, "casts of the same tensor")
    assert "4 such tensors" in the_only(found, "casts of the same tensor")
    assert "in layers.*: 8 casts" in the_only(found, "own code")
