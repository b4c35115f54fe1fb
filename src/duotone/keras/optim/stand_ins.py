"""What stands in for a 16-bit variable where an optimizer wants one: its FP32 master, as a variable of Keras.

    value          decode(weight, tail)
    assign(value)  weight, tail = encode(value)

It has the weight's name, path, shape, layout and constraint, dtype float32, and no storage. Built on such variables, an
optimizer of Keras makes its own in FP32, and reads, decays, constrains, averages and updates masters.
"""

from typing import Any, Protocol

import keras

from duotone.errors import OptimizerError
from duotone.keras import internals
from duotone.keras.internals import ops
from duotone.keras.weights.codec import LARGEST_OF_FLOAT16, TAIL_DTYPE, decode, encode

# a tensor of the backend
Tensor = Any


class Keeper(Protocol):
    """What knows whether tails are still those of their weights."""

    is_in_step: bool

    def is_known(self, index: int) -> Tensor:
        """Return whether the tail of the weight `index` is its own: bool, 0-d."""
        ...

    def note(self, index: int) -> None:
        """Remember that the tail of the weight `index` is its own now."""
        ...


class Master(internals.StoragelessVariable):
    """The FP32 master of a 16-bit variable.

    Args:
        weight: the variable, BF16 or FP16.
        tail: int16, of its shape.
        index: the weight's place in what `keeper` keeps.
        keeper: is asked outside of steps, and told.
    """

    def __init__(self, weight: keras.Variable, tail: keras.Variable, index: int, keeper: Keeper) -> None:
        self.weight, self.tail = weight, tail
        self._index, self._keeper = index, keeper
        super().__init__(weight, "float32")

    @property
    def value(self) -> Tensor:
        """The master, FP32, of the variable's shape."""
        return self.read()

    @property
    def constraint(self) -> Any:
        """The weight's."""
        return self.weight.constraint

    def read(self) -> Tensor:
        """Return the master; of a weight that others have written into since, the weight itself."""
        tail = ops.convert_to_tensor(self.tail)
        if not self._keeper.is_in_step:
            tail = tail * ops.cast(self._keeper.is_known(self._index), TAIL_DTYPE)
        return decode(ops.convert_to_tensor(self.weight), tail)

    def write(self, value: Tensor) -> None:
        """Set the master."""
        dtype = keras.backend.standardize_dtype(self.weight.dtype)
        if dtype == "float16":
            # a weight of Inf would spoil the model at once; values that are Inf and NaN are the optimizer's own
            held = ops.clip(value, -LARGEST_OF_FLOAT16, LARGEST_OF_FLOAT16)
            value = ops.where(ops.isfinite(value), held, value)
        weight, tail = encode(value, dtype)
        self.weight.assign(weight)
        self.tail.assign(tail)
        if not self._keeper.is_in_step:
            self._keeper.note(self._index)

    def assign(self, value: Any) -> Tensor:
        """Set the master to a value of the variable's shape."""
        value = ops.convert_to_tensor(value, dtype="float32")
        if tuple(value.shape) != tuple(self.shape):
            raise OptimizerError(
                f'the master of "{self.path}" has shape {tuple(self.shape)}, but the value that is assigned to it has '
                f"{tuple(value.shape)}"
            )
        self.write(value)
        return value

    def close(self, *, keep: bool) -> None:
        """End what a step has begun with this master, with or without what it wrote last."""


class MasterInPlace(Master):
    """A master that torch's optimizers may change in place, `variable.value.add_(..)`, during a step."""

    _open: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The master; in a step the same tensor each time, whose values are written at its end."""
        if self._open is not None:
            return self._open
        value = self.read()
        if self._keeper.is_in_step:
            self._open = value
        return value

    def write(self, value: Tensor) -> None:
        if self._open is not None:
            self._open.copy_(value)
        else:
            super().write(value)

    def close(self, *, keep: bool) -> None:
        value, self._open = self._open, None
        if keep and value is not None:
            super().write(value)


class MasterOfTensorFlow(Master):
    """A master that TensorFlow's optimizers take for a `tf.Variable`: `value` is what has `assign_sub` and the like."""

    _device: str | None = None
    _mirrored: Any = None

    @property
    def value(self) -> Any:
        """This very variable, which becomes a tensor where one is wanted, or what a strategy knows how to update."""
        import tensorflow as tf

        if not isinstance(self.weight.value, tf.distribute.DistributedValues):
            return self
        if self._mirrored is None:
            self._mirrored = MirroredMaster(self)
        return self._mirrored

    def on_each_device(self) -> list["MasterOfTensorFlow"]:
        """Return a master for every replica of the weight."""
        masters = []
        for replica in self.weight.value.values:
            master = type(self)(self.weight, self.tail, self._index, self._keeper)
            master._device, master._mirrored = replica.device, self.value
            masters.append(master)
        return masters

    @property
    def device(self) -> str:
        """Where the master is computed."""
        return self.weight.value.device if self._device is None else self._device

    @property
    def handle(self) -> Any:
        """The weight's, beside which TensorFlow puts what the optimizer makes for the master."""
        return self.weight.value.handle

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return ops.cast(self.read(), dtype.name) if dtype is not None else self.read()

    def numpy(self) -> Any:
        return self.read().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    # what Keras' variables ask their `value` for by these names, rather than through an operation
    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def __neg__(self) -> Tensor:
        return -self.read()

    def __pos__(self) -> Tensor:
        return self.read()

    def __abs__(self) -> Tensor:
        return abs(self.read())

    def __float__(self) -> float:
        return float(self.read())

    def scatter_update(self, sparse_delta: Any) -> None:
        """Set rows of the master; `sparse_delta` is a `tf.IndexedSlices`."""
        self._scatter("tensor_scatter_nd_update", sparse_delta)

    def scatter_add(self, sparse_delta: Any) -> None:
        """Add to rows of the master."""
        self._scatter("tensor_scatter_nd_add", sparse_delta)

    def scatter_sub(self, sparse_delta: Any) -> None:
        """Subtract from rows of the master."""
        self._scatter("tensor_scatter_nd_sub", sparse_delta)

    def _scatter(self, name: str, slices: Any) -> None:
        import tensorflow as tf

        self.write(getattr(tf, name)(self.read(), slices.indices[:, None], slices.values))


class MirroredMaster:
    """A master to a `tf.distribute.Strategy`, which takes it for the weight's own variable on all devices.

    Strategies update what is an instance of a class of theirs, `values` of it one by one. What reads and writes is the
    master, on the device on which it is asked to.
    """

    def __init__(self, master: MasterOfTensorFlow) -> None:
        self._master = master
        self._values: tuple[MasterOfTensorFlow, ...] | None = None

    # isinstance() asks for it
    __class__: Any = property(lambda self: type(self._master.weight.value))

    @property
    def values(self) -> tuple[MasterOfTensorFlow, ...]:
        """The masters on each device."""
        if self._values is None:
            self._values = tuple(self._master.on_each_device())
        return self._values

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return self._master.__tf_tensor__(dtype, name)

    def __getattr__(self, name: str) -> Any:
        of_master = {"dtype", "shape", "name", "assign", "assign_add", "assign_sub", "numpy", "read", internals.KEY}
        return getattr(self._master if name in of_master else self._master.weight.value, name)


def master_class() -> type[Master]:
    """Return the kind of masters that the backend's optimizers can work on."""
    kinds = {"torch": MasterInPlace, "tensorflow": MasterOfTensorFlow}
    return kinds.get(keras.backend.backend(), Master)
