"""A report as strict JSON, for programs: the fields are those of the dataclasses, by their names.

What is not finite is null, as JSON has no word for it. `format` counts up when a field changes its meaning or goes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from duotone.compare.report.report import Report

FORMAT = 1


def as_json(report: Report) -> str:
    """Return the report as a JSON object, ending in a line break."""
    return json.dumps({"format": FORMAT, **_plain(report)}, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it.

    >>> _plain({"a": (1.5, float("nan"))})
    {'a': [1.5, None]}
    """
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
