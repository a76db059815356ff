"""Which version answers, and what is said where none does."""

from __future__ import annotations

from typing import Any

import pytest

from tenuto.serving.catalogue import Catalogue, Refused, Served
from tenuto.serving.engine import Engine
from tenuto.serving.errors import ModelNotReady, TokenInvalid, UnknownModel
from tenuto.serving.manifest import state_schema
from tenuto.serving.pending import PendingBytes
from tenuto.serving.reply import OutputWriter
from tenuto.serving.tensor import Reader

from .fakes import Accumulator, accumulator


def served(model: str, version: int, *resumes_from: str, **manifest_fields: Any) -> Served:
    manifest = accumulator(name=model, resumes_from=resumes_from, **manifest_fields)
    engine = Engine(manifest, Accumulator(), version=version, max_sequences=1, pending=PendingBytes(1))
    reader, writer = Reader(manifest, 1), OutputWriter(manifest)
    return Served(engine, reader, writer, "CPUExecutionProvider", "hash", fingerprint=f"print-{version}")


OLD, NEW, OTHER = served("a", 2), served("a", 10), served("b", 1)
CATALOGUE = Catalogue([NEW, OLD, OTHER], [Refused("a", 11, "it is bad"), Refused("c", 1, "broken")])


@pytest.mark.parametrize(
    "model, version, expected", [("a", 0, NEW), ("a", 2, OLD), ("a", 10, NEW), ("b", 0, OTHER)]
)
def test_the_newest_that_serves_unless_one_is_named(model: str, version: int, expected: Served) -> None:
    assert CATALOGUE.find(model, version) is expected


def test_a_version_that_failed_says_why() -> None:
    with pytest.raises(ModelNotReady, match="model a/11 failed its checks: it is bad"):
        CATALOGUE.find("a", 11)
    with pytest.raises(ModelNotReady, match="model c/1 failed its checks: broken"):
        CATALOGUE.find("c")


def test_an_unknown_version_is_told_the_newest_one() -> None:
    with pytest.raises(UnknownModel, match="model 'a' has no version 3 here; it serves 10"):
        CATALOGUE.find("a", 3)


def test_an_unknown_model_is_told_which_there_are() -> None:
    with pytest.raises(UnknownModel, match="no model 'z' here; there is a, b"):
        CATALOGUE.find("z")
    with pytest.raises(UnknownModel, match="there is none"):
        Catalogue([], []).find("z")


def test_engines_are_those_of_all_that_serve() -> None:
    assert CATALOGUE.engines == [NEW.engine, OLD.engine, OTHER.engine]


def of(*loaded: Served) -> Catalogue:
    """They were loaded one after the other."""
    catalogue = Catalogue([], [])
    for one in loaded:
        catalogue.add(one)
    return catalogue


def test_a_new_version_takes_the_place_of_the_old_one_in_one_step() -> None:
    old, other, new = served("a", 1), served("b", 1), served("a", 2)
    catalogue = of(old, other)
    assert catalogue.add(new) == (old,)
    assert (catalogue.find("a"), catalogue.find("a", 2), catalogue.find("b")) == (new, new, other)
    assert (catalogue.served, catalogue.retiring) == ((other, new), (old,))
    assert catalogue.engines == [other.engine, new.engine, old.engine]
    assert catalogue.newest_version("a") == 2
    assert catalogue.retired("a", 1) is old
    assert catalogue.retired("a", 2) is None


def test_what_was_read_before_a_change_is_as_it_was() -> None:
    catalogue = of(served("a", 1))
    before, engines = catalogue.served, catalogue.engines
    catalogue.add(served("a", 2))
    assert [one.engine.version for one in before] == [1]
    assert [engine.version for engine in engines] == [1]


def test_a_version_that_was_replaced_takes_no_new_sequences_and_says_which_does() -> None:
    catalogue = of(served("a", 1), served("a", 2))
    text = "version 1 of model 'a' was replaced by 2 and takes no new sequences; open that one"
    with pytest.raises(UnknownModel, match=text):
        catalogue.find("a", 1)


