"""A report as strict JSON, for programs: the fields are those of the dataclasses, by their names.

What is not finite is null, as JSON has no word for it. `format` counts up when a field changes its meaning or goes.
"""

import msgspec

from duotone.compare.report.report import Report

FORMAT = 1


def as_json(report: Report) -> str:
    """Return the report as a JSON object, ending in a line break."""
    # read-only mappings are written as dictionaries
    content = msgspec.json.encode({"format": FORMAT, **vars(report)}, enc_hook=dict)
    return msgspec.json.format(content, indent=1).decode() + "\n"
