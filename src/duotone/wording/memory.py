"""Bytes of training by role, as a line and as a table."""

from dataclasses import dataclass, fields
from typing import Any

from duotone.wording.notebook import block, table
from duotone.wording.words import count, size


@dataclass(frozen=True)
class Memory:
    """Bytes by role, activations apart.

    In torch, where parameters are sharded, those of this rank's parts. `str()` says them in one line, and a notebook
    shows a table.

    Attributes:
        parameters: how many elements trainable parameters have.
        weights_bytes: resident trainable weights.
        tails_bytes: what the weights lack to be the FP32 masters.
        gradients_bytes: one gradient for every trainable parameter, in the dtype it accumulates in.
        moments_bytes: the optimizer's state of the parameters' shapes: its moments, and what else it keeps for each
            weight, such as the compensation of a Kahan summation.
        other_bytes: frozen weights with what tails they have, buffers, and step counts.
        averages_bytes: what a `duotone.torch.Average` of the model keeps.
    """

    parameters: int
    weights_bytes: int
    tails_bytes: int
    gradients_bytes: int
    moments_bytes: int
    other_bytes: int
    averages_bytes: int = 0

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of weight, tail, gradient, moments and average per trainable parameter; 0 without any."""
        kept = self.weights_bytes + self.tails_bytes + self.gradients_bytes
        total = kept + self.moments_bytes + self.averages_bytes
        return total / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(number)}" for name, number, _ in self._rows())
        return f"{self._header()}: {parts}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        headings = ("", False), ("bytes", True), ("per parameter", True)
        return block(
            self._header(), table(headings, [(name, size(number), each) for name, number, each in self._rows()])
        )

    def _header(self) -> str:
        return f"{self.bytes_per_parameter:g} bytes for each of {count(self.parameters, 'parameter')}"

    def _rows(self) -> list[tuple[str, int, str]]:
        """Return each role, its bytes, and those for each parameter as text."""
        # most models have no average
        names = [each.name for each in fields(self)[1:] if each.name != "averages_bytes" or self.averages_bytes]
        numbers = {name.removesuffix("_bytes"): getattr(self, name) for name in names}
        each = {name: f"{number / self.parameters:.3g}" if self.parameters else "" for name, number in numbers.items()}
        return [(name, number, "" if name == "other" else each[name]) for name, number in numbers.items()]