def test_a_version_that_was_removed_is_unknown() -> None:
    old, new = served("a", 1), served("a", 2)
    catalogue = of(old, new)
    catalogue.remove(old)
    assert (catalogue.retiring, catalogue.engines) == ((), [new.engine])
    with pytest.raises(UnknownModel, match="has no version 1 here; it serves 2"):
        catalogue.find("a", 1)


def test_a_refusal_is_replaced_by_the_next_one_and_goes_when_the_version_serves_or_is_deleted() -> None:
    catalogue = of(served("a", 1))
    for why in ("bad", "worse"):
        catalogue.refuse(Refused("a", 2, why))
    catalogue.refuse(Refused("a", 3, "worst"))
    assert catalogue.refusal("a", 2) == Refused("a", 2, "worse")
    assert catalogue.find("a").engine.version == 1
    catalogue.add(served("a", 2))
    assert list(catalogue.refused) == [Refused("a", 3, "worst")]
    catalogue.forget("a", 3)
    assert list(catalogue.refused) == []


def test_a_model_that_was_withdrawn_is_unknown_until_it_is_added_again() -> None:
    old, new, other = served("a", 1), served("a", 2), served("b", 1)
    catalogue = of(old, new, other)
    catalogue.refuse(Refused("a", 3, "bad"))
    assert catalogue.withdraw("z") == ()
    assert catalogue.withdraw("a") == (old, new)
    assert (catalogue.served, catalogue.retiring) == ((other,), (old, new))
    assert catalogue.withdrawn == {"a": 2}
    for version in (0, 1):
        with pytest.raises(UnknownModel, match="model 'a' was unloaded by an operator, who may"):
            catalogue.find("a", version)
    with pytest.raises(ModelNotReady, match="a/3 failed its checks: bad"):
        catalogue.find("a", 3)
    catalogue.add(again := served("a", 2))
    assert catalogue.withdrawn == {}
    assert catalogue.find("a") is again


def test_what_is_being_loaded_is_known_and_changes_nothing_else() -> None:
    catalogue = of(one := served("a", 1))
    catalogue.announce([("a", 2), ("c", 1)])
    assert catalogue.loading == {("a", 2), ("c", 1)}
    assert catalogue.find("a") is one
    catalogue.announce([])
    assert catalogue.loading == frozenset()


SCHEMA = state_schema(accumulator())
TWO_TOTALS = {
    "states": [{"input": "total", "output": "total_next", "dtype": "float32", "shape": ["batch", 2]}]
}


def test_a_token_goes_back_to_its_own_version() -> None:
    one = served("a", 1)
    assert of(one).resume("a", "print-1", SCHEMA) is one


def test_a_token_goes_to_the_newer_version_that_takes_it_over() -> None:
    old, new = served("a", 1), served("a", 2, "print-1")
    catalogue = of(old, new)
    assert catalogue.resume("a", "print-1", SCHEMA) is new
    catalogue.remove(old)
    assert catalogue.resume("a", "print-1", SCHEMA) is new


@pytest.mark.parametrize(
    "newer", [served("a", 2), served("a", 2, "print-1", **TWO_TOTALS)], ids=["not listed", "other states"]
)
def test_a_token_that_the_newer_one_does_not_take_goes_to_its_own_while_that_has_time(newer: Served) -> None:
    old = served("a", 1)
    catalogue = of(old, newer)
    assert catalogue.resume("a", "print-1", SCHEMA) is old
    old.engine._population.past_max_age = True
    with pytest.raises(TokenInvalid):
        catalogue.resume("a", "print-1", SCHEMA)


def test_a_token_that_nobody_takes_is_told_why() -> None:
    with pytest.raises(UnknownModel, match="model 'z' is not served here"):
        of(served("a", 1)).resume("z", "print-1", SCHEMA)
    with pytest.raises(
        TokenInvalid, match=r"\(print-7…\) of model 'a' .* version 2 does not take it over .*resumes_from"
    ):
        of(served("a", 1), served("a", 2, "print-1")).resume("a", "print-7", SCHEMA)
    with pytest.raises(TokenInvalid, match=r"\(print-1…\) .* states differ from those of version 2"):
        of(served("a", 2, "print-1", **TWO_TOTALS)).resume("a", "print-1", SCHEMA)
