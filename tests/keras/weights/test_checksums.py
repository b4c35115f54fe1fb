"""Checksums notice every change of one element, every exchange, and a transposition."""

import numpy as np
import pytest
from keras import ops

from duotone.keras.weights.checksums import checksum


def of(values, dtype="bfloat16"):
    return int(checksum(ops.cast(values, dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_change_of_one_element_anywhere_is_noticed(dtype):
    values = np.random.default_rng(0).integers(-8, 8, (3, 4)).astype(np.float32)
    sums = {of(values, dtype)}
    for place in np.ndindex(values.shape):
        changed = values.copy()
        changed[place] += 0.5
        sums.add(of(changed, dtype))
    assert len(sums) == 1 + values.size


def test_exchanges_and_transpositions_are_noticed():
    values = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    others = [values.T, values[::-1], values[:, ::-1], values[[1, 0, 2, 3]], values[:, [0, 2, 1, 3]]]
    assert len({of(values), *map(of, others)}) == 6


def test_it_is_never_0_and_the_same_number_on_every_backend():
    assert [of(np.zeros(shape, np.float32)) for shape in ((), (0,), (2, 3))] == [1, 1, 1]
    assert of(np.arange(6, dtype=np.float32).reshape(2, 3)) == int(
        np.sum(
            np.array([0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0])
            * ((2 * np.arange(2) + 1) * 40503)[:, None].repeat(3, 1).ravel()
            * np.tile((2 * (np.arange(3) + 7919) + 1) * 40503, 2)
        ).astype(np.int32)
    )
