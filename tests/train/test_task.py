"""Tasks as values, tasks in files, and the names of the built-in ones."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from duotone.errors import TaskError
from duotone.train.task import Task, evaluating, load_task_file, samples_in
from duotone.train.tasks import BUILT_IN, built_in_task, find_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task.py"

TASK_FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from duotone.train.task import Task
from sibling_of_the_task import NAME

@dataclass(frozen=True)
class Settings:
    width: int = 1

def task():
    return Task(NAME, torch.nn.Linear(Settings().width, 1), lambda m, b: m(b).sum(), lambda g: [], lambda m: {})
"""


def fields(**changed):
    """Return the fields of a valid task, some of them changed."""
    valid = {
        "name": "zero",
        "model": nn.Linear(1, 1),
        "loss": lambda model, batch: model(batch).sum(),
        "batches": lambda generator: [],
        "evaluate": lambda model: {"loss": 0.0},
    }
    return {**valid, **changed}


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        (torch.zeros(3, 2), 3),
        ([torch.tensor(1.0), torch.zeros(4)], 4),
        ({"x": (["text", torch.zeros(5)],), "y": torch.zeros(6)}, 5),
        (({"x": torch.zeros(5)}, torch.zeros(6)), 5),
    ],
)
def test_a_batch_is_as_long_as_its_first_tensor(batch, length):
    assert samples_in(batch) == length


@pytest.mark.parametrize("batch", [[], {"x": "text"}, torch.tensor(1.0)])
def test_a_batch_without_a_length_is_refused(batch):
    with pytest.raises(TaskError, match="give the task `units_in`"):
        samples_in(batch)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": ""}, "name is ''; it must be a non-empty string"),
        ({"quality": 1}, "quality is 1; it must be a non-empty string"),
        ({"unit": None}, "unit is None; it must be a non-empty string"),
        ({"model": 3}, "model is 3; it must be a torch.nn.Module"),
        ({"loss": 0.5}, "loss is 0.5; it must be a function"),
        ({"batches": [1]}, "batches is [1]; it must be a function"),
        ({"evaluate": None}, "evaluate is None; it must be a function"),
        ({"units_in": 3}, "units_in is 3; it must be a function"),
        ({"lower_is_better": "yes"}, "lower_is_better is 'yes'; it must be True or False"),
        ({"settings": {1: 2}}, "settings is {1: 2}; it must be a mapping from strings to values"),
        ({"baselines": {"coin": "1"}}, "baselines is {'coin': '1'}; it must be a mapping from strings to numbers"),
        ({"facts": ["a"]}, "facts is ['a']; it must be a mapping from strings to strings"),
        ({"model": nn.Linear(1, 1).half()}, "its model's weight is float16; hand the model over in float32"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(changed, message):
    with pytest.raises(TaskError, match=re.escape(message)):
        Task(**fields(**changed))


def test_evaluation_leaves_every_module_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()

    def evaluate_and_fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not model[0](torch.zeros(1, 2)).requires_grad
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluate_and_fail()
    assert [module.training for module in model.modules()] == [True, False, True]


def test_a_task_file_sees_its_neighbours_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sibling_of_the_task", raising=False)
    (tmp_path / "sibling_of_the_task.py").write_text("NAME = 'from a file'")
    (tmp_path / "mine.py").write_text(TASK_FILE)
    modules, path = set(sys.modules), list(sys.path)
    assert find_task(str(tmp_path / "mine.py")).name == "from a file"
    assert set(sys.modules) - modules == {"sibling_of_the_task"}
    assert sys.path == path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("\ndef task(:\n", "mine.py, line 2: SyntaxError: "),
        ("def task():\n    return one()\ndef one():\n    raise KeyError('a')\n", "mine.py, line 4: KeyError: 'a'"),
        ("import torch\ntorch.zeros(2)[3]\n", "mine.py, line 2: IndexError: "),
        ("raise ValueError('first\\nsecond')", "mine.py, line 1: ValueError: first"),
        ("raise ValueError", "mine.py, line 1: ValueError: "),
        ("", "mine.py defines no task(); define one that takes nothing and returns a Task"),
        ("task = 3", "mine.py defines no task()"),
        ("def task():\n    return 3\n", "mine.py returned a int; it must return a Task"),
        (
            "from duotone.train.task import Task\ntask = lambda: Task('a', 3, print, print, print)",
            "mine.py, line 2: TaskError: task 'a': model is 3; it must be a torch.nn.Module",
        ),
    ],
)
def test_a_faulty_task_file_is_one_line(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(TaskError) as caught:
        load_task_file(tmp_path / "mine.py")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (set(sys.modules), sys.path) == (modules, path)


def test_a_missing_file_and_one_that_is_not_python(tmp_path):
    with pytest.raises(TaskError, match=r"there is no file .*none\.py; give a file that defines task\(\)"):
        find_task(str(tmp_path / "none.py"))
    (tmp_path / "task.txt").write_text("")
    with pytest.raises(TaskError, match=r"its name must end in \.py"):
        load_task_file(tmp_path / "task.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digit", "there is no task 'digit'; did you mean digits?"),
        ("", "there is no task ''; known: stdlib-text, digits"),
        ("digits:conv", "digits has no variant 'conv'; did you mean convnet?"),
        ("digits:", "digits has no variant ''; known: mlp, convnet"),
        ("stdlib-text:smal", "stdlib-text has no size 'smal'; did you mean small?"),
    ],
)
def test_an_unknown_name_gets_a_hint(text, message):
    with pytest.raises(TaskError, match=re.escape(message)):
        find_task(text)


def test_the_table_lists_the_variants_that_exist_the_default_first():
    text = import_module(BUILT_IN["stdlib-text"].module)
    digits = import_module(BUILT_IN["digits"].module)
    assert set(BUILT_IN["stdlib-text"].variants) == set(text.SIZES)
    assert set(BUILT_IN["digits"].variants) == set(digits.MODELS)
    for name, entry in BUILT_IN.items():
        assert built_in_task(name).name == f"{name}:{entry.variants[0]}"


def test_the_example_learns():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    torch.manual_seed(0)
    task = find_task(str(EXAMPLE))
    before = task.evaluate(task.model)
    assert before == task.evaluate(task.model)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    for epoch in range(4):
        for batch in task.batches(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
    assert task.evaluate(task.model)[task.quality] < 0.5 * before[task.quality]
