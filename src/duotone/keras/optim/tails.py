"""The tails of an optimizer's 16-bit variables, and whether they are still those of their weights.

A step leaves a checksum of every weight it has written. Where the next one finds another, someone has written into the
weight since, and its tail is 0 from then on: the weight is taken as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from duotone.errors import OptimizerError
from duotone.keras import internals
from duotone.keras.internals import ops
from duotone.keras.optim.stand_ins import Master, master_class
from duotone.keras.weights.checksums import checksum
from duotone.keras.weights.codec import SPLIT_DTYPES, TAIL_DTYPE


def is_split(variable: Any) -> bool:
    """Return whether a variable gets a master: one in 16 bits that its gradient does not overwrite."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return dtype in SPLIT_DTYPES and not getattr(variable, "overwrite_with_gradient", False)


class Tails:
    """Tails and checksums, as variables of an optimizer, and the masters that they make of 16-bit variables.

    Args:
        optimizer: the one that the variables are to be part of.
        variables: all trainable ones.

    Raises:
        OptimizerError: one in 16 bits is not Keras'.

    Attributes:
        masters: of the 16-bit variables, in their order.
        is_in_step: whether masters are those of a step, whose weights have been looked at.
    """

    def __init__(self, optimizer: Any, variables: Iterable[keras.Variable]) -> None:
        self._optimizer = optimizer
        self.is_in_step = False
        weights = [each for each in variables if is_split(each)]
        for weight in weights:
            if not isinstance(weight, keras.Variable):
                raise OptimizerError(
                    f"Masters takes variables of Keras, not the {type(weight).__name__} {weight.name}; make it a "
                    "keras.Variable"
                )
        tails = []
        for weight in weights:
            with internals.beside(optimizer, weight):
                tails.append(
                    optimizer.add_variable(
                        weight.shape,
                        dtype=TAIL_DTYPE,
                        layout=internals.layout_of(weight),
                        name=f"{weight.path.replace('/', '_')}_tail",
                    )
                )
        # 0 for those that are not known
        self._checksums = optimizer.add_variable((len(weights),), dtype="int32", name="checksums")
        kind = master_class()
        self.masters: Sequence[Master] = [
            kind(*pair, index, self) for index, pair in enumerate(zip(weights, tails, strict=True))
        ]
        self._master_of = {id(master.weight): master for master in self.masters}

    def stand_in(self, variable: Any) -> Any:
        """Return a variable's master, or the variable itself where it has none."""
        return self._master_of.get(id(variable), variable)

    def is_known(self, index: int) -> Any:
        """Return whether the tail of the weight `index` is its own: bool, 0-d."""
        kept = self._checksums[index]
        return ops.logical_or(kept == 0, kept == checksum(ops.convert_to_tensor(self.masters[index].weight)))

    def note(self, index: int) -> None:
        """Remember that the tail of the weight `index` is its own now."""
        new = checksum(ops.convert_to_tensor(self.masters[index].weight))
        places = ops.arange(len(self.masters), dtype="int32")
        self._checksums.assign(ops.where(places == index, new, ops.convert_to_tensor(self._checksums)))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return a context in which masters are read and written as often as it takes."""
        if self.masters:
            internals.update_each(self._optimizer, [master.tail for master in self.masters], self._look)
        self.is_in_step = True
        is_done = False
        try:
            yield
            is_done = True
        finally:
            for master in self.masters:
                master.close(keep=is_done)
            self.is_in_step = False
        if self.masters:
            internals.update_each(self._optimizer, [self._checksums], self._note_all)

    def _look(self, index: int) -> None:
        tail = self.masters[index].tail
        tail.assign(ops.convert_to_tensor(tail) * ops.cast(self.is_known(index), TAIL_DTYPE))

    def _note_all(self, _: int) -> None:
        self._checksums.assign(ops.stack([checksum(ops.convert_to_tensor(master.weight)) for master in self.masters]))
