"""What `import duotone.keras` offers, and what it loads."""

import subprocess
import sys

import keras

import duotone.keras as dk

FRAMEWORKS = {"tensorflow", "torch", "jax"}


def test_every_public_name_is_there() -> None:
    assert all(hasattr(dk, name) for name in dk.__all__)
    assert sorted(dk.__all__) == dk.__all__


def test_no_framework_is_loaded_that_keras_does_not_load() -> None:
    names = "print(*{name.partition('.')[0] for name in sys.modules})"
    code = f"import sys, keras; {names}; import duotone.keras; {names}"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    keras_alone, with_duotone = (set(line.split()) for line in lines)
    assert keras.backend.backend() in keras_alone
    assert with_duotone & FRAMEWORKS == keras_alone & FRAMEWORKS
    assert not {"numba", "typer", "matplotlib", "rich"} & (with_duotone - keras_alone)
