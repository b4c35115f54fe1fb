"""Loss scaling as one pure transition: one source for Python floats and NumPy, torch, JAX and TensorFlow arrays.

FP16 gradients underflow, so the loss is multiplied by a scale (scaled = true * scale) that is found by trial:
the largest power of two whose gradients stay finite (Micikevicius et al., arXiv:1710.03740, section 3.2).
Halving it at every overflow costs a batch each time, so where the very first step overflows the scale is searched for
from below: it falls to 1 at once, and is multiplied by 4 after each clean step, until it is next to a scale that
overflows. That takes two skipped steps at most, and ends at half the right scale or above. The step that ended it may
have been an odd one, so after 64 clean steps the search goes on from there once more. `update` states the equations.
Applying the scale, looking for Inf and NaN, and giving up at the floor are left to the callers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from duotone.errors import LossScaleError

# a Python number, or an array or tensor of any framework and any shape
Number = Any

# every setting must be a normal FP32 number: the scale usually lives on a device as one
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127


@dataclass(frozen=True)
class LossScale:
    """The settings of a loss scale: dynamic by default; static and none are the same thing standing still.

    Attributes:
        init_scale: the first scale. If the first step overflows at it, the right one is searched for below it.
        growth_factor: what the scale is multiplied by after a clean window; 1 or more.
        backoff_factor: what it is multiplied by when it backs off; above 0, at most 1.
        growth_interval: the length of a clean window: steps in a row without overflow.
        hysteresis: which overflow since the last clean window is the first to back off; 1 tolerates none.
        min_scale: the floor.
        max_scale: the ceiling.

    Raises:
        LossScaleError: a scale, factor or bound is not a power of two, or a setting is out of range.

    >>> LossScale.parse("dynamic") == LossScale() == LossScale.dynamic()
    True
    >>> LossScale.static(1024).is_dynamic, LossScale.none().is_none
    (False, True)
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("growth_interval", "hysteresis"):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise LossScaleError(f"{field.name} must be a whole number from 1 on, not {value!r}")
            else:
                object.__setattr__(self, field.name, _power_of_two(field.name, value))
        if self.growth_factor < 1:
            raise LossScaleError(f"growth_factor must be 1 or more, not {self.growth_factor}")
        if self.backoff_factor > 1:
            raise LossScaleError(f"backoff_factor must be at most 1, not {self.backoff_factor}")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise LossScaleError(
                f"init_scale {self.init_scale} must lie between min_scale {self.min_scale} "
                f"and max_scale {self.max_scale}; move it or the bound"
            )

    @classmethod
    def dynamic(cls, **overrides: Any) -> LossScale:
        """Return a scale that finds its own value; `overrides` are settings by name."""
        return cls(**overrides)

    @classmethod
    def static(cls, scale: float) -> LossScale:
        """Return a scale that stays at `scale`, a power of two from 1 to 2**32."""
        return cls(init_scale=scale, growth_factor=1.0, backoff_factor=1.0)

    @classmethod
    def none(cls) -> LossScale:
        """Return the scale that does nothing: 1, for ever."""
        return cls.static(1.0)

    @classmethod
    def parse(cls, value: str | float) -> LossScale:
        """Return the settings for what `Policy.loss_scale` holds: "none", "dynamic" or a static scale.

        >>> LossScale.parse("1024") == LossScale.parse(1024) == LossScale.static(1024)
        True

        Raises:
            LossScaleError: `value` is neither of the two words nor a power of two from 1 to 2**32.
        """
        if value == "none":
            return cls.none()
        if value == "dynamic":
            return cls.dynamic()
        try:
            return cls.static(float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise LossScaleError(
                f"loss scale {value!r} is not known; write none, dynamic, or a power of two from 1 to 2**32"
            ) from error

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale can move."""
        return self.growth_factor != 1 or self.backoff_factor != 1

    @property
    def is_none(self) -> bool:
        """Whether scaling by it changes nothing."""
        return not self.is_dynamic and self.init_scale == 1


@dataclass(frozen=True)
class LossScaleState:
    """What a loss scale remembers between steps. Leaves are Python numbers, or arrays of one shape.

    Attributes:
        scale: the factor of the next loss: float, or a float32 array.
        growth_tracker: clean steps since the last overflow or full window: int, or an int32 array, as all
            below.
        hysteresis_tracker: overflows that will still be tolerated before one backs off.
        skipped: steps skipped in all.
        skipped_in_a_row: steps skipped since the last clean one.
        search: 2 until the first step, 1 while the scale is searched for from below, 3 between that and a second look,
            4 while it is searched for again, 0 from then on. The Python number 0 may stand beside arrays: it is known
            then that there is no search, and none is computed.
    """

    scale: Number
    growth_tracker: Number
    hysteresis_tracker: Number
    skipped: Number
    skipped_in_a_row: Number
    search: Number = 0


# what the scale is multiplied by after each clean step of a search, and where one starts, if settings allow it
_STRIDE, _START = 4.0, 1.0
# clean steps between what ends a search and the second look
_PAUSE = 64


def init_state(settings: LossScale) -> LossScaleState:
    """Return the state before the first step, in Python numbers.

    >>> init_state(LossScale(hysteresis=2)).hysteresis_tracker
    1
    """
    moves_both_ways = settings.growth_factor != 1 and settings.backoff_factor != 1
    return LossScaleState(settings.init_scale, 0, settings.hysteresis - 1, 0, 0, 2 if moves_both_ways else 0)


def select(condition: Any, if_true: Any, if_false: Any) -> Any:
    """Return `if_true` or `if_false`: `where` for Python numbers."""
    return if_true if condition else if_false


def update(
    settings: LossScale,
    state: LossScaleState,
    found_inf: Number,
    *,
    loss_is_finite: Number = True,
    where: Callable[[Any, Any, Any], Any] = select,
) -> LossScaleState:
    """Return the state after one step, which was skipped if its gradients held an Inf or a NaN.

    With scale s, growth tracker g, hysteresis tracker h, and the settings' names for the rest:

        overflow, h > 0:     g' = 0,      h' = h - 1,           s' = s
        overflow, h = 0:     g' = 0,      h' = 0,               s' = max(s * backoff_factor, min_scale)
        clean, window full:  g' = 0,      h' = hysteresis - 1,  s' = min(s * growth_factor, max_scale)
        clean otherwise:     g' = g + 1,  h' = h,               s' = s

    where a clean step fills the window if g + 1 >= growth_interval. A full window restores the tolerance even
    where the scale is at its ceiling already, so the overflow after it is treated like the first. At
    hysteresis 1 and away from the bounds this is torch.amp's rule. A scale that cannot move has no windows:
    its trackers stay as they are. So does all but the counts of skipped steps where the loss itself was Inf or
    NaN, for no scale can help there.

    That is the rule once the scale is settled: search r = 0. Before, with start = min(max(1, min_scale), init_scale):

        r = 2, overflow, h = 0:  r' = 1,  s' = start
        r = 2, clean:            r' = 0,  and as above
        r = 1, overflow, h = 0:  r' = 1 if the step before was skipped too, else 3;  s' = max(s / 4, min_scale)
        r = 1, clean:            r' = 1,  s' = min(4 s, init_scale / 2), if 2 s < init_scale;  else r' = 0, and as above
        r = 3, overflow, h = 0:  r' = 0,  and as above
        r = 3, clean:            r' = 3,  and as above, until g + 1 >= 64: from then on as if r were 4
        r = 4:                   as r = 1, but for r' = 4 where that has 1, and 0 after an overflow

    There is no branch on data: with an array framework's `where` (np.where, torch.where, jnp.where, tf.where) nothing
    waits for a device, many scales can share one array, and dtypes are kept. A framework may trace it.

    Args:
        settings: the loss scale's settings.
        state: the state before the step.
        found_inf: whether the step overflowed: a bool, or any number or array that is 0 for a clean step; NaN
            is an overflow. Shape as the state's leaves. TensorFlow compares no bool with 0: give it an integer there.
        loss_is_finite: whether the loss was a finite number before it was scaled: a bool, or as `found_inf`.
        where: the framework's element-wise choice; the default is for Python numbers.

    >>> settings = LossScale()
    >>> state, scales = init_state(settings), []
    >>> for _ in range(10):  # gradients overflow from 2**11 on
    ...     state = update(settings, state, state.scale >= 2**11)
    ...     scales.append(int(state.scale))
    >>> scales, state.skipped
    ([1, 4, 16, 64, 256, 1024, 4096, 1024, 1024, 1024], 2)
    """
    overflow = found_inf != 0
    # not state.skipped + overflow: TensorFlow adds no flags to numbers
    skipped = where(overflow, state.skipped + 1, state.skipped)
    skipped_in_a_row = where(overflow, state.skipped_in_a_row + 1, 0)
    if not settings.is_dynamic:
        return replace(state, skipped=skipped, skipped_in_a_row=skipped_in_a_row)

    if loss_is_finite is not True:
        # an overflow that says nothing about the scale
        says_something = where(overflow, loss_is_finite != 0, True)
        moved = update(settings, state, found_inf, where=where)
        pairs = {
            name: (getattr(moved, name), getattr(state, name))
            for name in ("scale", "growth_tracker", "hysteresis_tracker", "search")
        }
        # a search that is known to be over stays the Python number
        kept = {name: old if new is old else where(says_something, new, old) for name, (new, old) in pairs.items()}
        return replace(moved, **kept)

    window_is_full = state.growth_tracker + 1 >= settings.growth_interval
    tolerated = state.hysteresis_tracker > 0

    shrunk = state.scale * settings.backoff_factor
    shrunk = where(shrunk < settings.min_scale, settings.min_scale, shrunk)
    # clamped before it is multiplied, for the product with the largest scale may not be a number of its dtype
    highest = settings.max_scale / settings.growth_factor
    grown = where(state.scale > highest, highest, state.scale) * settings.growth_factor

    after_clean, search = where(window_is_full, grown, state.scale), state.search
    if type(search) is not int or search:
        shrunk, after_clean, search = _search(settings, state, overflow, tolerated, shrunk, after_clean, where)
    return LossScaleState(
        scale=where(overflow, where(tolerated, state.scale, shrunk), after_clean),
        growth_tracker=where(overflow | window_is_full, 0, state.growth_tracker + 1),
        hysteresis_tracker=where(
            overflow,
            where(tolerated, state.hysteresis_tracker - 1, 0),
            where(window_is_full, settings.hysteresis - 1, state.hysteresis_tracker),
        ),
        skipped=skipped,
        skipped_in_a_row=skipped_in_a_row,
        search=search,
    )


def _search(
    settings: LossScale,
    state: LossScaleState,
    overflow: Number,
    tolerated: Number,
    shrunk: Number,
    after_clean: Number,
    where: Callable[[Any, Any, Any], Any],
) -> tuple[Number, Number, Number]:
    """Return the scale after an overflow and after a clean step, given those of the settled rule, and the search."""
    start = min(max(_START, settings.min_scale), settings.init_scale)
    begins, climbs, waits = state.search == 2, (state.search == 1) | (state.search == 4), state.search == 3
    looks_again = waits & (state.growth_tracker + 1 >= _PAUSE)
    stride_back = state.scale / _STRIDE
    stride_back = where(stride_back < settings.min_scale, settings.min_scale, stride_back)
    after_overflow = where(climbs, stride_back, where(begins, start, shrunk))
    # next to a scale that overflows there is none to try
    goes_on = (climbs | looks_again) & (state.scale * 2 < settings.init_scale)
    highest = settings.init_scale / (2 * _STRIDE)
    climbed = where(state.scale > highest, highest, state.scale) * _STRIDE
    # before the first clean step one batch alone may be at fault, or the right scale is below 1
    over = state.search * 0
    ends = where(state.skipped_in_a_row > 0, 1, over + (3 if settings.growth_interval > _PAUSE else 0))
    after = where(begins, 1, where(state.search == 1, ends, over))
    rises = where(goes_on, where(waits, 4, state.search), where(looks_again, 0, where(waits, 3, over)))
    return (
        after_overflow,
        where(goes_on, climbed, after_clean),
        where(overflow, where(tolerated, state.search, after), rises),
    )


def _power_of_two(name: str, value: float) -> float:
    """Return `value` as a float if it is a power of two that FP32 holds as a normal number, else raise."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.frexp(number)[0] != 0.5 or not _SMALLEST <= number <= _LARGEST:
        raise LossScaleError(f"{name} must be a power of two such as 0.5 or 65536, not {value!r}")
    return number
