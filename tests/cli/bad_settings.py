"""Bad inputs of the command line: what is typed, and what is there before."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from duotone.policy import Policy
from duotone.run_settings import RunSettings
from duotone.torch.checkpoints.folder import json_sha256

RUN = ("mine.py", "--steps", "3", "--log-every", "1", "--backend", "reference", "--policy", "fp16")
DIGITS = "9" * 5000
LONG = "x" * 5000


class Case:
    """One bad input: what is typed, and what is there before.

    Args:
        arguments: of the command.
        prepare: makes files, in a folder with a run `run`, a comparison `comparison` and a task `mine.py`.
        code: it exits with.
        environment: beside the usual one.
        words: a part of the line.
    """

    def __init__(
        self,
        *arguments: str,
        prepare: Callable[[], object] = lambda: None,
        code: int = 2,
        environment: Mapping[str, str] = {},
        words: str = "",
    ) -> None:
        self.arguments, self.prepare, self.code = arguments, prepare, code
        self.environment, self.words = environment, words


def written(name: str, content: str | bytes) -> Callable[[], object]:
    """Return what writes a file."""

    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        path = Path(name)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))

    return write


def linked(name: str, target: str) -> Callable[[], object]:
    """Return what makes a link, in the place of what is there."""

    def link() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(target)

    return link


def forged(*keys: Any, to: Any) -> Callable[[], object]:
    """Return what changes the manifest of the run's checkpoint, with right digests."""

    def forge() -> None:
        path = Path("run/checkpoints/step-00000002/manifest.json")
        manifest = json.loads(path.read_text())["manifest"]
        part = manifest
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = to
        path.write_text(json.dumps({"manifest_sha256": json_sha256(manifest), "manifest": manifest}))

    return forge


def settings() -> Iterator[Case]:
    """Yield bad values of every setting's flag, and of its line in a file."""
    whole = ["x", "", "1.5", "-1", "1e3", "nan", str(2**70), DIGITS, "0x10", "1 2", "\x1b[2J", "\udcff"]
    number = ["x", "", "-1", "nan", "inf", "-inf", "1e39", DIGITS, "1,5", "\x1b[2J"]
    words = ["", "x", LONG, "\x1b[2J", "\udcff", "Ä"]
    for field in fields(RunSettings):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is int:
            values = [*whole, *(["0"] if field.name not in ("seed", "warmup_steps") else [])]
        elif field.type is float or (field.name == "clip_norm" and get_args(field.type)):
            values = [*number, *({"final_lr_fraction": ["1.1"], "clip_norm": ["0", "None"]}.get(field.name, []))]
        elif get_origin(field.type) is Literal or field.type is Policy or field.name == "device":
            values = words
        else:
            values = []
        for value in values:
            yield Case("train", "mine.py", f"{flag}={value}")
    for betas in (("x", "0.9"), ("0.9", "1"), ("-0.1", "0.9"), ("nan", "0.9"), ("0.9", "inf"), ("", "")):
        yield Case("train", "mine.py", "--betas", *betas)
    for device in ("cuda:99", "cuda:-1", "cuda:x", "cpu:x", "gpu", "meta", "mps", "xpu", "cuda:" + DIGITS):
        yield Case("train", *RUN, "--device", device)
        yield Case("explain", "mine.py", "--device", device)
    for policy in (
        "bf17", "bf16-true", "fp16,loss_scale=none", "fp16,loss_scale=3", "fp16,loss_scale=0",
        "fp16,loss_scale=1e400",
        "param=", "=float32", "param=float33", "parm=float32", "bf16;", "bf16; x", "bf16; x:",
        "bf16; : param=float32",
        "bf16,,", ";", ",", "bf16,param=float32,param=float32", "bf16,loss_scale=nan", "bf16; type=: param=float32",
        "bf16; nothing.*: param=float32,compute=float32", "bf16,rounding=up", "bf16,master=float16", "fp8",
        "param=bfloat16,compute=float16", "bf16,state=float16", "bf16; " * 500, "bf16,loss_scale=" + DIGITS,
        "[" * 3000, "a: b", "bf16,output=", "bf16 fp16", "bf16,grad=float8_e4m3fn", "bf16; *: loss_scale=8",
    ):  # fmt: skip
        yield Case("train", *RUN, "--policy", policy)
    yield Case("explain", "mine.py", "--policy", "bf17")
    yield Case("explain", "mine.py", "--seed", str(2**32))
    yield Case("train", *RUN, "--warmup-steps", "4", words="warm-up must end within")
    yield Case("train", *RUN, "--parallel", "ddp", words="torchrun")


