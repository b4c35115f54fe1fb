"""What was put into a cast model since: modules and parameters, stored and run as the policy says of their place.

A parameter that has taken another one's place is stored as that one was.
"""

from collections.abc import Mapping

from torch import nn

from duotone.policy import Policy
from duotone.torch.casting.cast import forward_for
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.casting.frozen_weights import as_frozen
from duotone.torch.casting.module_policies import ModulePolicy, resolve_changed
from duotone.torch.casting.own_methods import OwnMethods
from duotone.torch.casting.storage_plan import is_castable, planned_fields
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters.storage import NO_STORAGE, Storage, storage_of


class Parts:
    """The modules and parameters of a model as they are now, to be compared with those of later.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # held, so that nothing new gets the identity of what is gone
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._params = dict(model.named_parameters(remove_duplicate=False))
        self._records = {name: storage_of(param) for name, param in self._params.items()}

    def new_parameters(self) -> list[tuple[str, nn.Parameter, Storage]]:
        """Return the parameters that came since and are to be 16-bit: name, parameter, and how it is to be stored."""
        known = set(self._params.values())
        found = {}
        for path, module in self._model.named_modules():
            for name, param in module.named_parameters(recurse=False):
                full_name = f"{path}.{name}" if path else name
                if param not in known and param not in found and is_castable(param):
                    storage = self._planned(full_name, module, param)
                    if storage is not None and storage.param in SPLIT_DTYPES:
                        found[param] = full_name, param, storage
        return list(found.values())

    def cast_new_modules(self) -> None:
        """Give modules that came since the forward that the policy of their place says."""
        known = set(self._modules.values())
        for root, policy, policies in self._roots():
            for path, module in root.named_modules():
                if path and module not in known and cast_forward_of(module) is None:
                    forward = forward_for(module, path, policy, policies[path])
                    if forward is not None:
                        forward.install()
                    OwnMethods(module).install()

    def _planned(self, name: str, module: nn.Module, param: nn.Parameter) -> Storage | None:
        own = storage_of(param)
        if own.param is not None:
            # a copy of another part of the model, for instance
            return own
        before = self._records.get(name, NO_STORAGE)
        if before.param is not None:
            return before.without_tail().changed(ranks=None, in_full_precision=False)
        for root, policy, policies in self._roots():
            for path, each in root.named_modules():
                if each is module:
                    fields = planned_fields(module, policies[path], param)
                    planned = own.changed(name=name, loss_scale=policy.loss_scale, **fields)
                    return as_frozen(param, [module], planned)
        return None

    def _roots(self) -> list[tuple[nn.Module, Policy, Mapping[str, ModulePolicy]]]:
        """Return the outermost parts that were cast, with their policies."""
        roots: list[tuple[nn.Module, Policy, Mapping[str, ModulePolicy]]] = []
        inside: set[nn.Module] = set()
        for module in self._model.modules():
            forward = cast_forward_of(module)
            if forward is not None and module not in inside and module in set(self._modules.values()):
                inside.update(module.modules())
                roots.append((module, forward.policy, resolve_changed(module, forward.policy)))
        return roots
