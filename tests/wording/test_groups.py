"""Modules that are alike are put together; those that differ in anything shown are not."""

from dataclasses import replace

from duotone.torch.explanation.records import ModuleDtypes
from duotone.wording.groups import groups_of, paths_of_groups


def module(path: str, kind: str = "Linear", **fields) -> ModuleDtypes:
    return replace(ModuleDtypes(path, kind, 1, None, ("bfloat16",), (), (), {}), **fields)


def shown(*modules: ModuleDtypes) -> list[tuple[str, int]]:
    return [(group.path, len(group.members)) for group in groups_of(modules)]


def test_lists_within_lists():
    modules = [module("", "Net")]
    for stage in range(2):
        modules.append(module(f"stages.{stage}", "Stage"))
        modules += [module(f"stages.{stage}.blocks.{block}") for block in range(3)]
    assert shown(*modules) == [("", 1), ("stages.*", 2), ("stages.*.blocks.*", 6)]
    assert paths_of_groups(modules)["stages.1.blocks.2"] == "stages.*.blocks.*"


def test_what_differs_inside_stands_by_itself():
    modules = []
    for block in range(4):
        modules += [module(f"{block}", "Block"), module(f"{block}.norm", calls=2 if block == 0 else 1)]
    assert shown(*modules) == [("0", 1), ("0.norm", 1), ("1-3", 3), ("1-3.norm", 3)]


def test_what_was_saved_is_added_and_does_not_part_modules():
    modules = [module(f"layers.{at}", saved_bytes={"float32": 10**at, "int64": 1}) for at in range(3)]
    (group,) = groups_of(modules)
    assert group.saved_bytes() == {"float32": 111, "int64": 3}


def test_neighbours_without_numbers_and_gaps_stay_apart():
    assert shown(module("q"), module("k"), module("0"), module("2")) == [("q", 1), ("k", 1), ("0", 1), ("2", 1)]


def test_names_with_a_number_behind_are_numbered_too():
    modules = [module("Embed_0", "Embed"), *(module(f"Block_{at}") for at in range(3)), module("Norm_0", "Norm")]
    assert shown(*modules) == [("Embed_0", 1), ("Block_*", 3), ("Norm_0", 1)]
    assert shown(*modules, module("Block_3", calls=2))[1:2] == [("Block_0-2", 3)]
