"""A program that imports duotone.torch from a torch that lacks a name, and uses it; a fork of its own for each name.

It is a process apart, because torch's backward passes do not work in a fork of a process that has run some. Jobs come
as JSON on its input, `[name, use]`, and answers go to its output: a traceback, or nothing.
"""

import json
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def losses(dt: Any, policy: str) -> list[float]:
    """Train a small model with everything that most loops have, and return its losses."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)
    model = dt.cast(nn.Sequential(*layers), policy)
    # compilers would be loaded in each fork
    optimizer = dt.AdamW(model.parameters(), lr=1e-2, backend="reference")
    scaler = dt.LossScaler(policy)
    x = torch.randn(16, 8)
    values = []
    for _ in range(4):
        loss = nn.functional.mse_loss(model(x).float(), x.sum(1, keepdim=True))
        scaler.backward(loss)
        scaler.step(optimizer, clip_norm=1.0)
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def train(dt: Any, name: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return repr([losses(dt, policy) for policy in ("bf16", "fp16")])


def warn_of_checkpoint(dt: Any, name: str) -> str:
    """Return the warnings of two passes through torch's checkpoint."""
    model = dt.cast(nest(), "bf16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            checkpoint(model, torch.ones(1, 2), use_reentrant=False).sum().backward()
    return "\n".join(str(each.message) for each in caught if "torch.utils.checkpoint of" in str(each.message))


def refusing(use: Callable[[Any], object]) -> Callable[[Any, str], str]:
    def call(dt: Any, name: str) -> str:
        try:
            use(dt)
        except sys.modules["duotone.errors"].BackendError as error:
            return str(error)
        raise AssertionError("nothing was raised")

    return call


def nest() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def scale(dt: Any) -> None:
    model, scaler = nest(), dt.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


USES: dict[str, Callable[[Any, str], str]] = {
    "train": train,
    "checkpoint": warn_of_checkpoint,
    "scale": refusing(scale),
    "recompute": refusing(lambda dt: dt.checkpoint_activations(nest(), "0")(torch.ones(1, 2))),
    "explain": refusing(lambda dt: dt.explain(nest(), torch.ones(1, 2))),
}


def without(name: str) -> Any:
    """Import duotone.torch from a torch that has not got a name."""
    resolve: Any = pkgutil.resolve_name

    def hiding(asked: str) -> Any:
        if asked == name:
            raise AttributeError(asked)
        return resolve(asked)

    pkgutil.resolve_name = hiding
    import duotone.torch as dt
    from duotone.torch.internals.lookup import HAS

    assert not HAS.get(name, False)
    return dt


def answer(name: str, use: str) -> list[str]:
    """Return a traceback, empty if all went well, and what the use returned, from a fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        result = ["", ""]
        try:
            result[1] = USES[use](without(name), name)
        except BaseException:  # the child must not go on as this program
            result[0] = traceback.format_exc()
        os.write(writing, json.dumps(result).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # what Duotone imports of others, and of torch at the first step, is in memory then
    torch.compiler.disable(abs)
    import duotone.torch  # noqa: F401

    for loaded in [name for name in sys.modules if name.split(".")[0] == "duotone"]:
        del sys.modules[loaded]
    sys.stdout.write(json.dumps([answer(name, use) for name, use in json.load(sys.stdin)]))
