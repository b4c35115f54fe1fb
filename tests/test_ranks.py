"""What goes wrong on one rank is raised on all; three ranks are threads here, which exchange values at a barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from duotone.errors import CheckpointError, PolicyError, TaskError
from duotone.ranks import Ranks

SIZE = 3


def on_all(action):
    """Return what `action(ranks)` returned or raised on each of three ranks."""
    barrier, values = threading.Barrier(SIZE, timeout=30), [None] * SIZE

    def run(rank):
        def exchange(value):
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        try:
            return action(Ranks(rank, SIZE, exchange, TaskError))
        except BaseException as error:
            return type(error), str(error)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(run, range(SIZE)))


def fail_on(*ranks, error):
    def action(own):
        def fail():
            if own.rank in ranks:
                raise error(f"of {own.rank}" if len(ranks) < SIZE else "of all")
            return own.rank

        return own.agree(fail)

    return action


def test_results_come_back():
    assert on_all(lambda ranks: ranks.gather(ranks.rank)) == [[0, 1, 2]] * SIZE
    assert on_all(lambda ranks: ranks.agree(lambda: ranks.rank)) == [0, 1, 2]
    assert on_all(lambda ranks: ranks.first(lambda: f"of {ranks.rank}")) == ["of 0"] * SIZE


def test_a_failure_is_raised_on_all_ranks_with_its_kind():
    assert on_all(fail_on(1, error=PolicyError)) == [(PolicyError, "of 1 (on rank 1)")] * SIZE
    both = "of 0 (on rank 0); of 2 (on rank 2)"
    assert on_all(fail_on(0, 2, error=CheckpointError)) == [(CheckpointError, both)] * SIZE
    assert on_all(fail_on(2, error=OSError)) == [(TaskError, "OSError: of 2 (on rank 2)")] * SIZE


def test_a_failure_of_all_ranks_is_raised_as_it_is():
    assert on_all(fail_on(0, 1, 2, error=OSError)) == [(OSError, "of all")] * SIZE


def test_an_interrupt_is_raised_where_it_happens():
    interrupt = (KeyboardInterrupt, "of 1")
    others = (TaskError, "KeyboardInterrupt: of 1 (on rank 1)")
    assert on_all(fail_on(1, error=KeyboardInterrupt)) == [others, interrupt, others]


@pytest.mark.parametrize("error", [PolicyError, OSError])
def test_what_fails_on_the_first_rank_fails_on_all(error):
    def action(ranks):
        def fail():
            raise error("bad")

        return ranks.first(fail)

    others = (PolicyError, "bad") if error is PolicyError else (TaskError, "OSError: bad")
    assert on_all(action) == [(error, "bad"), others, others]


def test_alone_nothing_is_exchanged():
    alone = Ranks()
    assert (alone.gather(3), alone.agree(lambda: 4), alone.first(lambda: 5)) == ([3], 4, 5)
    with pytest.raises(OSError, match="mine"):
        alone.first(lambda: (_ for _ in ()).throw(OSError("mine")))
