"""What optimizers have done to parameters since somebody last asked, skipped steps among it, without asking a device.

A post-hook of torch sees the steps of every optimizer. Whether a step was skipped stands in the `found_inf` that it was
given: as a keyword, as Duotone's optimizers take it, or as an attribute, as torch's fused ones do. A scaler that skips
on the host calls no step at all.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from duotone.torch.parameters.plain_steps import say_if_updates_are_rounded


class Steps:
    """Sees the steps of the optimizers of some parameters.

    Args:
        params: the parameters.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer, steps = torch.optim.SGD([weight]), Steps([weight])
    >>> steps.take()
    False
    >>> optimizer.step()
    >>> steps.take(), steps.take()
    (False, True)
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.follow(params)
        self._has_seen_any = False
        # what is known of the steps since the last look: whether one was taken for sure, else the flags of all
        self._was_taken = False
        self._skipped: Tensor | None = None
        handle = register_optimizer_step_post_hook(_recorder(weakref.ref(self)))
        weakref.finalize(self, handle.remove)

    def __reduce__(self) -> Any:
        # copies and pickles have parameters of their own, and a hook of their own
        return Steps, (self._params,)

    def follow(self, params: Iterable[Tensor]) -> None:
        """Look at other parameters from here on."""
        self._params = list(params)
        self._ids = frozenset(map(id, self._params))

    def take(self) -> Tensor | bool:
        """Return whether no step was taken since the last call: a bool, 0-d, on the device, where only that knows.

        While nothing was ever seen, weights are changed by somebody else, and the answer is False.
        """
        was_taken, skipped = self._was_taken, self._skipped
        self._was_taken, self._skipped = False, None
        if was_taken or not self._has_seen_any:
            return False
        return True if skipped is None else skipped

    def record(self, optimizer: Optimizer, found_inf: Tensor | None) -> None:
        """Take note of a step."""
        groups = optimizer.param_groups
        if not any(id(param) in self._ids for group in groups for param in group["params"]):
            return
        if not self._has_seen_any:
            say_if_updates_are_rounded(optimizer)
        self._has_seen_any = True
        if found_inf is None:
            self._was_taken = True
        elif not self._was_taken:
            # a flag of torch's is a number
            flag = found_inf != 0
            self._skipped = flag if self._skipped is None else self._skipped & flag.to(self._skipped.device)


def _recorder(reference: "weakref.ref[Steps]") -> Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]:
    def record(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps = reference()
        if steps is not None:
            found_inf = kwargs.get("found_inf")
            steps.record(optimizer, getattr(optimizer, "found_inf", None) if found_inf is None else found_inf)

    return record
