"""Kernels compiled ahead of time, without a GPU: what stands in their PTX, and what they take of a GPU's registers."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any], architecture: int = 90
) -> Any:
    """Return a kernel as Triton compiles it: arguments of some types, all others constants."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def instructions(code: Any) -> Counter[str]:
    """Return how often each instruction stands in a kernel's PTX."""
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*\.[\w.:]+)", code.asm["ptx"], re.MULTILINE))


def registers_and_spilled(code: Any) -> tuple[int, int]:
    """Return how many registers a thread of a kernel has, and how many bytes of it are in memory for want of them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", shown)
    registers, stack, local = map(int, found)
    return registers, stack + local
