"""Peaks are counted above the process without its model."""

import sys

import pytest
import torch
from torch import nn

from duotone.compare.measuring import footprint
from duotone.compare.measuring.footprint import begin_footprint

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_the_peak_counts_the_model_and_what_comes_after_and_nothing_before() -> None:
    before = torch.ones(40_000_000)
    del before
    held = torch.ones(10_000_000)
    model = nn.Linear(2500, 2500)
    begun = begin_footprint(model, CPU)
    weights = 4 * 2500 * 2501
    gone = torch.ones(20_000_000)
    del gone
    peak = begun.peak_bytes()
    assert peak is not None
    # weights and 80 MB that were there for a moment; not the 160 MB before, nor the 40 MB that are held
    assert peak == pytest.approx(weights + 80e6, abs=8e6)
    assert len(held) == 10_000_000


def test_lazy_weights_count_as_nothing_yet() -> None:
    assert begin_footprint(nn.LazyLinear(4), CPU).device == CPU


def test_where_peaks_do_not_begin_anew_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "_REFERENCES", footprint._STATUS.with_name("none") / "there")
    begun = begin_footprint(nn.Linear(4, 4), CPU)
    assert begun.without_model_bytes is None
    assert begun.peak_bytes() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak begin anew")
def test_a_peak_may_begin_again() -> None:
    begun = begin_footprint(nn.Linear(4, 4), CPU)
    gone = torch.ones(20_000_000)
    del gone
    begun.begin_again()
    peak = begun.peak_bytes()
    assert peak is not None
    assert peak < 40e6
