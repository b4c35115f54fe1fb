"""Modules that are alike and stand side by side in a list, as one: `blocks.0` to `blocks.7` are `blocks.*`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from duotone.torch.explanation.explanation import Cast, Explanation, ModuleDtypes


@dataclass(frozen=True)
class Siblings:
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

    @property
    def saved_bytes(self) -> dict[str, int]:
        """What all of them saved together, by dtype."""
        together: dict[str, int] = {}
        for member in self.members:
            for dtype, number in member.saved_bytes.items():
                together[dtype] = together.get(dtype, 0) + number
        return together


def group_siblings(modules: Sequence[ModuleDtypes]) -> list[Siblings]:
    """Put modules together whose classes, calls and dtypes are the same, all that is inside them included.

    >>> linears = [ModuleDtypes(f"layers.{at}", "Linear", 1, None, (), (), (), {"float32": 8}) for at in range(3)]
    >>> [(each.path, len(each.members), each.saved_bytes) for each in group_siblings(linears)]
    [('layers.*', 3, {'float32': 24})]
    """
    tree = _Tree(modules)
    return list(tree.walk([""], "", 0))


def paths_of_groups(modules: Sequence[ModuleDtypes]) -> dict[str, str]:
    """Return the path of its group for each module's path."""
    return {member.path: group.path for group in group_siblings(modules) for member in group.members}


def casts_of_groups(explanation: Explanation) -> list[Cast]:
    """Return the casts with those of modules that are alike added up, the largest first."""
    shown = paths_of_groups(explanation.modules)
    together: dict[Cast, Cast] = {}
    for cast in explanation.casts:
        key = replace(cast, module=shown.get(cast.module, cast.module), calls=0, result_bytes=0)
        sofar = together.get(key, key)
        together[key] = replace(
            sofar, calls=sofar.calls + cast.calls, result_bytes=sofar.result_bytes + cast.result_bytes
        )
    return sorted(together.values(), key=lambda cast: -cast.result_bytes)


class _Tree:
    """Modules by path, with the modules inside each."""

    def __init__(self, modules: Sequence[ModuleDtypes]) -> None:
        self._modules = {module.path: module for module in modules}
        self._inside: dict[str, dict[str, None]] = {}
        self._kinds: dict[str, Any] = {}
        for path in self._modules:
            inner = path
            while inner:
                around = inner.rpartition(".")[0]
                self._inside.setdefault(around, {})[inner] = None
                inner = around

    def walk(self, paths: list[str], shown: str, depth: int) -> Iterator[Siblings]:
        members = tuple(self._modules[path] for path in paths if path in self._modules)
        if members:
            yield Siblings(shown, members, depth)
        # alike paths have alike insides, so the first shows how those of all are put together
        inside = [path.rpartition(".")[2] for path in self._inside.get(paths[0], ())]
        for names in self._runs(paths[0], inside):
            name = names[0]
            if len(names) > 1:
                name = "*" if len(names) == len(inside) else f"{names[0]}-{names[-1]}"
            together = [_joined(path, each) for path in paths for each in names]
            yield from self.walk(together, _joined(shown, name), depth + 1)

    def _runs(self, around: str, names: list[str]) -> Iterator[list[str]]:
        """Yield names that are alike and have following numbers together, and any other by itself."""
        run: list[str] = []
        for name in names:
            follows = run and name.isdecimal() and run[-1].isdecimal() and int(name) == int(run[-1]) + 1
            if follows and self._kind(_joined(around, name)) == self._kind(_joined(around, run[-1])):
                run.append(name)
            else:
                if run:
                    yield run
                run = [name]
        if run:
            yield run

    def _kind(self, path: str) -> Any:
        """Return everything in which alike modules are the same."""
        if path not in self._kinds:
            module = self._modules.get(path)
            own = module and (
                module.type,
                module.calls,
                module.policy,
                module.parameter_dtypes,
                module.input_dtypes,
                module.output_dtypes,
            )
            inside = tuple((each.rpartition(".")[2], self._kind(each)) for each in self._inside.get(path, ()))
            self._kinds[path] = own, inside
        return self._kinds[path]


def _joined(around: str, name: str) -> str:
    return f"{around}.{name}" if around else name
