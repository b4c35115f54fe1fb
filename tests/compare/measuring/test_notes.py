"""Warnings become notes: each once, a line, without the places in torch's source."""

import pytest

from duotone.compare.measuring.notes import Notes


def test_notes_are_short_and_for_those_who_train(capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    notes.add("a kernel is slow (Triggered internally at /pytorch/aten/src/x.cpp:12.)\n  return f(", UserWarning)
    notes.add("old", DeprecationWarning)
    notes.add("old too", FutureWarning)
    notes.add("", UserWarning)
    notes.add(UserWarning("a kernel is slow"), UserWarning, "file.py", 3)
    assert notes.lines == ("a kernel is slow",)
    assert "DeprecationWarning: old" in capsys.readouterr().err
