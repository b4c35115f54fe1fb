"""The same task trained in several ways, side by side: speed, memory and quality, with verdicts and their rules."""

from duotone.compare.arms.catalogue import CATALOGUE, DEFAULT_ARMS, Arm, find_arms, own_arm
from duotone.compare.comparison import compare
from duotone.compare.fit.byte_size import parse_size
from duotone.compare.folder import ComparisonFolder, made_folder, next_free_folder
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Failure, Fit, Phases, Run, Trial
from duotone.compare.report.assembly import assemble
from duotone.compare.report.diff import ArmDifference, Difference, difference
from duotone.compare.report.publish import publish
from duotone.compare.report.report import ArmResult, Report, Spread
from duotone.compare.watcher import Watcher

__all__ = [
    "CATALOGUE",
    "DEFAULT_ARMS",
    "Arm",
    "ArmDifference",
    "ArmResult",
    "ComparisonFolder",
    "Difference",
    "Failure",
    "Fit",
    "Pace",
    "Phases",
    "Plan",
    "Report",
    "Run",
    "Spread",
    "Trial",
    "Watcher",
    "assemble",
    "compare",
    "difference",
    "find_arms",
    "made_folder",
    "next_free_folder",
    "own_arm",
    "parse_size",
    "publish",
]
