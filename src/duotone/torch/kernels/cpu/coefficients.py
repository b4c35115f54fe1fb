"""What an update's elements have in common, parameter by parameter, before the elements are touched.

Computed in FP64 from settings and counters and rounded once to FP32, as in `reference`; step counts and counters move
on here. A row of coefficients is FP32: the gradient's multiplier, then those that the update names. A row of draws has
the step count that random bits depend on and the seed.
"""

from importlib import import_module
from typing import Any

from duotone.torch.kernels.cpu.formats import f32, i64
from duotone.torch.kernels.cpu.memory import read_f64, read_i64, tuple_reader, tuple_writer, write_f32, write_i64
from duotone.torch.kernels.table import COUNTERS, GROUP, STEP
from duotone.torch.kernels.updates.definition import Update

# words of a job: settings are FP64 rows, the multiplier first, seeds int64
SETTINGS_TABLE, SEEDS, PARAMETERS, COEFFICIENT_TABLE, DRAWS, COUNT, COLUMNS = range(7)


def kernel(definition: Update) -> Any:
    """Return the kernel that fills the tables for an update."""
    coefficients_of = import_module(f"duotone.torch.kernels.cpu.updates.{definition.name}").coefficients
    read_settings = tuple_reader("f64", len(definition.settings._fields), definition.settings)
    read_counters = tuple_reader("f64", definition.counter_count)
    write_coefficients, write_counters = tuple_writer("f32"), tuple_writer("f64")
    setting_columns = 1 + len(definition.settings._fields)
    coefficient_columns = 1 + len(definition.coefficient_names._fields)

    def run(job):
        for row in range(read_i64(job, COUNT)):
            operand = read_i64(job, PARAMETERS) + 8 * read_i64(job, COLUMNS) * row
            group, step, counters = read_i64(operand, GROUP), read_i64(operand, STEP), read_i64(operand, COUNTERS)
            settings = read_i64(job, SETTINGS_TABLE) + 8 * setting_columns * group
            target = read_i64(job, COEFFICIENT_TABLE) + 4 * coefficient_columns * row
            draw = read_i64(job, DRAWS) + 16 * row
            write_i64(draw, 0, read_i64(step, 0))
            write_i64(draw, 1, read_i64(read_i64(job, SEEDS), group))
            write_f32(target, 0, f32(read_f64(settings, 0)))
            coefficients, moved = coefficients_of(
                read_settings(settings + 8), read_i64(step, 0), read_counters(counters)
            )
            write_coefficients(target + 4, coefficients)
            write_counters(counters, moved)
            write_i64(step, 0, i64(read_i64(step, 0) + 1))

    return run
