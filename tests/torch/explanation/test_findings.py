"""What stands out, on models made to have one thing wrong, and on models that have nothing wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.casting.half_on_cpu import cpu_has_half_products
from duotone.torch.explanation import Explanation, explain
from duotone.wording.findings import NOTHING
from duotone.wording.words import size

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
    # what the command line has is of no use in Python
    assert "--" not in finding


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
    assert finding.startswith("1 product (linear) ran in FP32 in the model at ")
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

    # under a policy that has it in FP32 it is meant
    assert explained(between).findings == (NOTHING,)
    finding = the_only(explained(between, "bf16,residual=compute"), "gave FP32")
    assert finding.startswith("3 additions of a 16-bit and an FP32 tensor gave FP32 in the model at ")
    # a bias beside a large tensor is no stream
    found = explained(lambda y, model: (y + torch.ones(WIDTH)).to(y.dtype), "bf16,residual=compute")
    assert not any("gave FP32" in each for each in found.findings)


def test_the_share_of_float32_in_what_is_saved():
    def between(y: Tensor, model: Model) -> Tensor:
        return y.float().sin().to(y.dtype)

    # a toy's share is none
    assert not any("of what is saved" in each for each in explained(between).findings)
    found = explain(dt.cast(Model(between), "bf16"), torch.ones(320, WIDTH))
    finding = the_only(found, "of what is saved for backward")
    total = sum(found.saved_for_backward.activation_bytes.values())
    assert f"FP32 is {found.saved_for_backward.activation_bytes['float32'] / total:.0%}" in finding
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

    found = explain(dt.cast(Stack(), "bf16,inputs=bf16"), torch.ones(32, WIDTH))
    assert "in layers.* at" in the_only(found, "casts of the same tensor")
    assert "4 such tensors" in the_only(found, "casts of the same tensor")
    assert "in layers.*: 8 casts" in the_only(found, "own code")


BLAMES = ("ran in FP32", "FP32 parameters", "of what is saved", "becomes FP32", "gave FP32")


def blamed(found: Explanation) -> list[str]:
    return [each for each in found.findings if any(words in each for words in BLAMES)]


@pytest.mark.parametrize(
    "rule", ["type=Linear: param=float32,compute=float32", "type=Module: param=float32,compute=float32"]
)
def test_what_a_rule_by_type_keeps_in_float32_is_meant(rule):
    model = dt.cast(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)), f"bf16; {rule}")
    found = explain(model, torch.ones(3000, WIDTH).bfloat16())
    assert {each.policy for each in found.modules if each.type == "Linear"} == {"fp32"}
    assert found.saved_for_backward.activation_bytes["float32"] > 500_000
    assert not blamed(found)


def test_a_rule_by_type_in_a_part_that_was_cast_by_itself():
    part = dt.cast(
        nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.ReLU()), "bf16; type=Linear: compute=fp32,param=fp32"
    )
    found = explain(nn.Sequential(nn.Identity(), part), run=lambda: None)
    policies = {each.path: each.policy for each in found.modules}
    assert policies == {"": None, "0": None, "1": "bf16", "1.0": "bf16", "1.0.0": "fp32", "1.1": "bf16"}


def test_what_keep_float32_asks_for_is_meant():
    @dt.keep_float32
    def product(y: Tensor) -> Tensor:
        return y @ y.T @ y

    def between(y: Tensor, model: Model) -> Tensor:
        with dt.keep_float32():
            z = torch.tanh(y @ model.last.weight)
            z = z * y.detach()
        return z.to(y.dtype) + product(y).to(y.dtype)

    found = explain(dt.cast(Model(between), "bf16"), torch.ones(320, WIDTH))
    reasons = {each.reason for each in found.operations if each.name == "matmul"}
    assert reasons == {"keep_float32"}
    assert found.modules[0].kept_float32_bytes > 100_000
    assert not blamed(found)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pe", torch.ones(64, WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[: len(x)]


def test_where_a_buffer_widens_the_stream_is_named():
    model = Model(lambda y, model: model.pe(y))
    model.pe = Positions()
    assert explain(dt.cast(model, "bf16"), torch.ones(32, WIDTH)).findings == (NOTHING,)
    found = explain(dt.cast(model, "bf16,residual=compute"), torch.ones(32, WIDTH))
    finding = the_only(found, "the stream becomes FP32 in pe at ")
    assert "test_findings.py:" in finding
    assert finding.endswith(": add of BF16 and FP32 (the buffer pe.pe); cast it where it is used, .to(x.dtype)")


def test_norms_of_ones_own_in_a_stream_in_float32_are_no_finding():
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return self.weight * (wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype)

    model = nn.Sequential(nn.Embedding(9, WIDTH), OwnNorm(), nn.Linear(WIDTH, 1))
    assert explain(dt.cast(model, "bf16"), torch.ones(320, dtype=torch.int64)).findings == (NOTHING,)


@pytest.mark.parametrize(("operation", "name"), [(torch.mul, "mul"), (torch.sub, "sub"), (torch.maximum, "maximum")])
def test_any_elementwise_operation_may_widen_the_stream(operation, name):
    found = explained(lambda y, model: operation(y, torch.ones(WIDTH)))
    assert [each.mixed for each in found.operations if each.name == name] == [True]
    finding = the_only(found, "the stream becomes FP32")
    assert f": {name} of BF16 and FP32; cast the FP32 one where it is used" in finding
    # numbers, and a result in 16 bits, widen nothing
    for between in (lambda y, model: operation(y, torch.tensor(2.0)), lambda y, model: y.mul_(torch.ones(WIDTH))):
        assert explained(between).widenings == ()


@pytest.mark.skipif(cpu_has_half_products(), reason="the CPU has what is emulated elsewhere")
@pytest.mark.parametrize("policy", ["fp16", "fp16-mixed"])
def test_fp16_on_a_cpu_without_is_one_finding(policy):
    class Attending(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return (self.last(F.relu(x @ x.T @ x)) * 2).amax()

    found = explain(dt.cast(Attending(), policy), torch.ones(320, WIDTH).half())
    calls = sum(each.calls for each in found.emulated_casts)
    written = sum(each.result_bytes for each in found.emulated_casts)
    assert found.findings == (
        f"this CPU has no FP16 products: 4 ran in FP32; their {calls} casts ({size(written)}) would "
        "not be there on a GPU",
    )
    # none of them is in the table; that of FP32 weights is the policy's
    assert {each.operation for each in found.casts if each.operation} == (set() if policy == "fp16" else {"linear"})
    assert not any((each.from_dtype, each.operation) == ("float16", "linear") for each in found.casts)


def test_what_torch_widens_by_itself_is_said_once():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    found = explain(dt.cast(model, "bf16,output=bfloat16"), torch.ones(4, 64, 64))
    finding = the_only(found, "by itself")
    saved = next(each.saved_bytes for each in found.modules if each.path == "self_attn")["float32"]
    assert finding.startswith("torch computes bmm in FP32 by itself in self_attn (attention with dropout has no fused ")
    assert finding.endswith(f": {saved / 1000:.0f} kB saved")
    # query, key and value are one tensor, which is cast once
    assert len(found.findings) == 1


def test_attention_with_dropout_that_the_model_calls_is_torchs_too():
    def between(y: Tensor, model: Model) -> Tensor:
        y = y.view(1, 1, *y.shape)
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.1)[0, 0]

    finding = the_only(explained(between), "by itself")
    assert finding.startswith("torch computes scaled_dot_product_attention in FP32 by itself in the model (")


def test_a_float32_result_that_is_rounded_on_its_way_out():
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    rule = "bf16,residual=compute; 2: param=float32,compute=float32"
    finding = the_only(explain(dt.cast(layers, rule), torch.ones(8, WIDTH)), "is rounded")
    assert finding == (
        "the FP32 result of 2 is rounded to BF16 at its border and widened again at the model's; "
        'write "2: ...,output=float32" in the policy'
    )
    found = explain(dt.cast(layers, rule + ",output=float32"), torch.ones(8, WIDTH))
    assert not any("rounded" in each for each in found.findings)
