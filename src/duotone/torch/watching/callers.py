"""Who asked for what torch is doing: the source line of the user's code, and whether Duotone itself did.

Frames are read from the innermost outwards. A function mode of Duotone's that passes a call on did not ask for it; one
that calls another function than it was given, a cast for instance, did.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_HERE = str(Path(__file__).parent) + os.sep
_DUOTONE = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_MODULES = str(Path(nn.modules.__file__).parent) + os.sep
# files of torch that call modules, and never a function for a purpose of their own
_CALLERS = tuple(_MODULES + name for name in ("module.py", "container.py"))
# where Duotone carries out FP16 products on a CPU that has none
_EMULATION = str(Path(__file__).parents[1] / "casting" / "half_on_cpu.py")
# which it does with the functions there, as other operations are
_WIDENED = str(Path(__file__).parents[1] / "casting" / "widened.py")
_MODE = "__torch_function__"


@dataclass(frozen=True)
class Caller:
    """Who called a function of torch.

    Attributes:
        by_duotone: whether Duotone did, by itself.
        handler: the frame of the mode of Duotone's that carries out the call, or None.
        handler_func: the function that this mode was called with.
        source_line: `file:line` of the first line outside of torch and Duotone, or of torch's module if it is called
            by none; None if there is neither.
        emulation: the function of Duotone's FP16 on CPUs, the innermost one, that did it; None if it had no part.
    """

    by_duotone: bool
    handler: FrameType | None
    handler_func: Callable[..., Any] | None
    source_line: str | None
    emulation: str | None = None


def find_caller(func: Callable[..., Any] | None, stop: CodeType | None) -> Caller:
    """Find out who called `func`, which is being carried out now; frames from that of `stop` on are not looked at."""
    frame: FrameType | None = sys._getframe(1)
    handler: FrameType | None = None
    by_duotone, in_module, line, line_in_torch = False, False, None, None
    emulation: str | None = None
    widening: str | None = None
    while frame is not None and frame.f_code is not stop:
        file = frame.f_code.co_filename
        if file.startswith(_DUOTONE):
            if file == _WIDENED and widening is None:
                widening = frame.f_code.co_name
            if file == _EMULATION and emulation is None:
                emulation = widening or frame.f_code.co_name
            if file.startswith(_HERE) or in_module:
                pass
            elif frame.f_code.co_name == _MODE:
                handler = frame
                # a call that is passed on was asked for by whoever is further out
                by_duotone = _argument(frame) is not func
            else:
                by_duotone = True
        elif file.startswith(_TORCH):
            if file.startswith(_MODULES):
                in_module = True
                if line_in_torch is None and not file.startswith(_CALLERS):
                    line_in_torch = _source_line(frame)
        else:
            line = _source_line(frame)
            break
        frame = frame.f_back
    handler_func = None if handler is None else _argument(handler)
    return Caller(by_duotone, handler, handler_func, line or line_in_torch, emulation)


def in_emulation() -> bool:
    """Return whether Duotone is carrying out an FP16 product in FP32."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _EMULATION:
        frame = frame.f_back
    return frame is not None


def _argument(frame: FrameType) -> Any:
    """Return the function that a mode was called with: the parameter after `self`."""
    return frame.f_locals.get(frame.f_code.co_varnames[1])


def _source_line(frame: FrameType) -> str:
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(file: str) -> str:
    if file.startswith(_TORCH):
        return "torch/" + Path(file[len(_TORCH) :]).as_posix()
    path, here = Path(file), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_absolute() and path.is_relative_to(here) else file
