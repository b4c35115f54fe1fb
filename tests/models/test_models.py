"""Public architectures train under Duotone's policies as in FP32, or as near to it as under torch.amp.

Run by make test-models, about five minutes on two cores. All have random weights and are tiny; each arm makes the same
number of updates on one batch, and draws the same masks and noise.
"""

import functools

import pytest
import torch

pytest.importorskip("transformers", reason="make test-models installs what this needs")
pytest.importorskip("diffusers", reason="make test-models installs what this needs")

from .architectures import ARCHITECTURES
from .training import Start

pytestmark = [
    pytest.mark.models,
    # the libraries' own
    pytest.mark.filterwarnings("ignore"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# how much further from FP32's the fall of a loss may be, of that fall
FALL = 0.01
# steps that FP16 may lose while it looks for its scale
SKIPPED = 2


@functools.lru_cache(maxsize=1)
def start(name: str) -> Start:
    return Start(ARCHITECTURES[name])


@functools.lru_cache(maxsize=8)
def run(name: str, arm: str):
    return start(name).run(arm)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("policy", DTYPES)
def test_it_trains_as_in_float32_or_as_under_autocast(name, policy):
    exact, autocast, ours = (run(name, arm) for arm in ("fp32", f"torch.amp {policy}", policy))
    assert exact.fall > 0.05 * abs(exact.first)
    allowed = ARCHITECTURES[name].tolerances.get(policy, FALL)
    assert abs(ours.fall - exact.fall) <= max(allowed * exact.fall, abs(autocast.fall - exact.fall))
    # a quarter of the spacing of the format: below it, either distance is chance
    least = torch.finfo(DTYPES[policy]).eps / 4
    first = abs(autocast.first - exact.first) / exact.first
    assert abs(ours.first - exact.first) / exact.first <= max(2 * first, least)
    assert ours.skipped <= (SKIPPED if policy == "fp16" else 0)


def test_there_are_many_and_each_exception_has_its_reason():
    assert len(ARCHITECTURES) >= 30
    assert all(each.reason for each in ARCHITECTURES.values() if each.tolerances)
