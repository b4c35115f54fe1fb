"""Training on two ranks: what one process with as many micro-batches does, whatever way the model is spread."""

import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError, DuotoneWarning, NonFiniteLoss, TaskError
from duotone.train import Group, RunFolder, RunSettings, Task, Trainer, open_ranks

BLOCKS, STEPS = 3, 6


class Model(nn.Module):
    """Blocks in a list, norms that a policy keeps in FP32, a buffer that follows the data, and a method of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.into = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(dropout))
            for _ in range(BLOCKS)
        )
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)

    def error(self, x: torch.Tensor) -> torch.Tensor:
        return (self(x).float() - x.square().sum(1, keepdim=True)).square().mean()


def make_task(dropout: float = 0.0, **changes: Any) -> Task:
    torch.manual_seed(0)

    def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
        # an epoch of an odd number of batches: ranks change places in the next
        for _ in range(7):
            yield torch.rand(8, 4, generator=generator)

    def evaluate(model: Any) -> dict[str, float]:
        model.eval()
        with torch.inference_mode():
            error = model.error(torch.linspace(0, 1, 32).reshape(8, 4)).item()
        model.train()
        return {"loss": error}

    parts: dict[str, Any] = {"loss": lambda model, x: model.error(x), "batches": batches, "evaluate": evaluate}
    return Task(name="two", model=Model(dropout), **{**parts, **changes})


def make(task: Task | None = None, folder: Path | None = None, **settings: Any) -> Trainer:
    told = {"steps": STEPS, "log_every": 3, "evaluate_every": 3, "learning_rate": 1e-2, **settings}
    ranks = Group.join() if dist.is_initialized() else Group()
    place = None if folder is None else RunFolder(folder)
    trainer = Trainer(task or make_task(), RunSettings(**told), place, ranks)
    if folder is not None and not ranks.first(folder.exists):
        ranks.first(lambda: RunFolder(folder).start(trainer.settings))
    return trainer


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def result(trainer: Trainer, stop_after: int | None = None) -> dict[str, Any]:
    """Train, and return masters, buffers and metrics."""
    lines = [
        (line.loss, line.quality, line.grad_norm, line.skipped, line.peak_memory_bytes)
        for line in trainer.run(stop_after)
    ]
    masters = dt.master_weights(trainer.model, trainer.optimizer)
    buffers = {name: whole(buffer) for name, buffer in trainer.model.named_buffers()}
    return {"lines": lines, "masters": {name: whole(master) for name, master in masters.items()}, "buffers": buffers}


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return how far masters are apart at most, in units of FP32's last place of the largest."""
    pairs = [(first["masters"][name], second["masters"][name]) for name in first["masters"]]
    scale = max(b.abs().max().item() for _, b in pairs) * torch.finfo(torch.float32).eps
    return max((a - b).abs().max().item() for a, b in pairs) / scale


# policy, micro-batches, parallel; in one half, each two of them that go together are together once
PAIRS = (
    ("fp32", 1, "ddp"),
    ("fp32", 2, "fsdp"),
    ("bf16", 1, "fsdp"),
    ("bf16", 2, "ddp"),
    ("fp16", 1, "fsdp"),
    ("fp16", 2, "ddp"),
)
OTHERS = tuple((policy, 3 - micro, parallel) for policy, micro, parallel in PAIRS)


