"""Keras' progress bar beside a `ScaleReport`: as wide as without it while an epoch runs, and counts without fractions.

Keras writes the bar over itself with every batch, and a terminal that is narrower than the bar gets a new line each
time. So what an epoch left is in its last line, as what validation found is.
"""

from typing import Any

import keras

FIELDS = ("loss_scale", "skipped", "grad_norm")


class Whole(float):
    """A number that Keras' bar, which writes four digits of any, writes as it is where it is whole.

    >>> f"{Whole(65536):.4f}", f"{Whole(0) / 1:.4e}", f"{Whole(0.5):.4f}"
    ('65536', '0', '0.5')
    """

    def __truediv__(self, count: float) -> "Whole":
        return Whole(float(self) / count)

    def __format__(self, spec: str) -> str:
        return f"{float(self):.0f}" if self.is_integer() else f"{float(self):g}"


class ProgressBar(keras.callbacks.ProgbarLogger):
    """The progress bar of Keras with the loss scale at the end of an epoch, and the skipped steps if it has any."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Show the batch, without what a `ScaleReport` adds."""
        super().on_train_batch_end(batch, without_fields(logs))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Show the epoch."""
        logs = logs or {}
        shown = without_fields(logs)
        if "loss_scale" in logs:
            shown["loss_scale"] = Whole(logs["loss_scale"])
        skipped = logs.get("skipped", 0.0)
        if skipped > self._skipped:
            shown["skipped"] = Whole(skipped)
        self._skipped = skipped
        super().on_epoch_end(epoch, shown)


def without_fields(logs: dict[str, Any] | None) -> dict[str, Any]:
    """Return logs without what a `ScaleReport` adds to them."""
    return {name: value for name, value in (logs or {}).items() if name not in FIELDS}


def put_into(callbacks: list[Any]) -> None:
    """Put this progress bar in the place of Keras' own, which is not asked for its model and parameters yet."""
    for place, each in enumerate(callbacks):
        if type(each) is keras.callbacks.ProgbarLogger:
            callbacks[place] = ProgressBar()
