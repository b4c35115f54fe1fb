"""What the tests of duotone.jax share: four devices on one CPU, or one, on which updates run in pieces."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()


@pytest.fixture(autouse=True, scope="session")
def pieces_are_small():
    """Make pieces of an update so small that the arrays of tests have several; with four devices there are none."""
    from duotone.jax.optim import pieces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_SMALLEST_PIECE", 16)
        yield
