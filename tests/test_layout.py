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

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

CORE = ("duotone.durable_files", "duotone.errors", "duotone.policy")

# each module or package, and what of Duotone it may import at most; the longest name that fits a module counts
ALLOWED = {
    "duotone": ("duotone.formats", "duotone.loss_scale", "duotone.policy"),
    "duotone.errors": (),
    "duotone.durable_files": (),
    "duotone.ranks": ("duotone.errors",),
    "duotone.formats": ("duotone.errors",),
    "duotone.rounding": ("duotone.errors", "duotone.formats"),
    "duotone.loss_scale": ("duotone.errors",),
    "duotone.operations": ("duotone.errors",),
    "duotone.policy": ("duotone.errors", "duotone.formats", "duotone.policy_spelling"),
    "duotone.policy_spelling": ("duotone.errors", "duotone.formats"),
    "duotone.run_settings": ("duotone.errors", "duotone.policy"),
    "duotone.torch.internals": ("duotone.errors", "duotone.torch.internals"),
    "duotone.torch.kernels": ("duotone.errors", "duotone.torch.kernels"),
    "duotone.torch.parameters": ("duotone.errors", "duotone.torch.kernels", "duotone.torch.parameters"),
    "duotone.torch.parameters.shards": (),
    "duotone.torch.memory_use": ("duotone.torch.optim.slots", "duotone.torch.parameters"),
    "duotone.torch.distributed": (
        "duotone.errors",
        "duotone.policy",
        "duotone.torch.casting",
        "duotone.torch.distributed",
        "duotone.torch.kernels",
        "duotone.torch.parameters",
    ),
    "duotone.torch.nested": (),
    "duotone.torch.casting": (
        "duotone.errors",
        "duotone.operations",
        "duotone.policy",
        "duotone.torch.casting",
        "duotone.torch.kernels",
        "duotone.torch.nested",
        "duotone.torch.parameters",
    ),
    "duotone.torch.casting.operation_table": ("duotone.errors", "duotone.operations"),
    "duotone.torch.casting.float32_inside": ("duotone.torch.casting.float32_inside",),
    "duotone.torch.casting.half_on_cpu": ("duotone.errors", "duotone.torch.nested"),
    "duotone.torch.casting.handlers": (
        "duotone.errors",
        "duotone.operations",
        "duotone.torch.casting.float32_inside",
        "duotone.torch.casting.half_on_cpu",
        "duotone.torch.casting.operation_table",
    ),
    "duotone.torch.casting.region": (
        "duotone.torch.casting.handlers",
        "duotone.torch.casting.operation_table",
        "duotone.torch.casting.recomputation",
        "duotone.torch.casting.tracing",
    ),
    "duotone.torch.casting.recomputation": ("duotone.errors", "duotone.torch.casting.tracing"),
    "duotone.torch.casting.tracing": (),
    "duotone.torch.casting.autocast": (
        "duotone.errors",
        "duotone.torch.casting.half_on_cpu",
        "duotone.torch.casting.handlers",
        "duotone.torch.casting.region",
        "duotone.torch.casting.tracing",
    ),
    "duotone.torch.casting.activation_checkpointing": ("duotone.errors",),
    "duotone.torch.watching": ("duotone.torch.casting", "duotone.torch.nested", "duotone.torch.watching"),
    "duotone.torch.explanation": (
        "duotone.errors",
        "duotone.policy",
        "duotone.torch.casting",
        "duotone.torch.explanation",
        "duotone.torch.nested",
        "duotone.torch.watching",
    ),
    "duotone.torch.optim": (
        "duotone.errors",
        "duotone.torch.kernels",
        "duotone.torch.nested",
        "duotone.torch.optim",
        "duotone.torch.parameters",
    ),
    "duotone.torch.distributed.agreement": (
        "duotone.errors",
        "duotone.torch.parameters.shards",
        "duotone.torch.parameters.storage",
    ),
    "duotone.torch.scaling": (),
    "duotone.torch.scaling.readback": (),
    "duotone.torch.scaling.losses": (),
    "duotone.torch.scaling.schedulers": ("duotone.errors",),
    "duotone.torch.scaling.device_scale": ("duotone.loss_scale",),
    "duotone.torch.scaling.unscale": ("duotone.torch.parameters.shards",),
    "duotone.torch.scaling.diagnosis": (
        "duotone.errors",
        "duotone.loss_scale",
        "duotone.torch.distributed.agreement",
        "duotone.torch.parameters",
    ),
    "duotone.torch.scaling.scale_alarm": (
        "duotone.errors",
        "duotone.torch.scaling.diagnosis",
        "duotone.torch.scaling.readback",
    ),
    "duotone.torch.scaling.outcome": (),
    "duotone.torch.scaling.monitor": (
        "duotone.errors",
        "duotone.loss_scale",
        "duotone.torch.distributed.agreement",
        "duotone.torch.scaling.diagnosis",
        "duotone.torch.scaling.outcome",
        "duotone.torch.scaling.readback",
        "duotone.torch.scaling.schedulers",
    ),
    "duotone.torch.scaling.optimizer_step": (
        "duotone.errors",
        "duotone.torch.kernels",
        "duotone.torch.optim",
        "duotone.torch.parameters",
    ),
    "duotone.torch.scaling.step": (
        "duotone.errors",
        "duotone.torch.distributed.agreement",
        "duotone.torch.optim",
        "duotone.torch.parameters",
        "duotone.torch.scaling.optimizer_step",
    ),
    "duotone.torch.scaling.loss_scaler": (
        "duotone.errors",
        "duotone.loss_scale",
        "duotone.policy",
        "duotone.torch.scaling.device_scale",
        "duotone.torch.scaling.losses",
        "duotone.torch.scaling.monitor",
        "duotone.torch.scaling.outcome",
        "duotone.torch.scaling.schedulers",
        "duotone.torch.scaling.step",
        "duotone.torch.scaling.unscale",
    ),
    "duotone.torch.scaling.grad_scaler": (
        "duotone.errors",
        "duotone.torch.distributed.agreement",
        "duotone.torch.optim",
        "duotone.torch.parameters",
        "duotone.torch.scaling.scale_alarm",
        "duotone.torch.scaling.unscale",
    ),
    "duotone.torch.checkpoints": (
        "duotone.durable_files",
        "duotone.errors",
        "duotone.policy",
        "duotone.ranks",
        "duotone.torch.casting.cast",
        "duotone.torch.checkpoints",
        "duotone.torch.kernels",
        "duotone.torch.optim.slots",
        "duotone.torch.parameters",
        "duotone.torch.scaling.loss_scaler",
    ),
    "duotone.torch.checkpoints.folder": (
        "duotone.durable_files",
        "duotone.errors",
        "duotone.torch.checkpoints.atomic_folder",
        "duotone.torch.parameters.shards",
    ),
    "duotone.torch.checkpoints.atomic_folder": ("duotone.durable_files", "duotone.errors"),
    "duotone.torch.checkpoints.random_states": (),
    "duotone.torch.checkpoints.process_group": ("duotone.errors", "duotone.ranks"),
    "duotone.torch": ("duotone.errors", "duotone.loss_scale", "duotone.policy", "duotone.torch"),
    "duotone.train": (*CORE, "duotone.ranks", "duotone.run_settings", "duotone.torch", "duotone.train"),
    "duotone.compare": (*CORE, "duotone.compare", "duotone.torch", "duotone.train"),
    "duotone.compare.environment": ("duotone", "duotone.compare.measuring.device_state"),
    "duotone.compare.failures": ("duotone.compare.records", "duotone.errors", "duotone.train"),
    "duotone.compare.fit": (
        "duotone.compare.job",
        "duotone.compare.failures",
        "duotone.compare.fit",
        "duotone.compare.folder",
        "duotone.compare.processes",
        "duotone.compare.records",
        "duotone.compare.watcher",
        "duotone.errors",
        "duotone.train",
    ),
    "duotone.compare.fit.byte_size": ("duotone.errors",),
    "duotone.compare.fit.micro_batches": ("duotone.errors", "duotone.train"),
    "duotone.compare.fit.search": ("duotone.errors",),
    "duotone.compare.measuring": (
        "duotone.compare.arms",
        "duotone.compare.failures",
        "duotone.compare.measuring",
        "duotone.compare.records",
        "duotone.errors",
        "duotone.torch",
        "duotone.train",
    ),
    "duotone.compare.pacing": (
        "duotone.compare.measuring.device_state",
        "duotone.compare.plan",
        "duotone.compare.records",
        "duotone.compare.subject",
    ),
    "duotone.compare.records": (),
    "duotone.compare.subject": (),
    "duotone.compare.arms": (
        "duotone.compare.arms",
        "duotone.errors",
        "duotone.policy",
        "duotone.torch",
        "duotone.train",
    ),
    "duotone.compare.arms.catalogue": ("duotone.errors", "duotone.policy"),
    "duotone.compare.report": (
        "duotone.compare.arms.catalogue",
        "duotone.compare.folder",
        "duotone.compare.plan",
        "duotone.compare.records",
        "duotone.compare.report",
        "duotone.compare.subject",
        "duotone.errors",
        "duotone.policy",
    ),
    "duotone.compare.report.charts": (
        "duotone.compare.report.charts",
        "duotone.compare.report.columns",
        "duotone.compare.report.report",
        "duotone.compare.report.words",
    ),
    "duotone.compare.report.page": (
        "duotone.compare.report.charts",
        "duotone.compare.report.columns",
        "duotone.compare.report.report",
        "duotone.compare.report.sections",
        "duotone.compare.report.words",
    ),
    "duotone.cli": ("duotone",),
    "duotone.__main__": ("duotone.cli",),
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
            # and the type of what one of them returns
            assert inner <= {"duotone.torch", "duotone.torch.memory_use"}, module


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
        ("duotone", {"numpy", "torch", "jax"}),
        ("duotone.operations", {"numpy", "torch", "jax"}),
        ("duotone.policy", {"numpy", "torch", "jax"}),
        ("duotone.loss_scale", {"numpy", "torch", "jax"}),
        ("duotone.rounding", {"torch", "jax"}),
        ("duotone.ranks", {"numpy", "torch", "jax"}),
        ("duotone.run_settings", {"numpy", "torch", "jax"}),
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
        "fully_shard",
        "keep_float32",
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
