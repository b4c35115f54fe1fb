"""Casting in several threads and processes: each has regions of its own, and so has the backward pass."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import duotone.torch as dt

from .computation import NARROW, assert_right, by_hand, cast_model, compute, data, gradients, loss_of, weights

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def in_step(*works: Callable[[Callable[[], None]], None]) -> None:
    """Run functions in threads of their own, each of which waits for all others whenever it calls what it is given."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[Callable[[], None]], None]) -> None:
        try:
            work(lambda: barrier.wait(20))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(run, work) for work in works]:
            future.result()


@HALVES
def test_one_thread_inside_of_a_region_and_one_outside(dtype, same_bits):
    plain, cast = compute(data(), *weights()), by_hand(dtype, data(), *weights())

    def within(wait: Callable[[], None]) -> None:
        for _ in range(5):
            wait()
            with dt.autocast("cpu", dtype):
                wait()
                assert_right(compute(data(), *weights()), cast, dtype)
                wait()

    def without(wait: Callable[[], None]) -> None:
        for _ in range(15):
            wait()
            got = compute(data(), *weights())
            assert all(same_bits(got[name], plain[name]) for name in plain)

    in_step(within, without)


def test_threads_that_are_started_inside_are_outside():
    # as under torch.autocast
    found: list[torch.dtype] = []

    def work() -> None:
        found.extend([(data() @ data().T).dtype, data().bfloat16().exp().dtype])

    with dt.autocast("cpu", torch.bfloat16):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [torch.float32, torch.bfloat16]


def test_replicas_in_threads(same_bits):
    # as torch.nn.DataParallel runs them; one model here, which none of them changes
    model = cast_model("bf16")
    params = list(model.parameters())
    inputs = [data() * (number + 1) for number in range(3)]
    expected = [torch.autograd.grad(model(x), params) for x in inputs]

    def replica(x: Tensor, want: tuple[Tensor, ...]) -> Callable[[Callable[[], None]], None]:
        def work(wait: Callable[[], None]) -> None:
            for _ in range(5):
                wait()
                assert all(map(same_bits, torch.autograd.grad(model(x), params), want))

        return work

    in_step(*(replica(x, want) for x, want in zip(inputs, expected, strict=True)))


@HALVES
def test_a_backward_pass_in_another_thread(dtype, same_bits):
    expected = gradients(dt.autocast("cpu", dtype)(compute))
    leaves = [data().requires_grad_(), *weights()]
    with dt.autocast("cpu", dtype):
        loss = loss_of(compute(*leaves))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(same_bits(leaf.grad, want) for leaf, want in zip(leaves, expected, strict=True))


@HALVES
def test_a_backward_pass_is_the_same_inside_and_outside_of_the_region(dtype, same_bits):
    # an open region is not to change how gradients are computed: neither their dtypes nor their bits
    expected = gradients(dt.autocast("cpu", dtype)(compute))
    for other in NARROW:
        leaves = [data().requires_grad_(), *weights()]
        with dt.autocast("cpu", dtype):
            loss = loss_of(compute(*leaves))
        with dt.autocast("cpu", other):
            loss.backward()
        for leaf, want in zip(leaves, expected, strict=True):
            assert leaf.grad.dtype == torch.float32
            torch.testing.assert_close(leaf.grad, want, rtol=0.02, atol=0.005)
        if other == dtype:
            assert all(same_bits(leaf.grad, want) for leaf, want in zip(leaves, expected, strict=True))


class Rows(Dataset[Tensor]):
    """Computes its rows when they are asked for, as augmentations do."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Tensor:
        return data()[place] * 2


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork")
def test_loaders_of_data(workers):
    expected = by_hand(torch.bfloat16, data() * 2, *weights())
    for rows in DataLoader(Rows(), batch_size=4, num_workers=workers):
        with dt.autocast("cpu", torch.bfloat16):
            assert_right(compute(rows, *weights()), expected, torch.bfloat16)
    # iterated inside
    with dt.autocast("cpu", torch.bfloat16):
        for rows in DataLoader(Rows(), batch_size=4, num_workers=workers):
            assert rows.dtype == torch.float32
            assert_right(compute(rows, *weights()), expected, torch.bfloat16)
