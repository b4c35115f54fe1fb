"""A callback that shows the loss scale, holds what counts epochs, and ends a run that only skips."""

import math
from typing import Any

import keras

from duotone.call_site import warn
from duotone.errors import LossScaleError
from duotone.keras.checking import unsafe_model, unsafe_scaling
from duotone.keras.internals import calling_list
from duotone.keras.optim.loss_scale_optimizer import LossScaleOptimizer
from duotone.keras.optim.narrow_variables import check_variables
from duotone.keras.report import progress_bar
from duotone.keras.report.collapse import PATIENCE, raise_if_collapsed
from duotone.keras.report.reading import Reading, read
from duotone.keras.report.schedules import EpochHold

# how many batches may pass between two readings, where nothing else is said
EVERY = 50


class ScaleReport(keras.callbacks.Callback):
    """Shows a run's loss scale in its logs, holds schedules of epochs that trained nothing, ends a run that only skips.

    The logs of batches and epochs, and so `History`, `CSVLogger`, `TensorBoard` and whatever reads logs, get three
    fields, wherever in the list of callbacks this one stands (it moves itself to the front of Keras' list):

    - `loss_scale`: what the last loss was multiplied by;
    - `skipped`: steps skipped in all, since the optimizer was made, those before a save included;
    - `grad_norm`: of the last step, of its true gradients, before clipping; Inf or NaN if it was skipped.

    The progress bar has `loss_scale` in the last line of an epoch, and `skipped` if a step of it was.

    **What it costs.** Reading a number waits for the device, so the optimizer is read at the end of an epoch, and
    within it after the batches 1, 2, 4, 8 and so on, until `every` lie between two readings. The logs of a batch have
    what the last reading found; those of the very first have none. Nothing else waits: callbacks go on to run beside
    the device, and on JAX the variables stay where `fit` keeps them.

    **What is held.** An epoch whose every step was skipped does not count: `LearningRateScheduler` is asked for the
    same epoch again, with the learning rate from before it; `ReduceLROnPlateau`, its cooldown too, and `EarlyStopping`
    do not count it against their patience. Not held are epochs with a step that was not skipped, the number of epochs
    of `fit`, and other callbacks that count for themselves; and a run that is resumed begins to count anew. Schedules
    of steps, as `keras.optimizers.schedules` are, need no hold: a skipped step does not move `iterations`.

    **How a run ends.** Where gradients overflow at the floor of a dynamic loss scale twice in a row, or `patience`
    steps in a row are skipped, `fit` raises. The model then has the weights of the last good step, on every backend.

    A model whose optimizer is no `LossScaleOptimizer` of Duotone's trains as without this callback; it says so once.

    Args:
        every: at most how many batches lie between two readings; 1 waits for every step.
        patience: how many steps in a row may be skipped; that many raise. None for any number.

    Raises:
        LossScaleError: `every` or `patience` is no count.
        LossScaleCollapse: from `fit`; the message names the layer to look at.
        NonFiniteLoss: from `fit`; the loss itself is Inf or NaN.

    >>> import duotone.keras as dk
    >>> import numpy as np
    >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(dk.LossScaleOptimizer(keras.optimizers.SGD(0.1), "fp16-mixed"), "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0, callbacks=[dk.ScaleReport()])
    >>> history.history["loss_scale"], history.history["skipped"]
    ([65536.0], [0])
    """

    # on_train_batch_end reads nothing of the model
    async_safe = True

    def __init__(self, every: int = EVERY, *, patience: int | None = PATIENCE) -> None:
        super().__init__()
        for name, value in (("every", every), ("patience", patience)):
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LossScaleError(f"{name} is {value!r}; it must be a whole number from 1 on")
        self.every = every
        self.patience = patience
        self._trained: Any = None
        self._was_checked = False
        self._hold = EpochHold(())
        self._fields: dict[str, float] = {}
        self._at_epoch_start = Reading({})
        self._batches_before, self._last_batch, self._next_reading = 0, -1, 1
        self._loss: float | None = None

    def set_model(self, model: Any) -> None:
        """Move to the front of the list of callbacks, and look at the model."""
        super().set_model(model)
        # on JAX `self.model` puts all values back into their variables, each time
        self._trained = self.model
        if not self._was_checked:
            self._was_checked = True
            self._check(self._trained)
        callbacks = calling_list()
        if callbacks is not None:
            # the list asks them in turn just now; those that were asked go on one place
            callbacks.remove(self)
            callbacks.insert(0, self)
            progress_bar.put_into(callbacks)
        self._hold = EpochHold(callbacks or ())

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Read what there was before."""
        self._fields = {}
        self._at_epoch_start = self._read()
        self._batches_before, self._last_batch, self._next_reading = 0, -1, 1

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Hold schedules after an epoch that trained nothing."""
        self._batches_before += self._last_batch + 1
        self._last_batch, self._loss = -1, None
        self._hold.begin_epoch(self._trained.optimizer)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Read what the last batch left, if it is time."""
        if batch == 0:
            self._hold.begin_training()
        done = self._batches_before + batch
        if done >= self._next_reading:
            self._take(self._read(), done)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Give the logs what the last reading found; this may run on any thread, while the next batch is trained."""
        self._last_batch = max(self._last_batch, batch)
        if isinstance(logs, dict):
            # batches may come out of order, and the mean of an epoch stays Inf or NaN
            if self._loss is None or math.isfinite(self._loss):
                self._loss = logs.get("loss")
            logs.update(self._fields)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Read what the epoch left."""
        before, after = self._at_epoch_start, self._read()
        self._at_epoch_start = after
        logs = logs if logs is not None else {}
        logs.update(after.fields)
        self._hold.end_epoch(epoch, before, after, logs)
        self._take(after, self._batches_before + self._last_batch + 1)

    def _check(self, model: Any) -> None:
        """Warn of what is unsafe in a model and in how it is trained, each once."""
        optimizer = model.optimizer
        unsafe = list(unsafe_scaling(model, optimizer))
        for finding in [*unsafe_model(model), *unsafe]:
            warn(finding)
        if isinstance(optimizer, LossScaleOptimizer):
            # which says itself what becomes of its variables
            return
        for finding in check_variables(optimizer, model.trainable_variables):
            warn(finding)
        if not unsafe:
            warn(
                f"this model is trained by {type(optimizer).__name__}, which has no loss scale: ScaleReport has "
                "nothing to report; compile the model with duotone.keras.LossScaleOptimizer(optimizer, policy), or "
                "leave ScaleReport out"
            )

    def _read(self) -> Reading:
        return read(self._trained)

    def _take(self, reading: Reading, done: int) -> None:
        """Keep what a reading found after so many batches, and raise if the run only skips."""
        self._fields = reading.fields
        self._next_reading = done + min(max(done, 1), self.every)
        if self.patience is not None and reading.step is not None:
            raise_if_collapsed(self._trained, reading.step, patience=self.patience, loss=self._loss)
