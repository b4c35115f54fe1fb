"""Watching a model run: modules by hooks, functions and kernels by modes, saved tensors by autograd's hooks.

An `Observer` gets what there is to see, `watch` runs a function under it, and `left_as_it_was` puts the model back.
Nothing of it costs anything outside of those blocks. What is made of it stands elsewhere, in `explanation` for one.
`saved_for_backward` counts the saved bytes of any block of code.
"""

from duotone.torch.watching.observer import Observer
from duotone.torch.watching.restore import left_as_it_was
from duotone.torch.watching.saved import saved_for_backward
from duotone.torch.watching.watch import is_compiled, named_modules, watch

__all__ = ["Observer", "is_compiled", "left_as_it_was", "named_modules", "saved_for_backward", "watch"]
