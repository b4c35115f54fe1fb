"""Modules or scopes that are alike, numbered, and side by side, as one: `blocks.0` to `blocks.7` are `blocks.*`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from duotone.wording.records import add_up

# "3", "Block_3"
_NUMBERED = re.compile(r"(|.*_)(\d+)")


class Member(Protocol):
    """What can be put together: it has a dotted path, and saves bytes for the backward pass by dtype."""

    @property
    def path(self) -> str: ...

    @property
    def saved_bytes(self) -> dict[str, int]: ...

    def traits(self) -> Any:
        """Return everything in which members that are alike are the same."""
        ...


Each = TypeVar("Each", bound=Member)
Placed = TypeVar("Placed")


@dataclass(frozen=True)
class Group(Generic[Each]):
    """Members that are shown as one.

    Attributes:
        path: one path for all, `blocks.*.norm`, or `blocks.1-3.norm` if those before and after are different.
        members: at least one.
        depth: how many names the path has; 0 for the whole.
    """

    path: str
    members: tuple[Each, ...]
    depth: int

    @property
    def first(self) -> Each:
        """One of them, for what is the same in all."""
        return self.members[0]

    def saved_bytes(self) -> Counter[str]:
        """Return what all of them saved together, by dtype."""
        return sum((Counter(member.saved_bytes) for member in self.members), Counter())


def groups_of(members: Sequence[Each]) -> list[Group[Each]]:
    """Put members together whose traits are the same, and those of all that is inside them."""
    return list(_Tree(members).walk([""], "", 0))


def paths_of_groups(members: Sequence[Member]) -> dict[str, str]:
    """Return the path of its group for each member's path."""
    return {member.path: group.path for group in groups_of(members) for member in group.members}


def in_groups(records: Sequence[Placed], place: str, paths: Mapping[str, str]) -> list[Placed]:
    """Return records with those of members that are alike added up, the largest first.

    Args:
        records: with `calls` and `result_bytes`.
        place: the name of the attribute that is a member's path.
        paths: the path of its group, by path.
    """
    values: list[Any] = list(records)
    places = [getattr(each, place) for each in values]
    placed = [replace(each, **{place: paths.get(path, path)}) for each, path in zip(values, places, strict=True)]
    return sorted(add_up(placed), key=_negative_bytes)


def _negative_bytes(record: Any) -> int:
    return -record.result_bytes


class _Tree(Generic[Each]):
    """Members by path, with those inside each."""

    def __init__(self, members: Sequence[Each]) -> None:
        self._members = {member.path: member for member in members}
        self._inside: dict[str, dict[str, None]] = {}
        self._traits_of: dict[str, Any] = {}
        for path in self._members:
            inner = path
            while inner:
                parent = inner.rpartition(".")[0]
                self._inside.setdefault(parent, {})[inner] = None
                inner = parent

    def walk(self, paths: list[str], group_path: str, depth: int) -> Iterator[Group[Each]]:
        members = tuple(self._members[path] for path in paths if path in self._members)
        if members:
            yield Group(group_path, members, depth)
        # alike paths have alike insides, so the first shows how those of all are put together
        inside = [path.rpartition(".")[2] for path in self._inside.get(paths[0], ())]
        for names in self._runs(paths[0], inside):
            name = names[0]
            if len(names) > 1:
                stem = _numbered(name)[0]
                is_all = len(names) == sum(_numbered(each)[0] == stem for each in inside)
                name = f"{stem}*" if is_all else f"{name}-{_numbered(names[-1])[1]}"
            inner_paths = [_joined(path, each) for path in paths for each in names]
            yield from self.walk(inner_paths, _joined(group_path, name), depth + 1)

    def _runs(self, parent: str, names: list[str]) -> list[list[str]]:
        """Return names that are alike and have following numbers together, and any other by itself."""
        runs: list[list[str]] = []
        for name in names:
            before = runs[-1][-1] if runs else ""
            (stem, number), (stem_before, number_before) = _numbered(name), _numbered(before)
            follows = stem is not None and stem == stem_before and number == number_before + 1
            if follows and self._traits(_joined(parent, name)) == self._traits(_joined(parent, before)):
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs

    def _traits(self, path: str) -> Any:
        """Return everything in which alike modules are the same: all but their paths and what they saved."""
        if path not in self._traits_of:
            member = self._members.get(path)
            own = member and member.traits()
            inside = tuple((each.rpartition(".")[2], self._traits(each)) for each in self._inside.get(path, ()))
            self._traits_of[path] = own, inside
        return self._traits_of[path]


def _numbered(name: str) -> tuple[str | None, int]:
    """Return a name's beginning and number, None and 0 if it has no number."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (None, 0)


def _joined(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
