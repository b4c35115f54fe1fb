"""Operands of every form, adversarial values, and comparisons that the backends' tests share."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels import Edits, Operand, Rounding, encode
from duotone.torch.kernels.checksums import CELL, sums_of_cells
from duotone.torch.kernels.updates import adamw, lion, sgd
from duotone.torch.kernels.updates.adamw import AdamWSettings
from duotone.torch.kernels.updates.lion import LionSettings
from duotone.torch.kernels.updates.sgd import SGDSettings

UPDATES = {
    "adamw": adamw.UPDATE,
    "sgd": sgd.UPDATE,
    "momentum": sgd.UPDATE,
    "nesterov": sgd.UPDATE,
    "lion": lion.UPDATE,
}
MOMENTS = {"adamw": 2, "sgd": 0, "momentum": 1, "nesterov": 1, "lion": 1}
SETTINGS = {
    "adamw": AdamWSettings(1e-3, 0.9, 0.999, 1e-8, 0.01, maximize=False, seed=5),
    "sgd": SGDSettings(0.1, 0.0, 0.0, 0.0, nesterov=False, maximize=False, seed=2**40 + 3),
    "momentum": SGDSettings(0.01, 0.9, 0.3, 0.0, nesterov=False, maximize=False, seed=-1),
    "nesterov": SGDSettings(0.01, 0.9, 0.0, 0.1, nesterov=True, maximize=False, seed=0),
    "lion": LionSettings(1e-4, 0.9, 0.99, 0.1, maximize=False, seed=7),
}
WEIGHT_FORMS = (
    "float32",
    "bfloat16+tail",
    "float16+tail",
    "bfloat16",
    "float16",
    "bfloat16+stochastic",
    "float16+stochastic",
)
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENT_DTYPES = (torch.float32, torch.bfloat16)


def every_case() -> Iterator[tuple[str, str, torch.dtype, torch.dtype]]:
    """Yield optimizer, weight form, gradient dtype and moment dtype of every case there is."""
    for name, form, grad, moment in itertools.product(UPDATES, WEIGHT_FORMS, GRAD_DTYPES, MOMENT_DTYPES):
        if MOMENTS[name] or moment == torch.float32:
            yield name, form, grad, moment


@functools.cache
def pairs_of_cases() -> list[tuple[str, str, torch.dtype, torch.dtype]]:
    """Return cases in which every two values of different columns that go together come together at least once."""

    def pairs_in(case: tuple) -> set[tuple]:
        return set(itertools.combinations(enumerate(case), 2))

    chosen, cases = [], list(every_case())
    missing = set().union(*map(pairs_in, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_in(case) & missing)))
        missing -= pairs_in(chosen[-1])
    return chosen


def adversarial_masters(numel: int, seed: int) -> Tensor:
    """Return FP32 values of every exponent, at ties of both 16-bit formats, at powers of two and at the ends."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, numel, dtype=np.uint32)
    kind = generator.integers(0, 6, numel)
    bits = np.where(kind == 1, bits & 0xFFFF0000 | 0x8000, bits)
    bits = np.where(kind == 2, bits & 0xFFFFE000 | 0x1000, bits)
    bits = np.where(kind == 3, bits & 0xFF800000, bits)
    values = bits.astype(np.uint32).view(np.float32).copy()
    ordinary = (generator.standard_normal(numel) * np.exp2(generator.integers(-30, 4, numel))).astype(np.float32)
    values = np.where((kind >= 4) | np.isnan(values), ordinary, values)
    ends = [0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-45, -1e-40, 65504.0, 65519.0, 2.0**-16, 2.0**-25, 1.0]
    count = min(numel, len(ends))
    values[:count] = ends[:count]
    return torch.from_numpy(values.astype(np.float32))


def adversarial_grads(numel: int, seed: int) -> Tensor:
    """Return gradients from subnormal to 1e30, most of them ordinary with a few outliers of 10^4."""
    generator = np.random.default_rng(1000 + seed)
    values = generator.standard_normal(numel) * np.where(generator.random(numel) < 0.01, 1e4, 1.0)
    spread = generator.random(numel) < 0.3
    values = np.where(spread, values * 10.0 ** generator.uniform(-44, 30, numel), values)
    values[: min(2, numel)] = [0.0, -0.0][:numel]
    return torch.from_numpy(values.astype(np.float32))


