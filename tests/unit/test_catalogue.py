"""Which version answers, and what is said where none does."""

from __future__ import annotations

import pytest

from tenuto.serving.catalogue import Catalogue, Refused, Served
from tenuto.serving.engine import Engine
from tenuto.serving.errors import ModelNotReady, UnknownModel
from tenuto.serving.pending import PendingBytes
from tenuto.serving.reply import OutputWriter
from tenuto.serving.tensor import Reader

from .fakes import Doubler, doubler


def served(model: str, version: int) -> Served:
    manifest = doubler(name=model)
    engine = Engine(manifest, Doubler(), version=version, max_sequences=1, pending=PendingBytes(1))
    return Served(engine, Reader(manifest, 1), OutputWriter(manifest), "CPUExecutionProvider", "hash")


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