@pytest.mark.parametrize("cases", [PAIRS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["pairs", "others"])
def test_two_ranks_do_what_one_process_does_with_twice_the_micro_batches(cases, ranks):
    cases = [dict(zip(("policy", "micro_batches", "parallel"), case, strict=True)) for case in cases]
    first, second = ranks.run(2, results_in_eval, cases)
    halved = [{**case, "parallel": "auto", "micro_batches": 2 * case["micro_batches"]} for case in cases]
    (alone,) = ranks.run(1, results_in_eval, halved)
    for case, got, other, want in zip(cases, first, second, alone, strict=True):
        # the ranks know the same, and hold the same
        assert got["lines"] == other["lines"]
        assert largest_difference(got, other) == 0
        micro = 2 * case["micro_batches"]
        # two gradients have one sum in whatever order, but for the subnormal numbers of FP16's small scales at the
        # beginning, which are rounded once more where the sum is halved. Of four, the order shows in FP32's last
        # places, and in 16 bits each rank rounds its own sum before they meet: a thousandth of the largest weight
        small = 64 if case["policy"] == "fp16" else 0
        allowed = small if micro == 2 else 64 if case["policy"] == "fp32" else 2**13
        assert largest_difference(got, want) <= allowed, case
        for line, wanted in zip(got["lines"], want["lines"], strict=True):
            assert line[:3] == pytest.approx(wanted[:3], rel=1e-6 if micro == 2 else 2e-2)
            assert line[3] == wanted[3]


def results_in_eval(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results of a model whose statistics stand still, so that they do not depend on who sees which batch."""

    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model.eval().error(x)

    return [result(make(make_task(loss=loss), **case)) for case in cases]


def test_statistics_of_norms_and_dropout_are_the_same_run_after_run(ranks, tmp_path):
    answers = ranks.run(2, stop_and_go_on, str(tmp_path))
    for answer in answers:
        for parallel, (uninterrupted, resumed, drawn) in answer.items():
            assert uninterrupted["lines"][-1][:4] == resumed["lines"][-1][:4], parallel
            for kind in ("masters", "buffers"):
                for name, value in uninterrupted[kind].items():
                    assert torch.equal(value, resumed[kind][name]), (parallel, name)
            assert drawn == answers[0][parallel][2] if answer is answers[0] else drawn != answers[0][parallel][2]
    # all are drawn from the seed and the rank
    assert answers[1]["ddp"][2] == answers[1]["fsdp"][2]


def stop_and_go_on(folder: str) -> dict[str, Any]:
    """Return for both ways an undisturbed run, one that was stopped between two lines, and what was drawn."""
    answer = {}
    for parallel in ("ddp", "fsdp"):
        uninterrupted = result(make(make_task(dropout=0.2), parallel=parallel))
        settings = {"parallel": parallel, "checkpoint_every": 2, "keep": 1}
        path = Path(folder, parallel)
        trainer = make(make_task(dropout=0.2), path, **settings)
        drawn = [torch.rand(1).item(), random.random(), np.random.rand()]
        trainer = make(make_task(dropout=0.2), path, **settings)
        list(trainer.run(4))
        torch.manual_seed(99)
        resumed = make(make_task(dropout=0.2), path, **settings)
        resumed.resume()
        answer[parallel] = uninterrupted, result(resumed), drawn
    return answer


def numbered(seen: list[int]) -> Task:
    """Return a task whose epoch is batches of one number each, and that notes which it is trained on."""

    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(int(x[0, 0]))
        return model(x / 100).square().mean()

    return make_task(loss=loss, batches=lambda _: [torch.full((8, 4), float(number)) for number in range(11)])


def take(folder: str, stop_after: int) -> tuple[list[int], list[str]]:
    """Go on with the run in a folder, or begin it; return the batches taken and the warnings."""
    seen: list[int] = []
    path = Path(folder)
    begins = not path.exists()
    trainer = make(numbered(seen), path, steps=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DuotoneWarning)
        if not begins:
            trainer.resume()
        list(trainer.run(stop_after))
    return seen, [str(each.message) for each in caught if "a step takes" in str(each.message)]


def test_a_run_goes_on_in_the_data_on_another_number_of_ranks(ranks, tmp_path):
    run = str(tmp_path / "run")
    assert ranks.run(2, take, run, 3) == [([0, 2, 4], []), ([1, 3, 5], [])]
    seen, notes = take(run, 6)
    assert seen == [6, 7, 8]
    assert notes == ["a step takes 1 batch from here on, where it took 2; the run goes on in the data where it stood"]
    (first, notes), (second, _) = ranks.run(2, take, run, 9)
    assert (first, second) == ([9, 0, 2], [10, 1, 3])
    assert "a step takes 2 batches from here on, 1 on each of 2 ranks, where it took 1" in notes[0]


def oddities(folder: str) -> dict[str, Any]:
    """Return what happens on this rank in cases out of the ordinary."""
    rank, answer = dist.get_rank(), {}

    # an evaluation in inference mode before anything was gathered
    trainer = make(parallel="fsdp")
    before = trainer.summary()
    list(trainer.run())
    answer["evaluated first"] = before.evaluation, trainer.summary().evaluation["loss"] < before.evaluation["loss"]

    # one rank is asked to stop
    trainer = make(folder=Path(folder, "stopped"), steps=50, log_every=1)
    for line in trainer.run():
        if line.step == 4 and rank == 1:
            trainer.stop()
    answer["stopped"] = trainer.step, [path.name for path in RunFolder(Path(folder, "stopped")).checkpoints()]

    # the loss is not finite on one rank alone
    loss = lambda model, x: model.error(x) * (torch.inf if rank == 1 else 1.0)  # noqa: E731
    answer["infinite"] = raised(lambda: list(make(make_task(loss=loss)).run()), NonFiniteLoss)

    # a part of the model that no loss depends on
    loss = lambda model, x: model.into(x).square().mean()  # noqa: E731
    answer["unused"] = raised(lambda: list(make(make_task(loss=loss), parallel="ddp").run()), TaskError)
    answer["unused in parts"] = len(list(make(make_task(loss=loss), parallel="fsdp").run()))

    # nothing to resume, and a checkpoint that is broken on the disk
    trainer = make(folder=Path(folder, "empty"))
    answer["empty"] = raised(trainer.resume, CheckpointError)

    group = Group.join()
    fails = lambda: int("one") if rank == 1 else rank  # noqa: E731
    answer["agree"] = raised(lambda: group.agree(fails), TaskError)
    answer["first"] = raised(lambda: group.first(lambda: int("none")), (TaskError, ValueError))
    answer["result"] = group.first(lambda: f"rank {rank}"), group.agree(lambda: rank), group.gather(rank)
    answer["device"] = raised(lambda: group.device("cuda:0"), TaskError)
    return answer


def raised(action: Any, kind: Any) -> str:
    with pytest.raises(kind) as error:
        action()
    return str(error.value)


def test_ranks_stop_fail_and_learn_of_each_other_together(ranks, tmp_path):
    first, second = ranks.run(2, oddities, str(tmp_path))
    assert first["evaluated first"] == second["evaluated first"]
    assert first["evaluated first"][1]
    # asked for after step 4, known from step 5 on, done and saved with it
    assert first["stopped"] == second["stopped"] == (5, ["step-00000005"])
    assert first["infinite"] == second["infinite"]
    assert "the loss became inf by step 3" in first["infinite"]
    assert first["unused"] == second["unused"]
    assert "a loss does not depend on blocks.0.0.weight, blocks.0.0.bias, blocks.0.1.weight, ..." in first["unused"]
    assert first["unused in parts"] == 2
    assert first["empty"] == second["empty"]
    assert "holds no checkpoint" in first["empty"]
    assert first["agree"] == second["agree"]
    assert first["agree"] == "ValueError: invalid literal for int() with base 10: 'one' (on rank 1)"
    assert "invalid literal" in first["first"]
    assert second["first"] == f"ValueError: {first['first']}"
    assert (first["result"], second["result"]) == (("rank 0", 0, [0, 1]), ("rank 0", 1, [0, 1]))
    assert first["device"] == 'device "cuda:0" is one for 2 ranks; say "cuda", and each takes its own'


def speak(folder: str, cases: list[Any]) -> list[bool | None]:
    """Return whether this rank speaks of an error that comes after a while; one after another case."""
    from torch.distributed import FileStore

    from duotone.train import group

    group._PATIENCE_SECONDS = 1.0
    answer = []
    for number, case in enumerate(cases):
        joined = Group.join(store=FileStore(f"{folder}/{number}", 2))
        dist.barrier()
        mine = case[dist.get_rank()]
        if mine is None:
            answer.append(None)
        else:
            time.sleep(mine[0])
            answer.append(joined.prints(ValueError(mine[1])))
        dist.barrier()
    return answer


def test_one_rank_speaks_of_what_ends_all(ranks, tmp_path):
    cases = [
        # the same on both, whoever is first
        ((0.0, "same"), (0.3, "same")),
        ((0.3, "same"), (0.0, "same")),
        # a consequence on the other
        ((0.0, "cause"), (0.3, "consequence")),
        # on rank 1 alone
        (None, (0.0, "cause")),
    ]
    assert ranks.run(2, speak, str(tmp_path), cases) == [[True, True, True, None], [False, False, False, True]]


def test_alone_nobody_is_asked_for(monkeypatch):
    with pytest.raises(TaskError, match=r'parallel is "fsdp", but .*-m duotone train --parallel fsdp, or'):
        make(parallel="fsdp")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(TaskError, match="RANK, WORLD_SIZE are set in the environment, but MASTER_ADDR, MASTER_PORT is"),
        open_ranks(),
    ):
        pass
