"""The verb `export`: a run's weights in a file, and each bad input as one line with exit code 2."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

import duotone.torch as dt

TASK = """
import torch
from duotone.train import Task

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))

def task():
    return Task(
        name="mine",
        model=Tied(),
        loss=lambda model, x: model(x).square().mean(),
        batches=lambda generator: [torch.tensor([0, 1, 3])],
        evaluate=lambda model: {"loss": 0.5},
    )
"""


@pytest.fixture
def run(duotone):
    Path("mine.py").write_text(TASK)
    code, _, errors = duotone(
        *("train", "mine.py", "--policy", "bf16", "--backend", "reference"),
        *("--steps", "4", "--checkpoint-every", "2", "--keep", "2", "--out", "run"),
    )
    assert code == 0, errors
    return Path("run")


def model(name="run/checkpoints/step-00000004"):
    namespace = {}
    exec(TASK, namespace)
    cast = dt.cast(namespace["Tied"](), "bf16")
    dt.load_checkpoint(name, cast)
    return cast, namespace["Tied"]()


def test_the_last_checkpoint_or_another_comes_out_whole(duotone, run):
    code, output, _ = duotone("export", "run", "--out", "new/model.safetensors")
    assert (code, output) == (0, "wrote the weights of step-00000004 in float32 to new/model.safetensors\n")
    cast, plain = model()
    assert load_model(plain, "new/model.safetensors") == (set(), [])
    masters = dt.master_weights(cast)
    assert all(torch.equal(param, masters[name]) for name, param in plain.named_parameters())
    assert "head.weight" not in load_file("new/model.safetensors")

    code, output, _ = duotone("export", "run", "--out", "model.pt", "--step", "2", "--dtype", "bfloat16")
    assert (code, output) == (0, "wrote the weights of step-00000002 in bfloat16 to model.pt\n")
    cast, plain = model("run/checkpoints/step-00000002")
    state, expected = torch.load("model.pt"), dt.export(cast, dtype="bfloat16")
    assert {name: value.dtype for name, value in state.items()} == {n: v.dtype for n, v in expected.items()}
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    plain.load_state_dict(state)

    code, output, _ = duotone("export", "run/checkpoints/step-00000002", "--out", "same.pt", "--dtype", "bfloat16")
    assert code == 0
    assert all(torch.equal(torch.load("same.pt")[name], value) for name, value in expected.items())


def test_bad_input_is_one_line(duotone, run):
    def refused(*arguments):
        code, output, errors = duotone("export", *arguments)
        assert (code, output, len(errors.splitlines())) == (2, "", 1), errors
        return errors

    assert "nowhere holds no checkpoint to export" in refused("nowhere", "--out", "x.pt")
    assert "run has no checkpoint after step 3; it has 2, 4" in refused("run", "--out", "x.pt", "--step", "3")
    assert "x.onnx says by its suffix what it is to hold" in refused("run", "--out", "x.onnx")
    assert "not in int8; choose one of them" in refused("run", "--out", "x.pt", "--dtype", "int8")
    Path("file").write_text("")
    assert "cannot write the weights to file/x.pt" in refused("run", "--out", "file/x.pt")
    with Path("run/checkpoints/step-00000004/tensors.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert "is damaged" in refused("run", "--out", "x.pt")
    assert not Path("x.pt").exists()
    shutil.rmtree("run/checkpoints")
    assert "run holds no checkpoint to export" in refused("run", "--out", "x.pt")
