"""A policy is resolved once for each set of rules that holds somewhere, and whoever needs the result reads it."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import PolicyError
from duotone.policy import Policy
from duotone.torch.casting.module_policies import resolve, with_marks

RULES = "bf16; 1: compute=float32,param=float32; type=LayerNorm: param=float32,compute=float32; 2.*: output=float32"


def blocks(count: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(count)))


def test_cast_and_explain_resolve_each_set_of_rules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for_module = Policy.for_module

    def counted(self: Policy, path: str, *classes: object) -> Policy:
        asked.append(path)
        return for_module(self, path, *classes)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "for_module", counted)
    model = dt.cast(blocks(), RULES)
    # the first module of each: no rule, that of its place, that of its type, and both
    assert asked == ["", "0.1", "1", "1.1", "2.0", "2.1"]
    asked.clear()
    explanation = dt.explain(model, torch.ones(2, 4))
    model(torch.ones(2, 4)).sum().backward()
    dt.AdamW(model.parameters()).step()
    assert asked == []
    # what explain shows is what was resolved
    policies = resolve(model, Policy.parse(RULES))
    shown = {each.path: each.policy for each in explanation.modules}
    assert shown == {path: own.effective.name for path, own in policies.items()}


def test_what_is_resolved_is_what_the_policy_says() -> None:
    policy, model = Policy.parse(RULES), blocks()
    policies = resolve(model, policy)
    classes = {path: (type(module).__name__,) for path, module in model.named_modules()}
    for path, own in policies.items():
        assert own.effective == policy.for_module(path, classes)
        assert own.outer == policy.for_module(path.rpartition(".")[0], classes)
    assert {path for path, own in policies.items() if own.sets_param} == {"1", "0.1", "1.1", "2.1"}
    assert {path for path, own in policies.items() if own.sets_output} == {"2.0", "2.1", "2.2"}


def test_marks_are_rules_once() -> None:
    model = blocks(2)
    dt.keep_float32(model[1])
    marked = with_marks(model, Policy.parse("bf16"))
    assert [rule.pattern for rule in marked.rules] == ["1"]
    assert with_marks(model, marked) == marked
    assert resolve(model, marked)["1.0"].effective.param == "float32"
    assert with_marks(model, Policy.parse("fp32")) == Policy.parse("fp32")


def test_formats_that_torch_has_not_are_refused_wherever_a_rule_asks_for_them() -> None:
    with pytest.raises(PolicyError, match="compute=float8_e4m3fn is not available in torch yet"):
        resolve(blocks(), Policy.parse("bf16; 1.0: compute=float8_e4m3fn"))
