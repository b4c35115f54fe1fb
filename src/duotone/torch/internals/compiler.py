"""Private names of torch.compile: what it leaves alone, what it calls while it traces, what it has made."""

import functools
import sys
import warnings
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from duotone.errors import DuotoneWarning
from duotone.torch.internals.lookup import HAS, find, has_all

# leaves code alone that it would compile by itself; without them, that is said as something is compiled
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/dynamo/eval_frame.c
_Action: Any = find("torch._C._dynamo.eval_frame:_FrameAction")
_Strategy: Any = find("torch._C._dynamo.eval_frame:_FrameExecStrategy")
_set_strategy: Callable[[CodeType, Any], None] = find("torch._C._dynamo.eval_frame:set_code_exec_strategy")
SKIPS_CODE = has_all("eval_frame")
# what compiles the frames that run on this thread, None for nothing; without it, something is taken to
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/dynamo/eval_frame.c
_compiler: Callable[[], Any] = find("torch._C._dynamo.eval_frame:get_eval_frame_callback", lambda: True)
# the mark of a function whose result is a constant: torch.compiler.assume_constant_result, which loads the compiler
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/decorators.py#L188
CONSTANT = "_dynamo_marked_constant"
# the module that a compiled one was made of; without it, explain shows the compiled one
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/eval_frame.py
ORIGINAL_MODULE = "_orig_mod"
# what is called in place of a module that was compiled in place
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L480
COMPILED_CALL = "_compiled_call_impl"


def skip_code(code: CodeType) -> None:
    """Have a function neither compiled by itself nor what it calls; traced from outside, it still is."""
    _set_strategy(code, _Strategy(_Action.SKIP, _Action.SKIP))


def compiler_follows() -> bool:
    """Return whether torch.compile traces what is called now, or would compile it by itself.

    >>> compiler_follows()
    False
    """
    # the first is a constant for who traces, and what follows it is not looked at
    return torch.compiler.is_dynamo_compiling() or _compiler() is not None


def mark_constant(function: Callable[..., Any]) -> None:
    """Have a function called while tracing, and not followed."""
    setattr(function, CONSTANT, True)


@functools.cache
def say_once_that_code_is_not_skipped() -> None:
    """Warn that graph breaks inside of a region are not safe."""
    warnings.warn(
        f"torch {torch.__version__} does not let code be skipped (torch._C._dynamo.eval_frame.set_code_exec_strategy): "
        "where a graph breaks inside of a cast model, operations may run in another dtype; compile with fullgraph=True",
        DuotoneWarning,
        stacklevel=2,
    )


mark_constant(say_once_that_code_is_not_skipped)


def is_scripting_frame(frame: FrameType) -> bool:
    """Return whether a frame is of torch.jit.script, which looks for what a function is made of.

    >>> import sys
    >>> is_scripting_frame(sys._getframe())
    False
    """
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_jit_internal.py
    return frame.f_globals.get("__name__") == "torch._jit_internal"


def is_loaded() -> bool:
    """Return whether something may have been compiled."""
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/__init__.py
    return "torch._dynamo" in sys.modules


def original_of(module: nn.Module) -> nn.Module:
    """Return the module that a compiled one was made of; any other itself."""
    return getattr(module, ORIGINAL_MODULE, module)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, in place or not."""
    return original_of(module) is not module or getattr(module, COMPILED_CALL, None) is not None


def compile_in_place(module: nn.Module, **options: Any) -> None:
    """Compile a module's calls, as `module.compile` does, also where the module is of a class of torch's own.

    Compiled by itself, the call of an `nn.Sequential` without hooks or a forward of ours is left alone as torch's code.
    """
    call = module._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    setattr(module, COMPILED_CALL, torch.compile(run, **options))


def compiled_graphs() -> int:
    """Return how many graphs this process has captured; 0 where torch does not tell."""
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/utils.py
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return int(counters["stats"]["unique_graphs"]) if "stats" in counters else 0


def compile_seconds() -> float:
    """Return how long this process has compiled; 0 where torch does not tell, and a step's time contains it then."""
    tell = getattr(sys.modules.get("torch._dynamo.utils"), "calculate_time_spent", None)
    return float(tell().get("total_wall_time", 0.0)) if tell is not None else 0.0


def check_cpp_compiler() -> None:
    """Raise torch's error unless it finds a C++ compiler; nothing is checked where torch has no function for it."""
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/cpp_builder.py
    check = find("torch._inductor.cpp_builder:get_cpp_compiler")
    # not a name that is looked up at import: it loads the compiler
    HAS.pop("torch._inductor.cpp_builder:get_cpp_compiler")
    if check is not None:
        check()


def is_compiler_error(error: BaseException) -> bool:
    """Return whether an error is torch.compile's own.

    >>> is_compiler_error(ValueError())
    False
    """
    return any(each.__module__.startswith(("torch._dynamo.", "torch._inductor.")) for each in type(error).__mro__)


def written_path(path: str) -> str:
    """Return a module's path without what torch.compile puts around modules.

    >>> written_path("_orig_mod.blocks.0")
    'blocks.0'
    """
    return ".".join(name for name in path.split(".") if name != ORIGINAL_MODULE)
