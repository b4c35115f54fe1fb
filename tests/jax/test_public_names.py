"""What `import duotone.jax` offers, and what it loads."""

import subprocess
import sys

import duotone.jax as dj


def test_every_public_name_is_there() -> None:
    assert all(hasattr(dj, name) for name in dj.__all__)
    assert sorted(dj.__all__) == dj.__all__


def test_no_other_framework_is_loaded() -> None:
    code = "import sys, duotone.jax; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    absent = {"torch", "tensorflow", "keras", "flax", "equinox", "triton", "numba", "typer", "matplotlib"}
    assert not absent & set(loaded)
