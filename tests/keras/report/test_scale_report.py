"""What `ScaleReport` puts into logs, in which order of callbacks, and what it costs."""

import csv
import math
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import pytest

import duotone.keras as dk
from duotone.errors import DuotoneWarning, LossScaleError

from ..runs import build, data, fit, scaled

FIELDS = {"loss_scale", "skipped", "grad_norm"}


class Logs(keras.callbacks.Callback):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches.append(dict(logs))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(dict(logs))


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the skipped steps of every report."""
    seen: list[int] = []
    report = dk.LossScaleOptimizer.report

    def counted(self: Any) -> Any:
        found = report(self)
        seen.append(found.skipped)
        return found

    monkeypatch.setattr(dk.LossScaleOptimizer, "report", counted)
    return seen


@pytest.mark.parametrize("place", [0, 1, 2])
def test_callbacks_see_the_fields_wherever_this_one_stands(place: int, tmp_path: Path) -> None:
    logs, table = Logs(), tmp_path / "log.csv"
    callbacks: list[Any] = [logs, keras.callbacks.CSVLogger(str(table))]
    callbacks.insert(place, dk.ScaleReport(every=1))
    history = fit(build(), "x..", *callbacks, epochs=2)
    assert set(history) == {"loss", *FIELDS}
    assert history["skipped"] == [1, 2]
    assert [epoch["skipped"] for epoch in logs.epochs] == [1, 2]
    with table.open() as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["1", "2"]
    # what a batch shows is what the one before it left
    assert [batch.get("skipped") for batch in logs.batches] == [None, 1, 1, 1, 2, 2]


def test_every_callback_is_asked_once_although_one_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Named(keras.callbacks.Callback):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def set_model(self, model: Any) -> None:
            super().set_model(model)
            asked.append(self.name)

    model = build()
    fit(model, ".", Named("a"), Named("b"), dk.ScaleReport(), Named("c"), dk.ScaleReport(), Named("d"))
    assert asked == list("abcd")


def bar_lines(capsys: pytest.CaptureFixture[str], *callbacks: Any, pattern: str = "xx..", **settings: Any) -> list[str]:
    """Return every state of the progress bar of a run, without what a terminal does not show."""
    fit(build(), pattern, *callbacks, verbose=1, **settings)
    shown = re.sub("\x1b\\[[0-9]*m|\b", "", capsys.readouterr().out)
    return [line.rstrip() for line in re.split("[\r\n]+", shown) if "step" in line]


def test_the_progress_bar_is_no_wider_and_its_last_line_has_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = bar_lines(capsys, dk.ScaleReport(every=1), epochs=2)
    ends = [line for line in lines if "loss_scale" in line]
    assert [re.sub(r".*- loss: \S+ - ", "", line) for line in ends] == [
        "loss_scale: 4 - skipped: 2",
        "loss_scale: 2 - skipped: 4",
    ]
    assert all(re.search(r"step - loss: \S+$", line) for line in lines if line not in ends)
    # an epoch without a skip says nothing of them
    assert "skipped" not in "".join(bar_lines(capsys, dk.ScaleReport(), pattern="..", epochs=1))


def test_tensorboard_writes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(build(), "..", keras.callbacks.TensorBoard(str(tmp_path), write_graph=False), dk.ScaleReport())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*tfevents*"))
    assert all(f"epoch_{field}".encode() in written for field in FIELDS)


def test_fields_are_the_optimizers_own() -> None:
    model, logs = build(), Logs()
    history = fit(model, "x...", logs, dk.ScaleReport(every=1))
    step = model.optimizer.report()
    assert history["loss_scale"] == [step.loss_scale]
    assert history["grad_norm"] == [step.grad_norm]
    assert math.isfinite(step.grad_norm)
    # the first step was skipped at 2^16, the others are of the search
    assert [batch.get("loss_scale") for batch in logs.batches] == [None, 65536.0, 1.0, 4.0]
    assert not math.isfinite(logs.batches[1]["grad_norm"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_validation_has_none_and_changes_none(compiled: bool) -> None:
    x, y = data("..")
    history = fit(build(compiled=compiled), "x..", dk.ScaleReport(), validation_data=(x, y), epochs=2)
    assert set(history) == {"loss", "val_loss", *FIELDS}


def test_readings_are_few(readings: list[int]) -> None:
    fit(build(), "." * 20, dk.ScaleReport(every=8), epochs=2)
    # before the first step; after 1, 2, 4, 8 and 16 batches, at the end of an epoch at 20, then 28 and 36, at 40
    assert len(readings) == 1 + 5 + 1 + 2 + 1


def test_short_epochs_are_read_once_each(readings: list[int]) -> None:
    fit(build(), "..", dk.ScaleReport(), epochs=8)
    # after the first batch, and at the end of every epoch
    assert len(readings) == 1 + 1 + 8


@pytest.mark.backends("jax", "tensorflow")
def test_several_steps_per_execution(readings: list[int]) -> None:
    model = build(compiled=True, steps_per_execution=4, jit_compile=False)
    history = fit(model, "x" + "." * 19, dk.ScaleReport(every=4))
    assert history["skipped"] == [1]
    # before the first step; after 4, 8, 12 and 16 batches, and at the end
    assert len(readings) == 1 + 4 + 1


@pytest.mark.backends("jax")
def test_nothing_is_put_back_into_variables_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def assignments(*callbacks: Any) -> int:
        model, calls = build(), []
        for variable in model.variables:
            assign = variable.assign
            variable.assign = lambda value, assign=assign: calls.append(1) or assign(value)
        fit(model, "." * 8, *callbacks)
        return len(calls)

    assert assignments(dk.ScaleReport(every=1)) == assignments()


@pytest.mark.backends("jax", "torch")
def test_callbacks_still_run_beside_the_device() -> None:
    lists: list[Any] = []

    class Listed(keras.callbacks.CallbackList):
        def on_train_begin(self, logs: Any = None) -> None:
            lists.append(self._async_train)
            super().on_train_begin(logs)

    for callbacks, runs_beside in (([dk.ScaleReport()], True), ([dk.ScaleReport(), Logs()], False)):
        model = build()
        model.fit(*data(".."), verbose=0, callbacks=Listed(callbacks, add_history=True, model=model))
        assert lists.pop() is runs_beside


def test_training_is_the_same_with_and_without_it() -> None:
    def trained(*callbacks: Any) -> list[bytes]:
        keras.utils.set_random_seed(3)
        model = build()
        fit(model, "x..x.", *callbacks, epochs=2)
        return [keras.ops.convert_to_numpy(each).tobytes() for each in [*model.variables, *model.optimizer.variables]]

    assert trained(dk.ScaleReport(every=1)) == trained()


def test_a_static_scale_and_none_have_the_same_fields() -> None:
    for policy, scale in (("fp16-mixed,loss_scale=1024", 1024.0), ("bf16", 1.0)):
        history = fit(build(scaled(policy)), "x.", dk.ScaleReport())
        assert (history["loss_scale"], history["skipped"]) == ([scale], [1])


def test_an_optimizer_without_a_loss_scale_is_named_once() -> None:
    report, model = dk.ScaleReport(), build(keras.optimizers.SGD(0.01))
    with pytest.warns(DuotoneWarning, match="SGD, which has no loss scale: ScaleReport has nothing to report") as said:
        history = fit(model, "..", report)
    assert set(history) == {"loss"}
    assert "runs.py" in [Path(each.filename).name for each in said]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DuotoneWarning)
        fit(model, "..", report)


def test_keras_own_scaler_tells_its_scale_alone() -> None:
    model = build(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=1024.0))
    with pytest.warns(DuotoneWarning) as said:
        history = fit(model, "..", dk.ScaleReport())
    assert history["loss_scale"] == [1024.0]
    assert set(history) == {"loss", "loss_scale"}
    (sentence,) = [str(each.message) for each in said if "LossScaleOptimizer" in str(each.message)]
    assert "has no floor and no ceiling" in sentence
    assert "nobody counts what it skips" in sentence


def test_an_optimizer_that_should_scale_and_does_not_is_named_once() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = build(keras.optimizers.SGD(0.01), auto_scale_loss=False)
    with pytest.warns(DuotoneWarning) as said:
        fit(model, "..", dk.ScaleReport())
    assert len([each for each in said if "SGD" in str(each.message)]) == 1


def test_the_same_callback_serves_one_fit_after_another() -> None:
    report = dk.ScaleReport()
    assert fit(build(), "x..", report)["skipped"] == [1]
    assert fit(build(), "..", report)["skipped"] == [0]


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", None), ("every", 2.0), ("patience", True)])
def test_counts_are_counts(name: str, value: Any) -> None:
    with pytest.raises(LossScaleError, match=f"{name} is {value!r}; it must be a whole number from 1 on"):
        dk.ScaleReport(**{name: value})
