"""The largest micro-batch of an arm that fits into a given memory: each one tried is measured in a new process."""

from duotone.compare.failures import WorkerFailed
from duotone.compare.fit.search import largest_fitting
from duotone.compare.folder import ComparisonFolder
from duotone.compare.job import Job
from duotone.compare.processes.process import Processes
from duotone.compare.processes.worker import BatchMeasurement
from duotone.compare.records import Failure, Fit
from duotone.compare.watcher import Watcher


def fit_arm(job: Job, start: int, limit_bytes: int, folder: ComparisonFolder, watcher: Watcher) -> Fit:
    """Search, from a micro-batch of `start` samples on; whatever fails is in the record.

    Raises:
        TaskError: the task is at fault.
    """
    arm = job.arm.name
    measured: dict[int, BatchMeasurement] = {}
    tried: list[tuple[int, int | None]] = []

    def measure(micro_batch: int) -> int | None:
        peak = None
        try:
            with Processes() as processes:
                process = processes.start(folder.log_path(arm, "fit"))
                measured[micro_batch] = process.ask("measure", job, micro_batch)
            peak = measured[micro_batch].peak_memory_bytes
            if peak is None:
                raise WorkerFailed(Failure("not possible", "this system does not tell how much memory a process used"))
        except WorkerFailed as error:
            if error.failure.kind != "out of memory":
                raise
        tried.append((micro_batch, peak))
        watcher.fit_tried(arm, micro_batch, peak)
        return peak

    try:
        largest = largest_fitting(measure, max(1, start), limit_bytes)
    except WorkerFailed as error:
        return Fit(arm, limit_bytes, tried=tuple(tried), failure=error.failure)
    speed = measured[largest.samples].units_per_second if largest.samples else 0.0
    return Fit(arm, limit_bytes, largest.samples, largest.peak_bytes, speed, largest.tried, remark=largest.remark or "")