def make_operand(
    form: str, grad_dtype: torch.dtype, moments: int, moment_dtype: torch.dtype, numel: int, index: int, group: int = 0
) -> Operand:
    """Return an operand of a form that has been trained for a few steps already, or for none (index 0)."""
    dtype, _, kind = form.partition("+")
    master = adversarial_masters(numel, index)
    weight, tail = master.clone(), None
    if kind == "tail":
        weight, tail = encode(master, getattr(torch, dtype))
    elif dtype != "float32":
        weight = master.to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(index)
    held = [torch.zeros(numel) if index == 0 else torch.randn(numel, generator=generator) for _ in range(moments)]
    held[1:] = [moment.square() for moment in held[1:]]
    step = 0 if index == 0 else index + 3
    return Operand(
        weight,
        tail,
        adversarial_grads(numel, index).to(grad_dtype),
        tuple(moment.to(moment_dtype) for moment in held),
        torch.tensor(step),
        torch.tensor([0.9**step, 0.999**step], dtype=torch.float64),
        Rounding.STOCHASTIC if kind == "stochastic" else Rounding.NEAREST,
        index,
        group,
        None if tail is None else torch.cat((sums_of_cells(weight), torch.zeros(1, dtype=torch.int32))),
    )


def copy_of(operands: Sequence[Operand]) -> list[Operand]:
    """Return operands that share no memory with the given ones."""

    def copied(value):
        if isinstance(value, Tensor):
            return value.clone()
        return tuple(moment.clone() for moment in value) if isinstance(value, tuple) else value

    return [Operand(*map(copied, operand)) for operand in operands]


def tensors_of(operand: Operand) -> dict[str, Tensor]:
    """Return what an update may write, by name."""
    named = {"weight": operand.weight, "tail": operand.tail, "step": operand.step, "counters": operand.counters}
    named["checksums"] = operand.checksums
    named |= {f"moment {number}": moment for number, moment in enumerate(operand.moments)}
    return {name: value for name, value in named.items() if value is not None}


def differing(first: Sequence[Operand], second: Sequence[Operand]) -> list[str]:
    """Return where two lists of operands differ in a bit; NaN is NaN whatever its payload, and has its tail."""
    found = []
    for one, other in zip(first, second, strict=True):
        for name, value in tensors_of(one).items():
            expected = tensors_of(other)[name]
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
            same = value.view(integers) == expected.view(integers)
            if value.is_floating_point():
                same |= value.isnan() & expected.isnan()
            if name == "checksums":
                # nor is the checksum of a NaN another one's
                same[one.weight.isnan().nonzero().flatten() // CELL] = True
            if not same.all():
                place = int((~same).flatten().nonzero()[0])
                found.append(
                    f"{name} of parameter {one.number}: {int((~same).sum())} of {same.numel()} differ, at {place} "
                    f"{value.flatten()[place].item()!r} for {expected.flatten()[place].item()!r}"
                )
    return found


def edit(*lists: Sequence[Operand]) -> None:
    """Change weights in some cells as other code might, and leave all other cells as they are."""
    for operand in itertools.chain(*lists):
        numel = operand.weight.numel()
        operand.weight[:1] = 0.0
        if numel > CELL + 100:
            # an exchange of two, the first of the second cell
            places = torch.tensor([CELL, CELL + 99], device=operand.weight.device)
            operand.weight[places] = operand.weight[places.flip(0)]
        operand.weight[max(numel - 3, 0) :] *= 0.5


def step_both(
    backends: Sequence[ModuleType],
    optimizer: str,
    operands: Sequence[Sequence[Operand]],
    grads: Sequence[Tensor],
    settings: Sequence[tuple] | None = None,
    *,
    multiplier: float = 0.37,
    found_inf: bool = False,
) -> None:
    """Step each backend's own operands with the same gradients."""
    settings = [SETTINGS[optimizer]] if settings is None else settings
    edits = [Edits(torch.zeros((), dtype=torch.int32), 2) for _ in backends]
    for backend, own, seen in zip(backends, operands, edits, strict=True):
        for operand, grad in zip(own, grads, strict=True):
            operand.grad.copy_(grad)
        backend.update(UPDATES[optimizer], own, settings, torch.tensor(multiplier), torch.tensor(found_inf), seen)
    assert len({seen.item() for seen, _ in edits}) == 1