def command_lines() -> Iterator[Case]:
    """Yield what no verb takes."""
    for arguments in (
        ("trian",), ("",), ("-x",), ("--versio",), ("--version=1",), ("\udcff",), ("\x1b[2J",), (LONG,), ("train-",),
        ("train", "-x"), ("train", "a.py", "b.py"), ("train", "--stepz", "3"), ("train", "--steps"),
        ("train", "--betas", "0.9"), ("train", "--print-config=1"), ("train", "--resume=newest", "--out", "run"),
        ("train", "--resume"), ("train", "--stop-after", "0"), ("train", "--stop-after", "x"), ("train", "--out", ""),
        ("train", "--config", ""), ("train", "--", "-x"), ("train", "--steps=3", "--steps"),
        ("explain", "--modules", "-1"), ("explain", "--modules", "x"), ("explain", "--steps", "3"),
        ("explain", "a", "b"),
        ("export",), ("export", "run"), ("export", "run", "--out"), ("export", "run", "--out", ""),
        ("export", "", "--out", "w.pt"),
        ("formats", "x"), ("formats", "--jsn"), ("ops", "a", "b"), ("ops", "sofmax"), ("ops", ""), ("ops", LONG),
        ("ops", "\x1b"),
        ("ops", "torch."), ("ops", "__class__"), ("ops", "nn.functional"), ("ops", "\udcff"), ("ops", "--json=1"),
    ):  # fmt: skip
        yield Case(*arguments)
    for task in (
        "stdlib-txt", "stdlib-text:huge", "digits:", ":", "digits:x:y", "", "absent.py", "/", ".", "run", "\udcff",
        LONG, LONG + ".py", "a/b.py", "/dev/zero", "mine.pyc", "mine.py:tiny", "~/x.py", "\x1b[2J.py",
    ):  # fmt: skip
        yield Case("train", task)
        yield Case("explain", task)


def configs() -> Iterator[Case]:
    """Yield files of settings."""
    for content in (
        "steps: [", "- steps", "3", "steps", "steps: 1\nsteps: 2", "a: &x 1\nb: *x", "<<: {steps: 1}", "? [1]\n: 2",
        "1: 2",
        "null: 1", "stepz: 3", "steps: many", "steps: 1.5", "steps: 1e3", "steps: true", "steps: null", "steps: []",
        "steps: {}",
        "steps: 2001-01-01", "steps: 1:30", "steps: " + DIGITS, "steps: !!int x", "steps: !!timestamp x",
        "steps: !!python/name:os.x",
        "learning_rate: fast", "learning_rate: .inf", "learning_rate: .nan", "learning_rate: -.inf",
        "learning_rate: 1e39",
        "learning_rate: " + DIGITS, "learning_rate: []", "betas: 0.9", "betas: 0.9 0.999", "betas: [0.9]",
        "betas: [0.9, x]",
        "betas: [.nan, 0.9]", "betas: [0.9, [0.9]]", "clip_norm: .inf", "clip_norm: none", "clip_norm: 0",
        "policy: 16",
        "policy: [bf16]", "policy: {a: 1}", "device: 0", "optimizer: [adamw]", "optimizer: {}", "optimizer: adam",
        "task: 3", "task: []",
        "task: \"a\\0b.py\"", "task: \"a\\0b\"", "seed: -1", "seed: 4294967296", "\x00", "\tsteps: 3", "steps: 'x",
        "%YAML 9", "---\na: 1\n---\nb: 2",
        "[" * 60000, "- " * 30000, "{" * 60000, "# " + "x" * 70000, "a: " + "[" * 21, "task: " + LONG,
        "policy: " + LONG,
        "steps: " + "[" + "1," * 9000 + "]", "\ud800", "device: \"cuda:\\0\"",
    ):  # fmt: skip
        prepare = written("bad.yaml", content.encode("utf-8", "surrogatepass"))
        yield Case("train", "--config", "bad.yaml", prepare=prepare)
    for content in (
        "policy: bf16",
        "seed: 1",
        "parallel: ddp",
        "steps: 0",
        "stepz: 1",
        "steps: [",
        "task: 3",
        "warmup_steps: 9\nsteps: 3",
    ):
        yield Case("compare", "--config", "bad.yaml", prepare=written("bad.yaml", content))
    yield Case("train", "--config", "bad.yaml", prepare=written("bad.yaml", b"\xff\xfe"))
    for path in ("absent.yaml", "/dev/zero", "/", ".", LONG, "mine.py/x", "\udcff", "/dev/full", "/proc/self/mem"):
        yield Case("train", "--config", path)
        yield Case("compare", "--config", path)
    yield Case("train", "--config", "loop", prepare=linked("loop", "loop"))
