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
    code = "import sys, {}; print(*{{name.split('.')[0] for name in sys.modules}})"
    keras_alone, with_duotone = (
        set(
            subprocess.run(
                [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for name in ("keras", "keras, duotone.keras")
    )
    assert keras.backend.backend() in keras_alone
    assert with_duotone & FRAMEWORKS == keras_alone & FRAMEWORKS
    assert not {"numba", "typer", "matplotlib", "rich"} & (with_duotone - keras_alone)
