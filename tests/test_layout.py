"""The house rules that a program can see: who imports whom, what an import loads, public names, sizes, names."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import duotone
import duotone.torch
import duotone.train

from .import_table import ALLOWED

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """Return the modules of Duotone that a file imports, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return {name for name in found if name.split(".")[0] == "duotone"}


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    rule = max((name for name in ALLOWED if covers(name, module)), key=len)
    assert rule != "duotone" or module == "duotone", f"{module} has no line in the table"
    for imported in imports_of(MODULES[module]):
        allowed = (*ALLOWED[rule], *(["duotone.torch.internals"] if covers("duotone.torch", module) else []))
        assert any(covers(name, imported) for name in allowed), f"{module} -> {imported}"


def test_no_import_goes_round_in_a_circle() -> None:
    # a CycleError names the circle
    TopologicalSorter({module: imports_of(path) for module, path in MODULES.items()}).prepare()


def test_train_uses_the_public_verbs_alone() -> None:
    for module, path in MODULES.items():
        if covers("duotone.train", module):
            inner = {name for name in imports_of(path) if covers("duotone.torch", name)}
            # what compiling took, torch tells by private names alone
            assert inner <= {"duotone.torch", "duotone.torch.internals.compiler"}, module


def test_compare_uses_the_public_verbs_alone() -> None:
    public = {"duotone.torch", "duotone.torch.watching", "duotone.train", "duotone.train.task"}
    for module, path in MODULES.items():
        if covers("duotone.compare", module):
            inner = {name for name in imports_of(path) if name.startswith(("duotone.torch", "duotone.train"))}
            assert inner <= public, module


def test_backends_do_not_see_each_other_or_whoever_chooses() -> None:
    kernels = "duotone.torch.kernels"
    for module, path in MODULES.items():
        backend = next((name for name in ("cpu", "cuda") if covers(f"{kernels}.{name}", module)), None)
        if backend is not None:
            other = {"cpu": "cuda", "cuda": "cpu"}[backend]
            for imported in imports_of(path):
                assert not covers(f"{kernels}.{other}", imported), f"{module} -> {imported}"
                assert imported not in (kernels, f"{kernels}.dispatch"), f"{module} -> {imported}"


def test_only_the_step_joins_the_scaler_and_the_optimizers() -> None:
    imported = imports_of(MODULES["duotone.torch.scaling.loss_scaler"])
    assert not any(covers("duotone.torch.optim", name) for name in imported)
    for module, path in MODULES.items():
        if covers("duotone.torch.optim", module):
            assert not any(covers("duotone.torch.scaling", name) for name in imports_of(path))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("duotone", {"numpy", "torch", "jax", "keras"}),
        ("duotone.operations", {"numpy", "torch", "jax", "keras"}),
        ("duotone.policy", {"numpy", "torch", "jax", "keras"}),
        ("duotone.loss_scale", {"numpy", "torch", "jax", "keras"}),
        ("duotone.rounding", {"torch", "jax", "keras"}),
        ("duotone.wording.memory", {"numpy", "torch", "jax", "keras", "rich"}),
        ("duotone.wording.page", {"numpy", "torch", "jax", "keras", "rich"}),
        ("duotone.ranks", {"numpy", "torch", "jax", "keras"}),
        ("duotone.run_settings", {"numpy", "torch", "jax", "keras"}),
        ("duotone.torch", {"triton", "numba", "llvmlite", "typer", "rich", "matplotlib", "sklearn"}),
        ("duotone.train", {"triton", "numba", "llvmlite", "typer", "rich", "matplotlib", "sklearn"}),
        ("duotone.cli.main", {"torch", "sklearn", "matplotlib"}),
    ],
)
def test_an_import_loads_no_more_than_it_must(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(result.stdout.split())


def test_public_names() -> None:
    neutral = {"FORMATS", "Format", "LossScale", "Policy", "Rule", "__version__", "get_format"}
    assert set(duotone.__all__) == neutral
    assert set(duotone.torch.__all__) == {
        "SGD",
        "AdamW",
        "Average",
        "GradScaler",
        "Lion",
        "LossScale",
        "LossScaler",
        "MasterWeights",
        "Policy",
        "Rule",
        "autocast",
        "cast",
        "checkpoint_activations",
        "checkpoints",
        "convert_optimizer",
        "data_parallel",
        "explain",
        "export",
        # a context of its own: neither a cast nor a copy, but the model's own parameters, FP32 for a block
        "full_precision",
        "fully_shard",
        "keep_float32",
        "linear_cross_entropy",
        "load_checkpoint",
        "load_master_weights",
        "master_weights",
        "memory",
        "op_rule",
        "policy_of",
        "prepare",
        "save_checkpoint",
        "uncast",
    }
    assert callable(duotone.torch.cast)
    assert set(duotone.torch.checkpoints.__all__) == {"list_all", "remove", "remove_leftovers", "verify"}
    assert {"Task", "Trainer", "RunSettings"} <= set(duotone.train.__all__)
    for module in (duotone.torch, duotone.train):
        assert all(hasattr(module, name) for name in module.__all__)


def test_files_are_short_and_named_for_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        assert path.stem not in vague, path


def test_every_module_says_what_it_is() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module
