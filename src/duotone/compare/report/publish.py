"""Writes a comparison's report: a page, Markdown and JSON, all of one value."""

from duotone.compare.folder import ComparisonFolder
from duotone.compare.report.as_json import as_json
from duotone.compare.report.assembly import assemble
from duotone.compare.report.markdown import markdown
from duotone.compare.report.page import page
from duotone.compare.report.report import Report


def publish(folder: ComparisonFolder) -> Report:
    """Make the report of the records that a folder holds, write it there in all three forms, and return it.

    Raises:
        CompareError: there is no comparison yet, a record cannot be read, or a file cannot be written.
    """
    report = assemble(folder)
    folder.write_text("report.json", as_json(report))
    folder.write_text("report.md", markdown(report))
    folder.write_text("report.html", page(report))
    return report
