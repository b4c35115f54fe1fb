"""How many Python calls a forward and a backward pass make, beside torch.amp's: benchmarks/overhead.py as a test."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# the most that are allowed, as multiples of torch.amp's, by model and arm. They may only go down: to 1.15 for a cast
# model and to 1.3 for autocast, which is the aim. Slightly above what torch 2.11, 2.13 and 2.14 make, whose own
# modules differ.
MOST = {
    "decoder, 12 layers": {"bf16": 3.3, "dt.autocast bf16": 5.1},
    "Hugging Face GPT-2, 12 layers": {"bf16": 3.5, "dt.autocast bf16": 3.8},
    "MLP, 64 wide": {"bf16": 1.8, "dt.autocast bf16": 3.9},
}


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead

    return overhead


@pytest.mark.parametrize("name", MOST)
def test_a_step_makes_few_python_calls(overhead, name):
    if not overhead.is_here(name):
        pytest.skip("transformers is not installed")
    arms = overhead.losses(name)
    overhead.check(arms)
    made = {arm: overhead.counts(loss)["both_python"] for arm, loss in arms.items()}
    for arm, most in MOST[name].items():
        assert made[arm] <= most * made[overhead.PEER], made


def test_calls_are_counted(overhead):
    def nothing() -> None:
        pass

    def some() -> None:
        nothing()
        nothing()
        abs(-1)

    assert overhead.calls(nothing) == (0, 0)
    assert overhead.calls(some) == (2, 1)


def test_a_loss_that_is_far_off_stops_the_count(overhead):
    arms = {"fp32": lambda: overhead.torch.tensor(1.0), "bf16": lambda: overhead.torch.tensor(1.1)}
    with pytest.raises(SystemExit, match="nothing was counted"):
        overhead.check(arms)
