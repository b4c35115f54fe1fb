"""Modules that are alike and stand side by side in a list, as one: `blocks.0` to `blocks.7` are `blocks.*`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from duotone.torch.explanation.records import ModuleDtypes
from duotone.wording.records import Cast, largest_first


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that are shown as one.

    Attributes:
        path: one path for all, `blocks.*.norm`, or `blocks.1-3.norm` if those before and after are different.
        members: the modules, at least one.
        depth: how many names the path has; 0 for the model itself.
    """

    path: str
    members: tuple[ModuleDtypes, ...]
    depth: int

    @property
    def first(self) -> ModuleDtypes:
        """One of them, for what is the same in all."""
        return self.members[0]

    def saved_bytes(self) -> Counter[str]:
        """Return what all of them saved together, by dtype."""
        return sum((Counter(member.saved_bytes) for member in self.members), Counter())


def group_modules(modules: Sequence[ModuleDtypes]) -> list[ModuleGroup]:
    """Put modules together whose classes, calls and dtypes are the same, all that is inside them included.

    >>> linears = [ModuleDtypes(f"layers.{at}", "Linear", 1, None, (), (), (), {"float32": 8}) for at in range(3)]
    >>> [(group.path, len(group.members), group.saved_bytes()) for group in group_modules(linears)]
    [('layers.*', 3, Counter({'float32': 24}))]
    """
    return list(_Tree(modules).walk([""], "", 0))


def paths_of_groups(modules: Sequence[ModuleDtypes]) -> dict[str, str]:
    """Return the path of its group for each module's path."""
    return {member.path: group.path for group in group_modules(modules) for member in group.members}


def casts_of_groups(casts: Sequence[Cast], modules: Sequence[ModuleDtypes]) -> tuple[Cast, ...]:
    """Return the casts with those of modules that are alike added up, the largest first."""
    group_paths = paths_of_groups(modules)
    return largest_first(replace(cast, module=group_paths.get(cast.module, cast.module)) for cast in casts)


class _Tree:
    """Modules by path, with the modules inside each."""

    def __init__(self, modules: Sequence[ModuleDtypes]) -> None:
        self._modules = {module.path: module for module in modules}
        self._inside: dict[str, dict[str, None]] = {}
        self._traits_of: dict[str, Any] = {}
        for path in self._modules:
            inner = path
            while inner:
                parent = inner.rpartition(".")[0]
                self._inside.setdefault(parent, {})[inner] = None
                inner = parent

    def walk(self, paths: list[str], group_path: str, depth: int) -> Iterator[ModuleGroup]:
        members = tuple(self._modules[path] for path in paths if path in self._modules)
        if members:
            yield ModuleGroup(group_path, members, depth)
        # alike paths have alike insides, so the first shows how those of all are put together
        inside = [path.rpartition(".")[2] for path in self._inside.get(paths[0], ())]
        for names in self._runs(paths[0], inside):
            name = names[0]
            if len(names) > 1:
                name = "*" if len(names) == len(inside) else f"{names[0]}-{names[-1]}"
            inner_paths = [_joined(path, each) for path in paths for each in names]
            yield from self.walk(inner_paths, _joined(group_path, name), depth + 1)

    def _runs(self, parent: str, names: list[str]) -> list[list[str]]:
        """Return names that are alike and have following numbers together, and any other by itself."""
        runs: list[list[str]] = []
        for name in names:
            before = runs[-1][-1] if runs else ""
            follows = name.isdecimal() and before.isdecimal() and int(name) == int(before) + 1
            if follows and self._traits(_joined(parent, name)) == self._traits(_joined(parent, before)):
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs

    def _traits(self, path: str) -> Any:
        """Return everything in which alike modules are the same: all but their paths and what they saved."""
        if path not in self._traits_of:
            module = self._modules.get(path)
            own = module and replace(module, path="", saved_bytes={}, kept_float32_bytes=0)
            inside = tuple((each.rpartition(".")[2], self._traits(each)) for each in self._inside.get(path, ()))
            self._traits_of[path] = own, inside
        return self._traits_of[path]


def _joined(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
