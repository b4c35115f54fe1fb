"""The transition of a loss scale in a framework whose dtypes do not mix, such as TensorFlow."""

import operator
from functools import partialmethod

from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.loss_scale import LossScaleState, init_state, update

from .test_loss_scale import any_settings


class Strict:
    """A number as TensorFlow has it: dtypes do not mix, and flags are neither added to numbers nor compared."""

    def __init__(self, value):
        self.value, self.dtype = value, type(value)

    def apply(self, other, operation, takes, gives=None):
        # a Python number is taken in the dtype of what it stands beside
        other = other if isinstance(other, Strict) else Strict(self.dtype(other) if takes == "numbers" else other)
        assert self.dtype is other.dtype
        assert (self.dtype is bool) == (takes == "flags")
        return Strict((gives or self.dtype)(operation(self.value, other.value)))

    __add__ = partialmethod(apply, operation=operator.add, takes="numbers")
    __mul__ = partialmethod(apply, operation=operator.mul, takes="numbers")
    __truediv__ = partialmethod(apply, operation=operator.truediv, takes="numbers")
    __sub__ = partialmethod(apply, operation=operator.sub, takes="numbers")
    __gt__ = partialmethod(apply, operation=operator.gt, takes="numbers", gives=bool)
    __ge__ = partialmethod(apply, operation=operator.ge, takes="numbers", gives=bool)
    __lt__ = partialmethod(apply, operation=operator.lt, takes="numbers", gives=bool)
    __eq__ = partialmethod(apply, operation=operator.eq, takes="numbers", gives=bool)
    __ne__ = partialmethod(apply, operation=operator.ne, takes="numbers", gives=bool)
    __or__ = partialmethod(apply, operation=operator.or_, takes="flags")
    __and__ = partialmethod(apply, operation=operator.and_, takes="flags")
    __hash__ = None


def strict_where(condition, if_true, if_false):
    """Return one of two values of one dtype."""
    pair = [each if isinstance(each, Strict) else Strict(each) for each in (if_true, if_false)]
    assert condition.dtype is bool
    assert pair[0].dtype is pair[1].dtype
    return pair[0] if condition.value else pair[1]


@settings(deadline=None)
@given(any_settings(), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=30))
def test_flags_that_are_integers_do_where_flags_are_no_numbers(loss_scale, rows):
    expected = init_state(loss_scale)
    state = LossScaleState(**{name: Strict(value) for name, value in vars(expected).items()})
    for found_inf, finite in rows:
        expected = update(loss_scale, expected, found_inf, loss_is_finite=finite)
        state = update(loss_scale, state, Strict(found_inf), loss_is_finite=Strict(finite), where=strict_where)
        assert {name: leaf.value for name, leaf in vars(state).items()} == vars(expected)
        assert [leaf.dtype for leaf in vars(state).values()] == [float, *[int] * 5]
