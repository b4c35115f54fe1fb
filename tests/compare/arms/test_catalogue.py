"""What people may write for arms, and what they are told if they cannot."""

from importlib import import_module

import pytest

from duotone.compare.arms.catalogue import CATALOGUE, DEFAULT_ARMS, find_arms, own_arm
from duotone.errors import CompareError, PolicyError
from duotone.policy import Policy


def names(text: str) -> list[str]:
    return [arm.name for arm in find_arms(text)]


def test_the_default_arms():
    assert names(DEFAULT_ARMS) == ["fp32", "torch-amp-bf16", "bf16", "fp16"]


def test_groups_stand_for_their_arms_in_order_and_count_once():
    assert names("torch") == ["fp32", "torch-amp-bf16", "torch-amp-fp16"]
    assert names("bf16, torch, fp32") == ["bf16", "fp32", "torch-amp-bf16", "torch-amp-fp16"]
    assert names("all") == list(CATALOGUE)
    parts = [name for group in ("torch", "duotone", "compiled", "peers", "ablations") for name in names(group)]
    assert parts == names("all,torch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp32,fp32", 'arm "fp32" is named twice; name it once'),
        ("torch,torch", 'arm "torch" is named twice'),
        ("fp32,,bf16", 'the arms are "fp32,,bf16"; name them with commas between'),
        ("", 'the arms are ""'),
        ("bf61", 'there is no arm "bf61"; did you mean bf16'),
        ("peer", 'there is no arm "peer"; did you mean peers'),
        ("16-mixed", 'there is no arm "16-mixed"; it is a policy: write --arm NAME=16-mixed'),
        ("bf16,grad=float32", 'there is no arm "grad=float32"; a policy of your own is an arm by --arm NAME=POLICY'),
    ],
)
def test_arms_that_cannot_be(text: str, message: str):
    with pytest.raises(CompareError) as raised:
        find_arms(text)
    assert str(raised.value).startswith(message)


def test_an_arm_of_ones_own_is_a_policy_with_a_name():
    arm = own_arm("mine = bf16,grad=float32; head: param=float32,compute=float32")
    assert (arm.name, arm.group, arm.distribution) == ("mine", "duotone", None)
    assert arm.policy == "bf16,grad=float32; head: param=float32,compute=float32"
    assert arm.stepper == CATALOGUE["bf16"].stepper


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16", 'an arm of your own is "bf16"; write NAME=POLICY'),
        ("=bf16", 'an arm of your own is "=bf16"'),
        ("x=", 'an arm of your own is "x="'),
        ("a/b=bf16", 'an arm is called "a/b"; use letters'),
        ("fp16=bf16", '"fp16" is an arm already; choose another name for bf16'),
        ("all=bf16", '"all" is a group of arms already'),
    ],
)
def test_arms_of_ones_own_that_cannot_be(text: str, message: str):
    with pytest.raises(CompareError) as raised:
        own_arm(text)
    assert str(raised.value).startswith(message)


def test_a_policy_is_read_when_its_arm_is_named():
    with pytest.raises(PolicyError, match="has no role"):
        own_arm("x=bf16,gard=float32")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_arm_is_short_readable_and_built_somewhere(name: str):
    arm = CATALOGUE[name]
    assert len(arm.summary) <= 45
    module, _, function = arm.stepper.partition(":")
    assert callable(getattr(import_module(f"duotone.compare.arms.{module}"), function))
    assert (arm.policy is not None) == (arm.stepper == "by_duotone:build")
    assert arm.compiles == (arm.group == "compiled") == arm.name.endswith("-compiled")
    assert (arm.distribution is not None) == (arm.group == "peers")
    if arm.policy is not None:
        Policy.parse(arm.policy)
