"""Kinds by family: what a framework's list of operations becomes, and what is refused."""

import pytest

from duotone.errors import OperationError
from duotone.operations import FAMILIES, KINDS, MEANINGS, check_kind, kinds_of


def test_a_name_has_the_kind_of_its_family():
    names = {
        "product": "dot_general",
        "exponential": "exp log",
        "sum": "reduce_sum",
        "convolution": "aten::sdpa",
    }
    assert kinds_of(names) == {
        "dot_general": "compute",
        "exp": "float32",
        "log": "float32",
        "reduce_sum": "float32",
        "aten::sdpa": "compute",
    }
    assert kinds_of({}) == {}


def test_every_kind_has_families_and_a_meaning():
    assert {family.kind for family in FAMILIES.values()} == set(KINDS)
    assert tuple(MEANINGS) == KINDS
    assert all(family.reason for family in FAMILIES.values())


def test_what_no_list_may_say():
    with pytest.raises(OperationError, match='no family of operations "products"; did you mean product'):
        kinds_of({"products": "matmul"})
    with pytest.raises(OperationError, match='operation "exp" stands twice; leave it in one family'):
        kinds_of({"exponential": "exp", "steep": "tan exp"})


def test_kinds_that_users_may_give():
    for kind in KINDS:
        if kind != "refused":
            assert check_kind(kind) == kind
    with pytest.raises(OperationError, match='cannot be "refused"; known: compute, '):
        check_kind("refused")
    with pytest.raises(OperationError, match='cannot be "float16"; did you mean float32'):
        check_kind("float16")
