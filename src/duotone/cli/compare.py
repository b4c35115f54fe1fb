"""`duotone compare`: the same task trained in several ways, side by side, with an honest verdict.

Exit codes besides those of every verb: 1 if an arm failed, whatever the reason; the others' figures stand.
"""

import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duotone.cli.values import number, path_value, whole_number
from duotone.errors import CompareError

if TYPE_CHECKING:
    from duotone.compare import ComparisonFolder, Plan, Report

_COMPARISONS = Path("comparisons")
_MOST_SEEDS = 10_000
# options that --resume may change
_MAY_CHANGE = ("seeds", "margin", "confidence", "max_slowdown")


def _fraction(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise CompareError(f'"{text}" is no fraction; write one such as 0.01, or 1%') from error


def compare_command(
    task: Annotated[
        str | None,
        typer.Argument(
            help="stdlib-text (the default), digits, name:variant, or a path/to/task.py.", show_default=False
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Names, or groups: torch, duotone, compiled, peers, ablations, all. "
            "(default: fp32,torch-amp-bf16,bf16,fp16)"
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="An arm of your own, under any policy; may be repeated.", metavar="NAME=POLICY"),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The arm to compare with. (default: fp32, or else the first)")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each arm. (default: 3)", parser=whole_number, metavar="int")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of each run, in place of --minutes.", parser=whole_number, metavar="int"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="As many steps as fit into this time in all. (default: 8)", parser=number, metavar="float"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... (default: auto)")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of training settings, as duotone train has it.", parser=path_value, metavar="FILE"
        ),
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(
            help="How much worse a quality may be, as a part of the baseline's. (default: 1%)",
            metavar="FRACTION|N%",
        ),
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(help="Of intervals and tests. (default: 95%)", metavar="FRACTION|N%")
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            help="Do not train an arm that is this many times slower. (default: 10)", parser=number, metavar="float"
        ),
    ] = None,
    fit_memory: Annotated[
        str | None,
        typer.Option(help="Find each arm's largest micro-batch that fits, 2GB for instance.", metavar="SIZE"),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", metavar="", help="Write a profiler trace of one step of each arm.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The comparison's folder. (default: comparisons/TASK-N)", parser=path_value, metavar="FOLDER"
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on with the comparison in --out, with more --seeds if you like."),
    ] = False,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Show a comparison that was made, and write its report anew.", parser=path_value, metavar="FOLDER"
        ),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Show two comparisons beside each other.", metavar="FOLDER FOLDER"),
    ] = None,
) -> None:
    """Train a task in several ways, side by side: speed, memory, quality, and a verdict."""
    options = {name: value for name, value in locals().items() if name not in ("out", "resume", "show", "diff")}
    for name in ("margin", "confidence"):
        options[name] = None if options[name] is None else _fraction(options[name])
    used = [name for name, value in options.items() if value not in (None, []) and value is not False]
    if show is not None or diff is not None:
        if show is not None and diff is not None:
            raise CompareError("--show and --diff were both given; choose one")
        others = [name for name, value in (("out", out), ("resume", resume)) if value]
        _check_alone("--diff" if show is None else "--show", [*used, *others])
        _show(show) if show is not None else _diff(*diff or ())
        return
    if resume:
        _check_alone("--resume", [name for name in used if name not in _MAY_CHANGE])
        if out is None:
            raise CompareError("--resume needs --out, the folder of the comparison to go on with")
        _run(_changed(_folder(out).plan(), options), out, resume=True)
        return
    _run(_plan(options), out, resume=False)


def _check_alone(flag: str, others: list[str]) -> None:
    if others:
        words = ", ".join(name if name == "task" else f"--{name.replace('_', '-')}" for name in others)
        what = "goes on with what was asked for then" if flag == "--resume" else "measures nothing"
        raise CompareError(f"{flag} {what}; leave out {words}")


