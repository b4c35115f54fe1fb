"""What a process was warned of: each once, one line, without where in the source it was said."""

import re
import sys

# the beginning of such a remark in torch's own warnings, which names a file of its source
_ORIGIN = re.compile(r"\s*\(Triggered internally at .*")
# said to those who write libraries, not to those who train
_FOR_OTHERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


class Notes:
    """Collects warnings in the place of `warnings.showwarning`; each is printed too.

    >>> notes = Notes()
    >>> for _ in range(2):
    ...     notes.add("FP16 is slow here\\nas is known", UserWarning)
    >>> notes.lines
    ('FP16 is slow here',)
    """

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, message: Warning | str, category: type[Warning], *_: object) -> None:
        """Take up a warning."""
        sys.stderr.write(f"{category.__name__}: {message}\n")
        line = _ORIGIN.sub("", next(iter(str(message).splitlines()), ""))
        if line and not issubclass(category, _FOR_OTHERS):
            self._lines[line] = None

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them, in the order in which they were first said."""
        return tuple(self._lines)
