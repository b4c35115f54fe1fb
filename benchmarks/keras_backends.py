"""Keras has one backend in a process: programs that compare backends run themselves again on each."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

# modules, and their names
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def on_each(program: str, *arguments: str) -> dict[str, Any]:
    """Run a program with `--backend NAME` on each backend that is installed; return the JSON of its last line.

    Raises:
        subprocess.CalledProcessError: it failed on one.
    """
    results = {}
    for backend in filter(find_spec, BACKENDS):
        print(backend, file=sys.stderr, flush=True)
        command = [sys.executable, program, "--backend", backend, *arguments]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        # frameworks write lines of their own
        results[backend] = json.loads(output.splitlines()[-1])
    return results


def versions() -> dict[str, str]:
    """Return those of Keras and of this process's backend."""
    import keras

    backend = keras.backend.backend()
    return {"Keras": keras.__version__, BACKENDS[backend]: _version_of(backend)}


def in_words(results: Mapping[str, Any]) -> str:
    """Return the versions that results of several backends hold."""
    found = {name: number for each in results.values() for name, number in each["versions"].items()}
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _version_of(backend: str) -> str:
    # TensorFlow comes in packages of several names
    for package in (backend, f"{backend}-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
