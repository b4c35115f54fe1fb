"""The arms that a comparison knows by name: what each trains with, and what it has to show.

Listing them imports no library. `find_arms` reads what people write, names and groups; `own_arm` reads a name of one's
own for a policy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from duotone.errors import CompareError, PolicyError, nearest_names
from duotone.policy import Policy

Group = Literal["torch", "duotone", "compiled", "peers", "ablations"]

DEFAULT_ARMS = "fp32,torch-amp-bf16,bf16,fp16"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: what tables call it.
        group: "torch", "duotone", "compiled" (either, by torch.compile), "peers" (other libraries), or "ablations"
            (Duotone with one mechanism left out).
        summary: in a few words, how it trains.
        stepper: where it is built, `module:function` below `duotone.compare.arms`; the function takes an
            `Assignment` and returns a `Stepper`.
        policy: the policy's text where Duotone trains, else None.
        distribution: what must be installed from PyPI, or None.
        compiles: whether the model is compiled by torch.compile.
    """

    name: str
    group: Group
    summary: str
    stepper: str
    policy: str | None = None
    distribution: str | None = None
    compiles: bool = False


_BY_DUOTONE = "by_duotone:build"

_ARMS = (
    Arm("fp32", "torch", "FP32 throughout, torch's fused optimizer", "by_torch:fp32"),
    Arm("torch-amp-bf16", "torch", "FP32 weights under autocast", "by_torch:amp_bf16"),
    Arm("torch-amp-fp16", "torch", "FP32 weights under autocast, GradScaler", "by_torch:amp_fp16"),
    Arm("bf16", "duotone", "BF16 weights with FP32 masters", _BY_DUOTONE, "bf16"),
    Arm("fp16", "duotone", "FP16 weights with FP32 masters, scaled loss", _BY_DUOTONE, "fp16"),
    Arm("bf16-mixed", "duotone", "FP32 weights, BF16 arithmetic", _BY_DUOTONE, "bf16-mixed"),
    Arm("fp16-mixed", "duotone", "FP32 weights, FP16 arithmetic, scaled loss", _BY_DUOTONE, "fp16-mixed"),
    Arm("bf16-state16", "duotone", "bf16 with BF16 moments", _BY_DUOTONE, "bf16,state=bfloat16"),
    Arm("duotone-fp32", "duotone", "FP32 throughout, Duotone's optimizer", _BY_DUOTONE, "fp32"),
    Arm("fp32-compiled", "compiled", "fp32, compiled", "by_torch:fp32", compiles=True),
    Arm("torch-amp-bf16-compiled", "compiled", "torch-amp-bf16, compiled", "by_torch:amp_bf16", compiles=True),
    Arm("torch-amp-fp16-compiled", "compiled", "torch-amp-fp16, compiled", "by_torch:amp_fp16", compiles=True),
    Arm("bf16-compiled", "compiled", "bf16, compiled", _BY_DUOTONE, "bf16", compiles=True),
    Arm("fp16-compiled", "compiled", "fp16, compiled", _BY_DUOTONE, "fp16", compiles=True),
    Arm("accelerate-bf16", "peers", "Accelerate, BF16 autocast", "by_accelerate:bf16", None, "accelerate"),
    Arm("accelerate-fp16", "peers", "Accelerate, FP16 autocast", "by_accelerate:fp16", None, "accelerate"),
    Arm("fabric-bf16-mixed", "peers", "Lightning Fabric, BF16 autocast", "by_fabric:bf16_mixed", None, "lightning"),
    Arm("fabric-bf16-true", "peers", "Lightning Fabric, BF16 weights", "by_fabric:bf16_true", None, "lightning"),
    Arm("optimi-kahan", "peers", "BF16 weights, Kahan summation", "by_optimi:build", None, "torch-optimi"),
    Arm("torchao-adamw8bit", "peers", "BF16 weights, 8-bit moments", "by_torchao:build", None, "torchao"),
    Arm("fp16-no-scaling", "ablations", "fp16 without loss scaling", _BY_DUOTONE, "fp16,loss_scale=1"),
    Arm("bf16-no-masters", "ablations", "BF16 weights alone, to nearest", _BY_DUOTONE, "bf16-true,rounding=nearest"),
    Arm("fp16-no-masters", "ablations", "FP16 weights alone, to nearest", _BY_DUOTONE, "fp16-true,rounding=nearest"),
    Arm(
        "bf16-stochastic", "ablations", "BF16 weights alone, rounded stochastically", _BY_DUOTONE,
        "bf16-true,rounding=stochastic",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ARMS})

_GROUPS = (*get_args(Group), "all")


def find_arms(text: str) -> tuple[Arm, ...]:
    """Return the arms that a comma-separated list names, in its order.

    Args:
        text: of names of `CATALOGUE`, and of groups: `torch`, `duotone`, `compiled`, `peers`, `ablations`, or `all`. An
            arm that is in a group and named too counts once.

    Raises:
        CompareError: a name is unknown or stands there twice, or there is none.

    >>> [arm.name for arm in find_arms("bf16,torch")]
    ['bf16', 'fp32', 'torch-amp-bf16', 'torch-amp-fp16']
    """
    items = [item.strip() for item in text.split(",")]
    arms: dict[str, Arm] = {}
    for item in items:
        if not item:
            raise CompareError(f'the arms are "{text}"; name them with commas between, such as {DEFAULT_ARMS}')
        if items.count(item) > 1:
            raise CompareError(f'arm "{item}" is named twice; name it once')
        if item in _GROUPS:
            arms |= {arm.name: arm for arm in _ARMS if item in (arm.group, "all")}
        elif item in CATALOGUE:
            arms[item] = CATALOGUE[item]
        else:
            raise CompareError(f'there is no arm "{item}"; {_hint(item)}')
    return tuple(arms.values())


def own_arm(text: str) -> Arm:
    """Return the arm that `name=policy` describes, a policy of Duotone's under a name of one's own.

    Raises:
        CompareError: there is no name or no policy, or the name is taken or has other characters than letters, digits
            and `._+-`.
        PolicyError: the policy cannot be read.

    >>> own_arm("wide-head=bf16,grad=float32; head: param=float32,compute=float32").policy
    'bf16,grad=float32; head: param=float32,compute=float32'
    """
    name, _, policy = (part.strip() for part in text.partition("="))
    if not name or not policy:
        raise CompareError(f'an arm of your own is "{text}"; write NAME=POLICY, such as mine=bf16,grad=float32')
    if not re.fullmatch(r"[A-Za-z0-9._+-]{1,64}", name):
        raise CompareError(f'an arm is called "{name:.80}"; use letters, digits and . _ + - in its name, 64 at most')
    if name in CATALOGUE or name in _GROUPS:
        what = "an arm" if name in CATALOGUE else "a group of arms"
        raise CompareError(f'"{name}" is {what} already; choose another name for {policy}')
    Policy.parse(policy)
    return Arm(name, "duotone", policy, _BY_DUOTONE, policy)


def _hint(item: str) -> str:
    """Return what to write instead: an arm of one's own where the item is a policy, or a part of one."""
    if "=" in item:
        return "a policy of your own is an arm by --arm NAME=POLICY, such as --arm mine=bf16,grad=float32"
    try:
        Policy.parse(item)
    except PolicyError:
        return nearest_names(item, [*CATALOGUE, *_GROUPS])
    return f"it is a policy: write --arm NAME={item}"
