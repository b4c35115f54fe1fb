"""A YAML file of settings by name, read under YAML 1.2's core schema: `1e-3` is a number, `no` and `1:30` are texts.

PyYAML's own schema is YAML 1.1, where `1e-3` is a text, `010` is 8 and `1:30` is 90. Left out, because no file of
settings needs it: anchors and merges, and whatever is longer or deeper than a person would write. A name that stands
twice is an error. https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from duotone.durable_files import read_bounded
from duotone.errors import TaskError

MOST_BYTES = 65536
_MOST_DEPTH = 20
_TAG = "tag:yaml.org,2002:"
_SCHEMA = (
    # name, what it looks like, and what it may begin with
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


def read_config(path: Path) -> dict[Any, Any]:
    """Read a YAML file of settings by name; an empty one gives none.

    Raises:
        TaskError: the file is missing, too long, not YAML, not a mapping, or sets a name twice.
    """
    try:
        text = read_bounded(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"cannot read the configuration {path}: {reason}; give a YAML file of settings") from error
    values = _parsed(path, text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise TaskError(f"{path} holds a {type(values).__name__}; it must map setting names to values")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return settings as the text of a file that `read_config` reads back.

    >>> to_yaml({"task": "1e5", "learning_rate": 1e-05})
    "task: '1e5'\\nlearning_rate: 1.0e-05\\n"
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parsed(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise TaskError(f"{path}{where} is not YAML: {error.problem or error.context}") from error
    # what PyYAML lets through of a value under a wrong tag, or of thousands of levels
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise TaskError(f"{path} is not YAML: {type(error).__name__}: {problem}") from error


class _Loader(yaml.SafeLoader):
    """Loads the core schema, nothing twice, nothing deep."""

    # without YAML 1.1's
    yaml_implicit_resolvers: ClassVar[Any] = {}

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # each level costs time for every level above it
        if self.flow_level >= _MOST_DEPTH:
            problem = f"it is deeper than {_MOST_DEPTH} levels"
            raise ScannerError(None, None, problem, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            problem = "anchors have no place in settings; write the value out"
            raise ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value.__hash__ is not None and key.value in names:
                problem = f'"{key.value}" is set twice; keep one'
                raise ConstructorError(None, None, problem, key.start_mark)
            if key.value.__hash__ is not None:
                names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """Quotes what one of the two schemas would take for something else than a text."""


for _name, _pattern, _first in _SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_TAG + "int", _Loader.construct_whole_number)
