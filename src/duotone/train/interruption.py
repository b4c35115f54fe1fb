"""Signals that ask a run to stop: SIGTERM; SIGHUP, which a terminal that closes sends; SIGINT, which is Ctrl-C.

During a run the first of them only asks it to stop, which it does after the current step; a line says so at once, for a
step may be long. A second Ctrl-C raises KeyboardInterrupt, as usual. Schedulers and shells send
SIGTERM more than once: that changes nothing. A signal that the process was started to ignore, as `nohup` does it, stays
ignored.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# Windows has no SIGHUP
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
# the file descriptor of sys.stderr
_ERRORS = 2


@dataclass
class Interruption:
    """What asked a run to stop.

    Attributes:
        cause: the first signal that came, or None.
    """

    cause: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """By convention 128 and the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP; 0 for none."""
        return 0 if self.cause is None else 128 + self.cause


@contextmanager
def stop_on_signal(stop: Callable[[], None], tell: Callable[[str], None] = lambda line: None) -> Iterator[Interruption]:
    """Call `stop` on SIGTERM, SIGHUP and Ctrl-C for the length of a block, and put the handlers back that were there.

    Python allows this in the main thread only. Both functions run between two instructions of whatever runs then.

    Args:
        stop: should set a flag and no more, as `Trainer.stop` does.
        tell: prints a line, as `print_at_once` does, or ignores it.

    >>> with stop_on_signal(lambda: print("asked to stop"), print) as interruption:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    stopping after this step
    asked to stop
    >>> interruption.cause.name, interruption.exit_code
    ('SIGTERM', 143)
    """
    interruption = Interruption()

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tell("stopping after this step; Ctrl-C again stops at once, without saving")
        elif interruption.cause is None:
            tell("stopping after this step")
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


def print_at_once(line: str) -> None:
    """Print a line among the errors, past all buffers and locks, so that a signal handler may do it at any moment."""
    # on a terminal it overwrites the progress bar, which is drawn again below it, and the "^C"
    start = "\r\x1b[2K" if os.isatty(_ERRORS) else ""
    with suppress(OSError):
        os.write(_ERRORS, f"{start}{line}\n".encode())
