"""The CUDA backend: bits on a GPU or in Triton's interpreter, uploads anywhere, graphs and streams on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duotone.torch.kernels import reference

from .grid import SETTINGS, UPDATES, copy_of, differing, make_operand

triton = pytest.importorskip("triton", reason="the cuda backend needs Triton")
from duotone.torch.kernels import cuda  # noqa: E402
from duotone.torch.kernels.cuda import launch, settings, upload  # noqa: E402

CPU = torch.device("cpu")
ADAMW = UPDATES["adamw"]


@pytest.mark.parametrize(
    ("name", "chosen", "cases"),
    [
        ("cuda_formats.py cuda_averages.py cuda_cross_entropy.py cuda_norms.py", "not slow", 74),
        pytest.param("cuda_grid.py", "not slow", 125, marks=pytest.mark.slow, id="pairs"),
        pytest.param("cuda_grid.py", "slow", 150, marks=pytest.mark.slow, id="grid"),
    ],
)
def test_every_bit(name, chosen, cases):
    # the interpreter is chosen when Triton is imported, so it has a process of its own
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    files = [str(Path(__file__).with_name(file)) for file in name.split()]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", chosen, *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-10_000:]}\n{run.stderr[-2_000:]}"
    summary = run.stdout.strip().splitlines()[-1]
    # a grid that has lost its cases, or skips them, has not passed
    passed = re.fullmatch(r"(\d+) passed(, \d+ deselected)?(, \d+ warnings?)? in .*", summary)
    assert passed, summary
    assert int(passed[1]) >= cases, summary


@pytest.fixture
def uploads(monkeypatch):
    """Return the list that every upload adds its arrays to; nothing that was uploaded before is cached."""
    seen = []

    def recorded(arrays, device):
        seen.append(arrays)
        return upload.upload(arrays, device)

    for module, cache in ((launch, "_update_tables"), (launch, "_sum_tables"), (settings, "_cache")):
        monkeypatch.setattr(module, "upload", recorded)
        monkeypatch.setattr(module, cache, upload.Cache(4))
    return seen


def prepared(operands, groups):
    tables = launch.tables_of(operands)
    key = id(tables), CPU
    table = launch._update_tables.get(key, CPU, lambda: launch._update_table(tables, CPU))
    return table, settings.device_settings(groups, CPU)


def test_what_has_not_changed_is_not_uploaded_again(uploads):
    operands = [make_operand("bfloat16+tail", torch.bfloat16, 2, torch.float32, 10, index) for index in range(3)]
    groups = [SETTINGS["adamw"]]
    for _ in range(3):
        prepared(operands, groups)
    assert len(uploads) == 2
    prepared(operands, [groups[0]._replace(lr=7.0)])
    assert len(uploads) == 3
    operands[1] = operands[1]._replace(grad=operands[1].grad.clone())
    prepared(operands, groups)
    assert len(uploads) == 4


def test_a_table_keeps_aligned_parameters_apart():
    operands = [make_operand("float32", torch.float32, 0, torch.float32, 40_000, index) for index in range(3)]
    operands[1] = operands[1]._replace(grad=torch.zeros(40_001)[1:])
    table = launch._update_table(launch.tables_of(operands), CPU)
    assert [(part.aligned, part.chunks.tolist()) for part in table.parts] == [
        (True, [[0, 0], [0, 32768], [2, 0], [2, 32768]]),
        (False, [[1, 0], [1, 32768]]),
    ]
    assert all(part.chunks.data_ptr() % 16 == 0 for part in table.parts)


def test_forms_share_one_table_of_parameters():
    operands = [
        make_operand(form, torch.float32, 0, torch.float32, 5, index)
        for index, form in enumerate(("float32", "bfloat16+tail", "float32"))
    ]
    table = launch._update_table(launch.tables_of(operands), CPU)
    # rows are those of the first form, then those of the second
    assert [part.chunks[:, 0].tolist() for part in table.parts] == [[0, 1], [2]]
    assert table.parameters[:, launch.GRAD].tolist() == [operands[index].grad.data_ptr() for index in (0, 2, 1)]


def test_a_cache_forgets_the_oldest():
    cache = upload.Cache(2)
    for key in ("a", "b", "a", "c"):
        cache.get(key, CPU, object)
    made = []
    for key in ("a", "c", "b"):
        cache.get(key, CPU, lambda key=key: made.append(key) or key)
    assert made == ["b"]


def test_a_capture_keeps_what_it_reads_and_caches_nothing(monkeypatch):
    monkeypatch.setattr(upload, "_kept", [])
    cache = upload.Cache(2)
    before = cache.get("before", CPU, lambda: upload.upload([np.arange(3)], CPU))
    assert upload._kept == []
    monkeypatch.setattr(upload, "is_capturing", lambda device: True)
    assert cache.get("before", CPU, list) is before
    assert upload._kept[0] is before
    (during,) = cache.get("during", CPU, lambda: upload.upload([np.arange(5)], CPU))
    # the pinned memory that a replay copies from
    assert upload._kept[1][:5].tolist() == during.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(upload, "is_capturing", lambda device: False)
    assert cache.get("during", CPU, list) == []


def on_gpu(*forms):
    operands = [make_operand(*form, 5000, index) for index, form in enumerate(forms)]
    for operand in operands:
        operand.grad.normal_(generator=torch.Generator().manual_seed(operand.number))
    return [
        operand._replace(
            weight=operand.weight.cuda(),
            tail=None if operand.tail is None else operand.tail.cuda(),
            grad=operand.grad.cuda(),
            moments=tuple(moment.cuda() for moment in operand.moments),
            step=operand.step.cuda(),
            counters=operand.counters.cuda(),
        )
        for operand in operands
    ]


FORMS = (
    ("bfloat16+tail", torch.bfloat16, 2, torch.float32),
    ("float16+stochastic", torch.float16, 2, torch.bfloat16),
    ("float32", torch.float32, 2, torch.float32),
)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    operands = on_gpu(*FORMS)
    one, lr = torch.ones((), device="cuda"), torch.tensor(0.1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            # other addresses and other numbers in every step
            grads = [operand.grad.clone() for operand in operands]
            operands = [operand._replace(grad=grad) for operand, grad in zip(operands, grads, strict=True)]
            group = SETTINGS["adamw"]._replace(lr=lr if step % 2 else 0.1 / (step + 1))
            _, found_inf = cuda.grad_stats(grads, one)
            cuda.update(ADAMW, operands, [group], one, found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("seen", [False, True], ids=["table made in the capture", "table made before"])
def test_a_captured_step_is_the_eager_one_with_a_changing_learning_rate(seen):
    eager = on_gpu(*FORMS)
    captured, warm = copy_of(eager), copy_of(eager)
    lr, one = torch.tensor(0.1, device="cuda"), torch.ones((), device="cuda")
    groups = [SETTINGS["adamw"]._replace(lr=lr)]

    def step(operands):
        total, found_inf = cuda.grad_stats([operand.grad for operand in operands], one)
        cuda.update(ADAMW, operands, groups, one, found_inf)
        return total

    step(warm)
    if seen:
        step(captured)
        step(eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_total = step(captured)
    for number in range(4):
        lr.fill_(0.1 / (number + 1))
        for one_grad, other in zip(eager, captured, strict=True):
            one_grad.grad.mul_(0.7)
            other.grad.copy_(one_grad.grad)
        # memory that was given back would be overwritten by now
        trash = [torch.full((2048,), -1, device="cuda") for _ in range(50)]
        graph.replay()
        total = step(eager)
        assert graph_total.item() == total.item()
        assert not differing(captured, eager)
        del trash


@pytest.mark.gpu
def test_the_reference_on_the_gpu_has_the_same_bits():
    operands = on_gpu(*FORMS)
    others = copy_of(operands)
    one, found_inf = torch.ones((), device="cuda"), torch.tensor(False, device="cuda")
    for _ in range(3):
        cuda.update(ADAMW, operands, [SETTINGS["adamw"]], one, found_inf)
        reference.update(ADAMW, others, [SETTINGS["adamw"]], one, found_inf)
        assert not differing(operands, others)
