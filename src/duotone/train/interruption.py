"""Signals that ask a run to stop: SIGTERM, and SIGINT, which is Ctrl-C.

While a run is under way the first of them only asks it to stop, which it does after the step that it is in. A second
Ctrl-C raises KeyboardInterrupt at once, as usual. Schedulers and shells send SIGTERM more than once: that changes
nothing. A signal that the process was started to ignore stays ignored.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Interruption:
    """What asked a run to stop.

    Attributes:
        cause: the first signal that came, or None.
    """

    cause: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """By convention 128 and the signal's number: 130 for Ctrl-C, 143 for SIGTERM; 0 for none."""
        return 0 if self.cause is None else 128 + self.cause


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[Interruption]:
    """Call `stop` on SIGTERM and Ctrl-C for the length of a block; the handlers that were there come back after it.

    Python allows this in the main thread only. `stop` runs between two instructions of whatever runs then: it should
    set a flag and no more, as `Trainer.stop` does.

    >>> import os
    >>> with stop_on_signal(lambda: print("asked to stop")) as interruption:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    asked to stop
    >>> interruption.cause.name, interruption.exit_code
    ('SIGTERM', 143)
    """
    interruption = Interruption()

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interruption.cause is None:
            interruption.cause = signal.Signals(number)
            stop()

    before = {each: signal.getsignal(each) for each in SIGNALS}
    ours = [each for each, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for each in ours:
            signal.signal(each, handle)
        yield interruption
    finally:
        for each in ours:
            signal.signal(each, before[each])
