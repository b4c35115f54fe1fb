"""A comparison's folder: records come back, older folders load, bad files are named with what is bad."""

import json
from pathlib import Path

import pytest

from duotone.compare import ComparisonFolder, Failure, Trial, assemble, publish
from duotone.errors import CompareError

# the records of a comparison that duotone compare wrote before records were read by msgspec, by their file names
OLD = json.loads(Path(__file__).with_name("old_comparison.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    for name, content in OLD.items():
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return ComparisonFolder(tmp_path / "old")


def test_an_older_folder_loads(folder: ComparisonFolder) -> None:
    plan, pace, subject = folder.plan(), folder.pace(), folder.subject()
    assert (plan.task, plan.seeds, plan.settings, plan.margin) == ("tiny_task.py", (0, 1), {"device": "cpu"}, 0.02)
    assert plan.arms[3].policy == "bf16,grad=float32"
    assert pace is not None
    assert (pace.steps, pace.turn_steps, pace.together) == (20, 3, True)
    assert subject is not None
    assert (subject.parameters, subject.facts) == (49, {"held out": "16 numbers"})
    assert folder.environment() == OLD["environment.json"]
    run = folder.runs()["bf16", 1]
    assert [turn.step for turn in run.turns] == [turn["step"] for turn in OLD["runs/bf16-seed1.json"]["turns"]]
    assert run.losses == tuple(map(tuple, OLD["runs/bf16-seed1.json"]["losses"]))
    assert folder.fits()["fp32"].tried[-1] == (81635, 45387972)
    assert folder.trials()["optimi-kahan"].failure == Failure(**OLD["trials/optimi-kahan.json"]["failure"])


def test_an_older_folder_has_a_report(folder: ComparisonFolder) -> None:
    report = publish(folder)
    assert report.is_complete
    assert [arm.name for arm in report.arms] == ["fp32", "bf16", "optimi-kahan", "wide"]
    assert report.arms[1].memory_ratio == pytest.approx(831684 / 823492, rel=0.02)
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in folder.path.iterdir()}


def test_records_are_written_as_they_were_read(folder: ComparisonFolder) -> None:
    for record in (folder.plan(), folder.pace(), folder.subject(), *folder.trials().values(), *folder.runs().values()):
        assert record is not None
        folder.write(record)
    again = {name: json.loads((folder.path / name).read_text(encoding="utf-8")) for name in OLD}
    assert again == OLD


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("runs/fp32-seed0.json", {"steps": "20"}, "Expected `int`, got `str` - at `$.steps`"),
        ("runs/fp32-seed0.json", {"turns": [{"step": 1.0}]}, "missing required field `forward` - at `$.turns[0]`"),
        ("trials/bf16.json", {"failure": "broken"}, "Expected `object | null`, got `str` - at `$.failure`"),
        ("fits/fp32.json", {"tried": [[8]]}, "at `$.tried[0]`"),
        ("pace.json", {"together": 1}, "Expected `bool`, got `int` - at `$.together`"),
        ("subject.json", {"name": None}, "at `$.name`"),
        ("environment.json", {"torch": 2}, "Expected `str`, got `int`"),
    ],
)
def test_a_bad_record_is_named_with_its_field(
    folder: ComparisonFolder, name: str, changes: dict[str, object], words: str
) -> None:
    path = folder.path / name
    path.write_text(json.dumps({**OLD[name], **changes}), encoding="utf-8")
    with pytest.raises(CompareError) as raised:
        assemble(folder)
    message = str(raised.value)
    assert message.startswith(f"cannot read {path}: ")
    assert words in message
    assert message.endswith("; remove it, and --resume measures it anew")


@pytest.mark.parametrize(
    "text", ["", "[", '{"arm": ', "[]", "[" * 100_000, '{"arm": "fp32", "peak_memory_bytes": ' + "9" * 400 + "}"]
)
def test_a_file_that_is_no_record_is_an_error(folder: ComparisonFolder, text: str) -> None:
    path = folder.path / "trials" / "fp32.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CompareError, match=r"cannot read .*fp32\.json: .*; remove it"):
        folder.trials()


def test_a_bad_plan_cannot_be_measured_anew(folder: ComparisonFolder) -> None:
    (folder.path / "plan.json").write_text(json.dumps({**OLD["plan.json"], "margin": 2}), encoding="utf-8")
    with pytest.raises(CompareError, match=r"margin is 2\.0; it must be above 0 .*; start a new comparison in another"):
        folder.plan()


def test_a_field_that_is_not_known_yet_is_left_alone(folder: ComparisonFolder) -> None:
    (folder.path / "trials" / "new.json").write_text('{"arm": "new", "colour": "red"}', encoding="utf-8")
    assert folder.trials()["new"] == Trial("new")
