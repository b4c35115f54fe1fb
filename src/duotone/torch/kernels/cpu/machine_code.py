"""Machine code of a kernel: compiled by Numba once, kept on disk, and loaded without Numba from then on.

A kernel is a Python function of one integer, the address of its job. Its code is kept in the user's cache folder under
a name that depends on its sources, on Numba's version and on the CPU, so that it is never out of date. Loading takes a
few milliseconds, where importing Numba and its own cache take half a second.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import llvmlite.binding as llvm
from platformdirs import user_cache_path

_ENTRY = "duotone_kernel"
_DIGEST_BYTES = 32
# what holds a module's code must live as long as the code may run
_engines: list[Any] = []

Entry = Callable[[int], None]


def entry_of(name: str, make: Callable[[], Callable[[int], None]]) -> Entry:
    """Return a kernel as a function of its job's address, which runs without the interpreter's lock.

    Args:
        name: of the kernel and its formats, different for different code.
        make: returns the Python function to compile; called only if there is no code on disk.
    """
    path = cache_folder() / f"{name}-{_fingerprint()}.o"
    code = _read(path)
    if code is None:
        code = _compile(make())
        _write(path, code)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(_load(code))


def cache_folder() -> Path:
    """Return the folder that compiled kernels are kept in."""
    return user_cache_path("duotone") / "kernels"


@cache
def _fingerprint() -> str:
    digest = sha256()
    # the kernels' own sources, and what they share with the other backends: columns of tables, names, chunks
    folder = Path(__file__).parent
    shared = [folder.parent / name for name in ("checksums.py", "reference.py", "slots.py", "table.py")]
    for source in (*sorted(folder.rglob("*.py")), *sorted((folder.parent / "updates").glob("*.py")), *shared):
        digest.update(source.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    for part in (version("numba"), version("llvmlite"), platform.python_version(), llvm.get_host_cpu_name(), features):
        digest.update(f"\n{part}".encode())
    return digest.hexdigest()[:24]


def host_features() -> dict[str, bool]:
    """Return which instructions this CPU has, by LLVM's names."""
    return dict(llvm.get_host_cpu_features())


@cache
def _target_machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # attention has instructions written out
    llvm.initialize_native_asmparser()
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)


def _compile(kernel: Callable[[int], None]) -> bytes:
    """Return object code whose one entry is a C function `void duotone_kernel(int64_t job)`."""
    from numba import njit

    from duotone.torch.kernels.cpu.memory import OPTIONS

    # Numba makes machine code, too, for which LLVM has to be initialized
    _target_machine()
    dispatcher: Any = njit("void(int64)", **OPTIONS)(kernel)
    (signature,) = dispatcher.signatures
    native = dispatcher.overloads[signature].fndesc.llvm_func_name
    # numba's own functions return a status and take where to put a result and an exception; a kernel has neither
    wrapper = f"""
define void @{_ENTRY}(i64 %job) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @{native}(ptr %result, ptr %exception, i64 %job)
  ret void
}}
"""
    module = llvm.parse_assembly(dispatcher.inspect_llvm(signature) + wrapper)
    for function in module.functions:
        if not function.is_declaration and function.name != _ENTRY:
            function.linkage = "internal"
    # what is left are the kernel and what it calls: no part of Python, and nothing that only Numba could link
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(_target_machine(), llvm.create_pipeline_tuning_options()))
    return _target_machine().emit_object(module)


def _load(code: bytes) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(_ENTRY)


def _read(path: Path) -> bytes | None:
    """Return a file's code, or None if there is none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if digest == sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    """Keep code for the next process; where that is not possible it compiles again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return