def _plan(options: dict[str, Any]) -> "Plan":
    from duotone.compare import DEFAULT_ARMS, Plan, find_arms, own_arm, parse_size
    from duotone.train import RunSettings, read_config, resolve_settings, with_warmup

    own = [own_arm(text) for text in options["arm"] or ()]
    arms = (*find_arms(DEFAULT_ARMS if options["arms"] is None else options["arms"]), *own)
    names = [each.name for each in arms]
    settings = read_config(options["config"]) if options["config"] is not None else {}
    if options["device"] is not None:
        settings["device"] = options["device"]
    # what can be told without the task is told before anything starts
    resolve_settings(settings)
    for name in ("policy", "seed", "parallel", "compile"):
        if name in settings:
            raise CompareError(f"{options['config']} sets {name}, which the arms of a comparison decide; leave it out")
    task = options["task"] or settings.pop("task", None) or RunSettings.task
    steps = options["steps"] if options["steps"] is not None else settings.pop("steps", None)
    if steps is not None and options["minutes"] is not None:
        raise CompareError("--steps and --minutes were both given; choose one")
    if steps is not None and "warmup_steps" in settings:
        with_warmup(resolve_settings(settings, {"steps": steps}), settings)
    chosen = {name: options[name] for name in ("minutes", "margin", "confidence", "max_slowdown", "profile")}
    return Plan(
        argv=("duotone", *sys.argv[1:]),
        task=task,
        arms=arms,
        baseline=("fp32" if "fp32" in names else names[0]) if options["baseline"] is None else options["baseline"],
        seeds=tuple(range(3 if options["seeds"] is None else _at_least_one_seed(options["seeds"]))),
        steps=steps,
        settings=settings,
        fit_memory_bytes=None if options["fit_memory"] is None else parse_size(options["fit_memory"]),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _changed(plan: "Plan", options: dict[str, Any]) -> "Plan":
    from dataclasses import replace

    changes = {name: options[name] for name in _MAY_CHANGE if options[name] is not None}
    if "seeds" in changes:
        changes["seeds"] = tuple(range(_at_least_one_seed(changes["seeds"])))
    # of an option that is there twice, the last one counts
    again = [(f"--{name.replace('_', '-')}", str(options[name])) for name in changes]
    argv = (*plan.argv, *chain(*again)) if plan.argv else ()
    return replace(plan, argv=argv, **changes)


def _at_least_one_seed(seeds: int) -> int:
    if not 1 <= seeds <= _MOST_SEEDS:
        raise CompareError(f"--seeds is {seeds}; it must be at least 1 and at most {_MOST_SEEDS}")
    return seeds


def _folder(path: Path) -> "ComparisonFolder":
    from duotone.compare import ComparisonFolder

    return ComparisonFolder(path)


def _run(plan: "Plan", out: Path | None, *, resume: bool) -> None:
    import shlex

    from duotone.cli.compare_report import show_report
    from duotone.cli.compare_view import open_view
    from duotone.cli.output import Output
    from duotone.compare import compare, made_folder

    console = Output()
    with made_folder(_COMPARISONS, plan.task) if out is None else nullcontext(out) as path:
        try:
            with open_view(console) as view:
                report = compare(plan, path, resume=resume, watcher=view)
        except KeyboardInterrupt as interrupt:
            goes_on = f"what was measured is kept, go on with: duotone compare --resume --out {shlex.quote(str(path))}"
            typer.echo(f"stopped; {goes_on if (path / 'plan.json').exists() else 'nothing was measured yet'}")
            # other signals come as this too, by their names
            raise typer.Exit({"SIGTERM": 143, "SIGHUP": 129}.get(str(interrupt), 130)) from None
    show_report(report, path, console)
    _exit(report)


def _show(path: Path) -> None:
    from duotone.cli.compare_report import show_report
    from duotone.cli.output import Output
    from duotone.compare import publish

    show_report(publish(_folder(path)), path, Output())


def _diff(first: Path, second: Path) -> None:
    from duotone.cli.compare_report import show_difference
    from duotone.cli.output import Output
    from duotone.compare import assemble, difference

    before, after = assemble(_folder(first)), assemble(_folder(second))
    show_difference(difference(before, after), (str(first), str(second)), Output())


def _exit(report: "Report") -> None:
    if any(arm.failure is not None or (arm.fit is not None and arm.fit.failure is not None) for arm in report.arms):
        raise typer.Exit(1)
