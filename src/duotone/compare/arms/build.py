"""From an arm's name to what takes its steps; the library that it needs is imported here, and not before."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from duotone.compare.arms.catalogue import Arm
from duotone.compare.arms.stepper import Assignment, Stepper
from duotone.errors import ArmError


def build(assignment: Assignment) -> Stepper:
    """Return the stepper of an assignment's arm, with its model on the device.

    Raises:
        ArmError: the arm's library is not installed or does not work here, or it cannot train this task so.
        PolicyError: a model that Duotone cannot cast.

    >>> import torch
    >>> from duotone.compare.arms.catalogue import CATALOGUE
    >>> from duotone.train import built_in_task, resolve_settings
    >>> task = built_in_task("stdlib-text:tiny")
    >>> settings = resolve_settings(task.settings, {"steps": 10})
    >>> stepper = build(Assignment(CATALOGUE["bf16"], task, settings, torch.device("cpu")))
    >>> stepper.backward(stepper.forward(next(iter(task.batches(torch.Generator())))))
    >>> stepper.update()
    Update(skipped=tensor(False), loss_scale=tensor(1.))
    """
    arm = assignment.arm
    versions(arm)
    module, _, function = arm.stepper.partition(":")
    try:
        return getattr(import_module(f"duotone.compare.arms.{module}"), function)(assignment)
    except ImportError as error:
        if arm.distribution is None:
            raise
        raise ArmError(f"{arm.distribution} is installed, but cannot be imported: {error}") from error


def versions(arm: Arm) -> dict[str, str]:
    """Return the version of the distribution that an arm trains with, besides Duotone and torch.

    Raises:
        ArmError: it is not installed.
    """
    if arm.distribution is None:
        return {}
    try:
        return {arm.distribution: version(arm.distribution)}
    except PackageNotFoundError as error:
        raise ArmError(
            f'arm "{arm.name}" needs {arm.distribution}, which is not installed; run pip install "duotone[peers]", '
            f"or pip install {arm.distribution}",
            kind="not installed",
        ) from error
