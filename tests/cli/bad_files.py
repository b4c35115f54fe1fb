"""Bad task files, folders, checkpoints, comparisons and environments of the command line."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .bad_settings import DIGITS, LONG, RUN, Case, forged, linked, written
from .test_one_line import FINE
from .test_one_line import TASK as TASK_FILE


def tasks() -> Iterator[Case]:
    """Yield task files."""
    for changes in (
        {"loss": "return None"}, {"loss": "return 3.0"}, {"loss": "return model(x)"},
        {"loss": "return torch.ones(())"},
        {"loss": "return model(x).mean().long()"}, {"loss": "return model(x).mean().to(torch.complex64)"},
        {"loss": "return undefined"},
        {"loss": "return model(x).mean().detach()"}, {"loss": "return model(x).mean().item()"},
        {"loss": "sys.exit(0)"}, {"loss": "raise SystemExit"},
        {"loss": "return 1 / 0"}, {"loss": "raise BaseException"}, {"loss": "raise KeyError(3)"},
        {"loss": "return model(x, x).mean()"},
        {"loss": "return loss(model, x)"}, {"loss": "return model(x.double()).mean() + torch.ones(10**12).mean()"},
        {"loss": "raise MemoryError"},
        {"loss": "return model(x[:, :0]).mean()"},
        {"loss": "raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})()"},
        {"loss": "raise OSError(28, 'full')"},
        {"loss": "open('/no/such/file')"}, {"loss": "return torch.empty(0).sum()"},
        {"batches": "return None"}, {"batches": "return 3"}, {"batches": "return []"}, {"batches": "yield 1 / 0"},
        {"batches": "sys.exit(3)"}, {"batches": "return [None]"},
        {"batches": "return ['text']"}, {"batches": "return [torch.ones(2, 3)]"},
        {"batches": "return [torch.ones(2, 1, dtype=torch.long)]"}, {"batches": "return iter(lambda: 1 / 0, 1)"},
        {"evaluate": "return None"}, {"evaluate": "return 0.5"}, {"evaluate": "return [0.5]"},
        {"evaluate": "return {}"}, {"evaluate": "return {'loss': None}"},
        {"evaluate": "return {'loss': 'x'}"}, {"evaluate": "return {'loss': 1j}"},
        {"evaluate": "return {'loss': torch.ones(2)}"}, {"evaluate": "return {'other': 1}"},
        {"evaluate": "return {'loss': 10**400}"}, {"evaluate": "sys.exit(0)"}, {"evaluate": "return 1 / 0"},
        {"evaluate": "return {'loss': model(torch.ones(3, 3))}"},
        {"units": "None"}, {"units": "'x'"}, {"units": "-1"}, {"units": "1 / 0"}, {"units": "float('nan')"},
        {"units": "float('inf')"},
        {"task": "return None"}, {"task": "return 3"}, {"task": "return Task"}, {"task": "sys.exit(0)"},
        {"task": "raise BaseException"}, {"task": "1 / 0"}, {"task": "import nothing_such"},
        {"task": "return Task()"}, {"task": "raise KeyError"}, {"task": "return task()"}, {"model": "None"},
        {"model": "torch.nn.Identity()"}, {"model": "torch.nn.Linear"},
        {"model": "torch.nn.Linear(1, 1).half()"}, {"model": "torch.nn.Linear(1, 1).requires_grad_(False)"},
        {"model": "torch.nn.Linear(1, 1, device='meta')"},
        {"model": "torch.nn.Linear(1, 1).double()"}, {"model": "torch.nn.Linear(2, 1)"},
        {"model": "torch.nn.LazyLinear(1)", "loss": "return torch.ones(())"},
        {"model": "torch.nn.Linear(10**6, 10**6)"},
    ):  # fmt: skip
        yield Case("train", *RUN, prepare=written("mine.py", TASK_FILE.format_map({**FINE, **changes})))
        if not changes.keys() & {"evaluate", "units"} and "SystemExit" not in str(changes):
            yield Case(
                "explain", "mine.py", prepare=written("mine.py", TASK_FILE.format_map({**FINE, **changes})), code=-1
            )
    for content in (
        "", "x = 1", "def task(:", "task = 3", "import nothing_such", "\x00", "1 / 0", "raise SystemExit(0)",
        "task = lambda x: 1", "def task(): return 3", "import sys; sys.exit()", "class task: pass", "\ud800",
        "(" * 3000, "x = " + "-" * 50000 + "1",
    ):  # fmt: skip
        for verb in ("train", "explain"):
            yield Case(verb, "bad.py", prepare=written("bad.py", content.encode("utf-8", "surrogatepass")))
    yield Case(
        "train",
        *RUN,
        prepare=written("mine.py", TASK_FILE.format_map({**FINE, "evaluate": "return {'loss': float('nan')}"})),
        code=1,
    )
    yield Case(
        "train",
        *RUN,
        prepare=written("mine.py", TASK_FILE.format_map({**FINE, "loss": "return model(x).mean() * float('nan')"})),
        code=1,
    )
    yield Case(
        "train",
        *RUN,
        "--policy",
        "fp16,loss_scale=1",
        prepare=written("mine.py", TASK_FILE.format_map({**FINE, "loss": "return (model(x) * float('inf')).mean()"})),
        code=1,
    )


def folders() -> Iterator[Case]:
    """Yield runs that are not there, not free, or not what they were."""
    resume = ("train", "--resume", "--out", "run")
    for out in (
        "absent",
        "mine.py",
        "mine.py/x",
        "/",
        "/dev/null",
        "/proc/x",
        LONG,
        "\udcff/",
        "a/" * 3000,
        "comparison",
    ):
        yield Case("train", "--resume", "--out", out)
        yield Case("train", "--resume", "latest-valid", "--out", out)
    for out in ("run", "mine.py", "mine.py/x", "/", "/dev/null", "/proc/x", LONG, "a/" * 3000, "comparison", "/sys/x"):
        yield Case("train", *RUN, "--out", out)
    for change in (
        ("--steps", "9"),
        ("--policy", "bf16"),
        ("--seed", "1"),
        ("digits",),
        ("--lr", "1"),
        ("--warmup-steps", "1"),
    ):
        yield Case(*resume, *change)
    for content in ("", "steps: [", "[" * 60000, "steps: 0", "- 1", "stepz: 1", "task: absent.py\nsteps: 3\n"):
        yield Case(*resume, prepare=written("run/settings.yaml", content))
    yield Case(*resume, prepare=linked("run/settings.yaml", "/dev/zero"))
    for content in ("3\n4\n", "[]\n", '{"step": "x"}\n', "[" * 100_000, '{"step": null}\n', "null\n", '{"a": 1}\n'):
        yield Case(*resume, prepare=written("run/metrics.jsonl", content))
    for content in ("3", "[]", "x", "[" * 100_000, '{"evaluation": 3}', '{"evaluation": {"loss": "x"}}', "{}", ""):
        yield Case("train", "--resume", "--out", "done", prepare=written("done/summary.json", content), code=-1)
    checkpoint = "run/checkpoints/step-00000002"
    for name in ("manifest.json", "tensors.safetensors"):
        for content in (
            "",
            "x",
            "[" * 100_000,
            "{}",
            "null",
            '{"manifest": {}}',
            '{"manifest": null, "manifest_sha256": ""}',
        ):
            yield Case(*resume, prepare=written(f"{checkpoint}/{name}", content))
        yield Case(*resume, prepare=lambda name=name: os.remove(f"{checkpoint}/{name}"))
        yield Case(*resume, prepare=linked(f"{checkpoint}/{name}", "/dev/full"))
    yield Case(*resume, prepare=lambda: Path("run/checkpoints/step-00000009").mkdir())
    yield Case(*resume, prepare=lambda: (shutil.rmtree("run/checkpoints"), Path("run/checkpoints").touch()))
    yield Case(*resume, prepare=lambda: Path(checkpoint).rename("run/checkpoints/step-00000001"))
    group = ("optimizer", "param_groups", 0)
    for keys, to in (
        (("progress",), {}), (("progress", "step"), 1), (("progress", "step"), "2"), (("progress", "step"), -1),
        (("progress", "epoch"), 2**40),
        (("progress", "batches_taken"), None), (("progress", "batches_per_step"), 0),
        (("progress", "losses"), [1.0]), (("progress", "losses_added"), []),
        (("progress", "losses_added"), "x"), (("policy",), None), (("policy",), "{}"), (("policy",), "[" * 100_000),
        (("model",), {}), (("model", "weight"), 3),
        (("tails",), []), (("optimizer",), None), ((*group, "lr"), "x"), ((*group, "betas"), 3),
        ((*group, "eps"), None), ((*group, "params"), ["x"]),
        (("optimizer", "state"), {}), (("optimizer", "duotone"), {}), (("optimizer_parameters",), [["x"]]),
        (("scaler",), None), (("scaler", "state"), {}),
        (("scaler", "state", "scale"), "x"), (("scaler", "state", "scale"), 3.0), (("scaler", "settings"), []),
        (("scheduler",), {}), (("scheduler", "base_lrs"), "x"),
        (("scheduler", "last_epoch"), None), (("random",), {}), (("random", "python"), [1, 2]),
        (("random", "numpy"), "x"), (("format_version",), 99),
        (("format_version",), None), (("tensors_sha256",), "0"), (("shards_sha256",), {"x": "0"}),
        (("model", "weight"), {"$tensor": "x"}),
    ):  # fmt: skip
        yield Case(*resume, prepare=forged(*keys, to=to))


def exports() -> Iterator[Case]:
    """Yield what cannot be exported, or not there."""
    for arguments in (
        ("absent", "--out", "w.pt"), ("mine.py", "--out", "w.pt"), ("/", "--out", "w.pt"), (LONG, "--out", "w.pt"),
        ("comparison", "--out", "w.pt"),
        ("run", "--out", "w"), ("run", "--out", "w.onnx"), ("run", "--out", "mine.py/w.pt"),
        ("run", "--out", "/proc/w.pt"), ("run", "--out", LONG + ".pt"),
        ("run", "--out", "w.pt", "--dtype", "int8"), ("run", "--out", "w.pt", "--dtype", ""),
        ("run", "--out", "w.pt", "--step", "9"),
        ("run", "--out", "w.pt", "--step", "x"), ("run", "--out", "w.pt", "--step", "-1"),
        ("run", "--out", "w.pt", "--step", DIGITS), ("run", "x", "--out", "w.pt"),
        ("run", "--out", "dir.pt"),
    ):  # fmt: skip
        yield Case("export", *arguments, prepare=lambda: Path("dir.pt").mkdir())
    for keys, to in (
        (("model",), {}), (("model",), []), (("model", "weight"), 3), (("tails", "weight"), 3),
        (("tails", "weight"), {"$tensor": "model.bias"}),
        (("buffers",), 3), (("tied",), {"a": 3}), (("tied",), {"a": "b"}), (("tails",), None),
    ):  # fmt: skip
        yield Case("export", "run", "--out", "w.pt", prepare=forged(*keys, to=to), code=-1)


def comparisons() -> Iterator[Case]:
    """Yield comparisons that cannot be made, or not be shown."""
    for arguments in (
        ("--arms", "bf17"), ("--arms", ""), ("--arms", ","), ("--arms", "bf16,bf16"), ("--arms", "bf16,"),
        ("--arms", LONG), ("--arms", "bf16,grad=float32"),
        ("--arm", "bf16=bf16"), ("--arm", "mine"), ("--arm", "=bf16"), ("--arm", "mine="), ("--arm", "mine=bf17"),
        ("--arm", "a b=bf16"), ("--arm", "\udcff=bf16"),
        ("--arm", "all=bf16"), ("--arm", LONG + "=bf16"), ("--baseline", "sgd"), ("--baseline", ""),
        ("--seeds", "0"), ("--seeds", "x"), ("--seeds", "-1"), ("--seeds", DIGITS),
        ("--seeds", str(10**12)), ("--steps", "0"), ("--steps", "x"), ("--steps", str(2**70)), ("--minutes", "0"),
        ("--minutes", "nan"), ("--minutes", "inf"), ("--minutes", "x"), ("--steps", "9", "--minutes", "2"),
        ("--margin", "0"), ("--margin", "1"), ("--margin", "x"), ("--margin", "nan"), ("--margin", "%"),
        ("--margin", ""), ("--confidence", "100%"), ("--confidence", "nan"), ("--confidence", "0"),
        ("--max-slowdown", "1"), ("--max-slowdown", "nan"), ("--max-slowdown", "x"),
        ("--fit-memory", "2 bananas"), ("--fit-memory", ""), ("--fit-memory", "0B"), ("--fit-memory", "-1GB"),
        ("--fit-memory", DIGITS + "GB"), ("--device", ""), ("--out", "mine.py"), ("--out", "run"), ("--out", "/"),
        ("--out", LONG), ("--out", ""), ("--out", "/proc/x"), ("--resume",), ("--resume", "--out", "absent"),
        ("--resume", "--out", "run"),
        ("digits", "--resume", "--out", "comparison"), ("--resume", "--out", "comparison", "--seeds", "1"),
        ("--resume", "--out", "comparison", "--margin", "2"), ("--show", "absent"), ("--show", "run"),
        ("--show", ""),
        ("--show", "comparison", "--arms", "bf16"), ("--show", "x", "--diff", "x", "y"),
        ("--diff", "absent", "comparison"), ("--diff", "comparison", "absent"), ("--diff", "x"), ("--show", LONG),
        ("--show", "mine.py"),
    ):  # fmt: skip
        yield Case("compare", *arguments)
    bad = ("", "x", "[]", "{}", "null", "[" * 100_000, '{"arm": 3}', '{"failure": 3, "arm": "fp32"}', "9" * 5000)
    for name in (
        "plan.json",
        "subject.json",
        "environment.json",
        "pace.json",
        "trials/fp32.json",
        "runs/fp32-seed0.json",
    ):
        for content in bad:
            if (name, content) != ("environment.json", "{}"):
                yield Case("compare", "--show", "comparison", prepare=written(f"comparison/{name}", content))
    yield Case("compare", "--show", "comparison", prepare=linked("comparison/pace.json", "/dev/full"))


def environments() -> Iterator[Case]:
    """Yield what a launcher may have left in the environment."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    for environment in (
        {"RANK": "0", "WORLD_SIZE": "2"}, {**ranks, "RANK": "x"}, {**ranks, "WORLD_SIZE": "x"},
        {**ranks, "WORLD_SIZE": "0"}, {**ranks, "RANK": "5"},
        {**ranks, "RANK": "-1"}, {**ranks, "MASTER_PORT": "x"}, {**ranks, "MASTER_PORT": "99999999"},
        {**ranks, "WORLD_SIZE": "-1"}, {**ranks, "LOCAL_RANK": "x"},
    ):  # fmt: skip
        yield Case("train", *RUN, environment=environment)
