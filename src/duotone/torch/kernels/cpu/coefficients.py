"""What an update's elements have in common, parameter by parameter, before the elements are touched.

Computed in FP64 from settings and step counts and rounded once to FP32, as in `reference`; step counts and beta
products move on here. A table of coefficients has `COEFFICIENTS` FP32 columns, one of draws has the step count that
random bits depend on and the seed.
"""

import math
from typing import Any

from duotone.torch.kernels.cpu.formats import f32, f64, i64
from duotone.torch.kernels.cpu.memory import compiled, read_f64, read_i64, write_f32, write_f64, write_i64
from duotone.torch.kernels.table import BETA_PRODUCTS, GROUP, STEP

# words of a job: settings are FP64 rows of `SETTINGS`, the multiplier first, seeds int64
SETTINGS_TABLE, SEEDS, PARAMETERS, COEFFICIENT_TABLE, DRAWS, COUNT, COLUMNS = range(7)
SETTINGS, COEFFICIENTS = 8, 8


def kernel(optimizer: str) -> Any:
    """Return the kernel that fills the tables for an optimizer (`adamw`, `sgd` or `lion`)."""
    coefficients_of = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}[optimizer]

    def run(job):
        for row in range(read_i64(job, COUNT)):
            operand = read_i64(job, PARAMETERS) + 8 * read_i64(job, COLUMNS) * row
            group, step = read_i64(operand, GROUP), read_i64(operand, STEP)
            settings = read_i64(job, SETTINGS_TABLE) + 8 * SETTINGS * group
            draw = read_i64(job, DRAWS) + 16 * row
            write_i64(draw, 0, read_i64(step, 0))
            write_i64(draw, 1, read_i64(read_i64(job, SEEDS), group))
            coefficients_of(operand, settings, read_i64(job, COEFFICIENT_TABLE) + 4 * COEFFICIENTS * row)
            write_i64(step, 0, i64(read_i64(step, 0) + 1))

    return run


@compiled
def _adamw(operand, settings, target):
    lr, beta1, beta2 = read_f64(settings, 1), read_f64(settings, 2), read_f64(settings, 3)
    eps, weight_decay = read_f64(settings, 4), read_f64(settings, 5)
    products = read_i64(operand, BETA_PRODUCTS)
    product1, product2 = read_f64(products, 0) * beta1, read_f64(products, 1) * beta2
    write_f64(products, 0, product1)
    write_f64(products, 1, product2)
    root = math.sqrt(f64(1.0) - product2)
    write_f32(target, 0, f32(read_f64(settings, 0)))
    write_f32(target, 1, f32(f64(1.0) - lr * weight_decay))
    write_f32(target, 2, f32(lr * root / (f64(1.0) - product1)))
    write_f32(target, 3, f32(eps * root))
    write_f32(target, 4, f32(beta2))
    write_f32(target, 5, f32(f64(1.0) - beta1))
    write_f32(target, 6, f32(f64(1.0) - beta2))


@compiled
def _sgd(operand, settings, target):
    lr, momentum, dampening = read_f64(settings, 1), read_f64(settings, 2), read_f64(settings, 3)
    weight_decay, nesterov = read_f64(settings, 4), read_f64(settings, 5)
    write_f32(target, 0, f32(read_f64(settings, 0)))
    write_f32(target, 1, f32(lr))
    write_f32(target, 2, f32(weight_decay))
    write_f32(target, 3, f32(momentum))
    write_f32(target, 4, f32(f64(1.0) - dampening))
    write_f32(target, 5, f32(weight_decay != f64(0.0)))
    write_f32(target, 6, f32(nesterov))
    write_f32(target, 7, f32(read_i64(read_i64(operand, STEP), 0) == i64(0)))


@compiled
def _lion(operand, settings, target):
    lr, beta1, beta2 = read_f64(settings, 1), read_f64(settings, 2), read_f64(settings, 3)
    weight_decay = read_f64(settings, 4)
    write_f32(target, 0, f32(read_f64(settings, 0)))
    write_f32(target, 1, f32(lr))
    write_f32(target, 2, f32(f64(1.0) - lr * weight_decay))
    write_f32(target, 3, f32(beta1))
    write_f32(target, 4, f32(f64(1.0) - beta1))
    write_f32(target, 5, f32(beta2))
    write_f32(target, 6, f32(f64(1.0) - beta2))
