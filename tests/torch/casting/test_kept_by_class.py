"""What a model's class keeps in FP32: a rule where it is a whole module, FP32 storage where it is a parameter."""

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.torch.casting.kept_by_class import kept_parameters

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo, self.words = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.sinks = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.wi(x).to(self.wo.weight.dtype)) + self.words(x) + self.sinks


class Model(nn.Module):
    """As transformers has them: lists of the class, and sets on the instance that `post_init` collects."""

    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self._keep_in_fp32_modules_strict = {"sinks", "gate.weight"}
        self.gate = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.gate(x)


RULE = "param=float32,compute=float32,output=float32"


def widths(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: param.dtype for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fp16", f"fp16; *.wo: {RULE}; gate: {RULE}"),
        ("fp16-mixed", f"fp16-mixed; *.wo: {RULE}; gate: {RULE}"),
        ("bf16", f"bf16; gate: {RULE}"),
        ("fp32", "fp32"),
    ],
)
def test_modules_are_under_a_rule(policy, expected):
    model = dt.cast(Model(), policy)
    assert dt.policy_of(model).name == expected
    # as often as it is cast, and with the policy that it has
    assert dt.policy_of(dt.cast(model, policy)).name == expected
    assert dt.policy_of(dt.cast(model, dt.policy_of(model))).name == expected
    assert model(torch.ones(2, 4)).dtype == torch.float32


def test_parameters_are_stored_in_fp32():
    narrow = {name for name, dtype in widths(dt.cast(Model(), "fp16")).items() if dtype == torch.float16}
    assert narrow == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("wi.weight", "wi.bias", "words.weight", "words.bias")
    }
    model = dt.cast(Model(), "bf16")
    assert {name for name, dtype in widths(model).items() if dtype == torch.float32} == {
        "blocks.0.sinks",
        "blocks.1.sinks",
        "gate.weight",
    }
    before = Model()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    for name, value in dt.uncast(dt.cast(before, "fp16")).state_dict().items():
        assert value.equal(state[name]), name


def test_a_kept_module_computes_beyond_fp16():
    model = dt.cast(Model(), "fp16")
    model.blocks[0].wo.weight.data.fill_(60000.0)
    assert model.blocks[0].wo(torch.full((1, 4), 100.0)).isfinite().all()


@pytest.mark.parametrize(
    "rule",
    ["*.wo: param=float16,compute=float16", "blocks: param=float16,compute=float16", "type=Block: param=float16"],
)
def test_a_rule_of_the_policy_takes_its_place(rule):
    model = dt.cast(Model(), f"fp16; {rule}")
    assert dt.policy_of(model).name == f"fp16; gate: {RULE}; {rule}"
    assert {dtype for name, dtype in widths(model).items() if "wo." in name} == {torch.float16}


def test_a_rule_of_other_roles_does_not():
    model = dt.cast(Model(), "fp16; *: reduce=float16")
    assert "*.wo" in dt.policy_of(model).name


def test_names_are_whole_parts_of_paths():
    found = kept_parameters(dict(Model().named_modules()), dt.Policy.parse("fp16"))
    assert not [name for name in found if "words" in name]
    model = Model()
    model._keep_in_fp32_modules_strict = ["blocks.*.wi"]
    assert "blocks.1.wi.bias" in kept_parameters(dict(model.named_modules()), dt.Policy.parse("bf16"))


def test_a_part_has_its_own_names_and_a_tied_weight_all_of_its():
    class Head(nn.Module):
        _keep_in_fp32_modules_strict = ("lm_head",)

        def __init__(self, is_tied: bool) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            if is_tied:
                self.lm_head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.embed(tokens))

    for is_tied in (False, True):
        model = dt.cast(nn.ModuleDict({"inner": Head(is_tied)}), "bf16")
        assert model["inner"].embed.weight.dtype == torch.bfloat16
        assert model["inner"].lm_head.weight.dtype == (torch.bfloat16 if is_tied else torch.float32)
        assert model["inner"](torch.tensor([1])).dtype in (torch.float32, torch.bfloat16)


def test_a_model_that_is_kept_as_a_whole_has_its_parts_in_fp32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model._keep_in_fp32_modules = ["*"]
    assert set(widths(dt.cast(model, "fp16")).values()) == {torch.float32}
