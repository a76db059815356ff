"""Which versions serve: half-written ones are left alone, bad ones replace nothing, old ones go at last."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tenuto.serving.catalogue import Catalogue, Loaded, Served
from tenuto.serving.engine import Engine
from tenuto.serving.errors import ModelInvalid, ModelNotReady, UnknownModel
from tenuto.serving.metrics import ServerMetrics
from tenuto.serving.pending import PendingBytes
from tenuto.serving.reply import OutputWriter
from tenuto.serving.repository import ModelFolder, ModelRepository
from tenuto.serving.rollout import _RESUME_SECONDS, Rollout
from tenuto.serving.sequence import Ending, Sequence
from tenuto.serving.tensor import Reader
from tenuto.serving.vetting import Verdict

from .fakes import Accumulator, FakeSink, accumulator

MAX_AGE_SECONDS = 600.0


class FakeLoader:
    """Serves what its model.onnx calls good; engines have no thread until they are started."""

    def __init__(self) -> None:
        self.checked: list[list[str]] = []
        self.pending = PendingBytes(1 << 20)
        self.during_check: Callable[[], None] = lambda: None

    def check(self, folders: list[ModelFolder], stopping: threading.Event) -> dict[ModelFolder, Verdict]:
        self.checked.append([f.where for f in folders])
        self.during_check()
        return {folder: Verdict("print", why="it stops" if stopping.is_set() else "") for folder in folders}

    def load(self, folder: ModelFolder, verdict: Verdict) -> Served:
        text = (folder.path / "model.onnx").read_text()
        if text == "large":
            raise MemoryError("Unable to allocate 9 TiB")
        if not text.startswith("good"):
            raise ModelInvalid(f"{folder.where} is {text}")
        manifest = accumulator(name=folder.model)
        engine = Engine(
            manifest,
            Accumulator(),
            version=folder.version,
            max_sequences=4,
            pending=self.pending,
            clock=lambda: 50.0,
        )
        files = folder.read()
        reader, writer = Reader(manifest, 1 << 20), OutputWriter(manifest)
        return Served(engine, reader, writer, "CPU", files.sha256, files.fingerprint)


class Bench:
    """A repository with versions, and a rollout that is driven by hand, on a clock that stands still."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0
        self.loader = FakeLoader()
        self.metrics = ServerMetrics("1")
        self.rollout = Rollout(
            ModelRepository(root),
            self.loader,  # type: ignore[arg-type]
            self.metrics,
            max_age_seconds=MAX_AGE_SECONDS,
            clock=lambda: self.now,
        )

    @property
    def catalogue(self) -> Catalogue:
        return self.rollout.catalogue

    def write(self, version: int, text: str = "good", model: str = "m") -> Path:
        folder = self.root / model / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_text(text)
        return folder

    def poll(self, times: int = 2) -> None:
        for _ in range(times):
            self.rollout.poll()

    def engine(self, version: int) -> Engine:
        (found,) = [e for e in self.catalogue.engines if e.version == version]
        return found

    def open(self, version: int) -> Sequence:
        engine = self.engine(version)
        sequence = Sequence(FakeSink(), engine.manifest)
        engine.open(sequence)
        engine.turn()
        return sequence

    @property
    def states(self) -> dict[str, list[int]]:
        return {
            "ready": [s.engine.version for s in self.catalogue.served],
            "retiring": [s.engine.version for s in self.catalogue.retiring],
            "failed": [r.version for r in self.catalogue.refused],
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Version 1 serves."""
    bench = Bench(tmp_path)
    bench.write(1)
    bench.rollout.load_newest()
    return bench


def test_a_newer_version_takes_over_at_the_second_look(bench: Bench) -> None:
    bench.write(2)
    bench.poll(1)
    assert bench.states == {"ready": [1], "retiring": [], "failed": []}
    bench.poll(1)
    assert bench.states == {"ready": [2], "retiring": [1], "failed": []}
    assert bench.loader.checked == [["m/1"], ["m/2"]]


def test_the_old_one_is_told_how_long_it_has(bench: Bench) -> None:
    bench.open(1)
    old = bench.engine(1)
    bench.write(2)
    bench.poll()
    old.turn()
    assert old._population._max_age_at == 50.0 + MAX_AGE_SECONDS
    assert [(m.version, m.retiring) for m in bench.metrics.models] == [(1, True), (2, False)]


def test_a_folder_that_is_being_written_is_left_alone(bench: Bench) -> None:
    folder = bench.write(2, "go")
    bench.poll(1)
    for length in (3, 4):
        (folder / "model.onnx").write_text("good"[:length])
        bench.poll(1)
    assert bench.loader.checked == [["m/1"]]
    bench.poll(1)
    assert bench.states["ready"] == [2]


def test_a_folder_without_a_model_is_left_alone(bench: Bench) -> None:
    folder = bench.write(2)
    (folder / "model.onnx").rename(folder / ".model.onnx.Xk3")  # as rsync does
    bench.poll(3)
    assert bench.loader.checked == [["m/1"]]
    assert bench.states["failed"] == []
    (folder / ".model.onnx.Xk3").rename(folder / "model.onnx")
    bench.poll()
    assert bench.states["ready"] == [2]


def test_a_finished_folder_that_is_moved_into_place_serves(bench: Bench) -> None:
    bench.write(2).rename(bench.root / "m" / ".tmp-2")
    bench.poll(3)
    assert bench.loader.checked == [["m/1"]]
    (bench.root / "m" / ".tmp-2").rename(bench.root / "m" / "2")
    bench.poll()
    assert bench.states["ready"] == [2]


@pytest.mark.parametrize("text, why", [("bad", "m/2 is bad"), ("large", "Unable to allocate 9 TiB")])
def test_a_bad_version_replaces_nothing_and_is_not_tried_again_until_it_changes(
    bench: Bench, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    bench.write(2, text)
    bench.poll(5)
    assert bench.states == {"ready": [1], "retiring": [], "failed": [2]}
    assert bench.catalogue.refused[0].why == why
    assert f"m/2 is not served: {why}" in caplog.text
    assert bench.loader.checked == [["m/1"], ["m/2"]]
    assert bench.metrics.loads == {("m", "loaded"): 1, ("m", "failed"): 1}
    bench.write(2, "good")
    bench.poll()
    assert bench.states == {"ready": [2], "retiring": [1], "failed": []}
    assert bench.metrics.loads == {("m", "loaded"): 2, ("m", "failed"): 1}


def test_a_version_that_failed_at_start_is_not_tried_again_until_it_changes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write(1)
    bench.write(2, "half")
    bench.rollout.load_newest()
    bench.poll(3)
    assert bench.loader.checked == [["m/2"], ["m/1"]]
    bench.write(2)
    bench.poll()
    assert bench.states["ready"] == [2]


def test_a_bad_version_that_is_deleted_is_forgotten(bench: Bench) -> None:
    folder = bench.write(2, "bad")
    bench.poll()
    (folder / "model.onnx").unlink()
    folder.rmdir()
    bench.poll(1)
    assert bench.states == {"ready": [1], "retiring": [], "failed": []}


def test_of_several_new_versions_the_newest_good_one_serves(bench: Bench) -> None:
    for version, text in ((2, "good"), (3, "good"), (4, "bad")):
        bench.write(version, text)
    bench.poll()
    assert bench.states == {"ready": [1], "retiring": [], "failed": [4]}
    bench.poll(3)
    assert bench.states["ready"] == [3]
    assert bench.loader.checked == [["m/1"], ["m/4"], ["m/3"]]  # an older one than that never


def test_a_new_model_begins_to_serve_beside_the_others_and_one_child_checks_all(bench: Bench) -> None:
    bench.write(2)
    bench.write(7, model="n")
    bench.poll()
    assert bench.catalogue.find("n").engine.version == 7
    assert bench.catalogue.find("m").engine.version == 2
    assert bench.loader.checked[1:] == [["m/2", "n/7"]]


def test_an_old_version_goes_when_it_is_empty_at_two_looks(bench: Bench) -> None:
    sequence, old = bench.open(1), bench.engine(1)
    bench.write(2)
    bench.poll(4)
    assert bench.states["retiring"] == [1]
    old.finish(sequence, Ending.END)
    old.turn()
    bench.poll(1)
    resumed = bench.open(1)  # came between the two looks
    bench.poll(2)
    assert bench.states["retiring"] == [1]
    old.finish(resumed, Ending.END)
    old.turn()
    bench.poll(2)
    assert bench.states == {"ready": [2], "retiring": [], "failed": []}
    assert [m.version for m in bench.metrics.models] == [2]
    old.turn()
    assert old._population.stopped


def test_a_client_that_lost_its_connection_has_time_to_come_back(bench: Bench) -> None:
    sequence, old = bench.open(1), bench.engine(1)
    bench.write(2)
    bench.poll()
    old.close(sequence, Ending.CANCELLED)
    old.turn()
    bench.poll(1)
    bench.now += _RESUME_SECONDS - 1
    bench.poll(3)
    assert bench.states["retiring"] == [1]
    bench.now += 1
    bench.poll(1)
    assert bench.states["retiring"] == []


def test_three_versions_may_be_loaded_at_once(bench: Bench) -> None:
    for version in (1, 2):
        bench.open(version)
        bench.write(version + 1)
        bench.poll()
    assert bench.states == {"ready": [3], "retiring": [1, 2], "failed": []}


def test_after_the_stop_nothing_begins_to_serve(bench: Bench) -> None:
    bench.write(2)
    bench.loader.during_check = bench.rollout.stop
    bench.poll()
    assert bench.loader.checked[1:] == [["m/2"]]
    assert bench.states == {"ready": [1], "retiring": [], "failed": []}
    assert bench.metrics.loads == {("m", "loaded"): 1}


def test_a_stop_during_the_load_is_in_time_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    load = bench.loader.load

    def slow(folder: ModelFolder, verdict: Verdict) -> Served:
        bench.rollout.stop()
        return load(folder, verdict)

    monkeypatch.setattr(bench.loader, "load", slow)
    bench.write(2)
    bench.poll()
    assert bench.states["ready"] == [1]


class Looks:
    """Polls that go wrong, each in its way; the last one lets the test go on."""

    def __init__(self, *outcomes: BaseException | None) -> None:
        self._outcomes = list(outcomes)
        self.done = threading.Event()

    def __call__(self) -> None:
        if not self._outcomes:
            self.done.set()
        elif error := self._outcomes.pop(0):
            raise error


def test_the_thread_lives_on_when_the_repository_cannot_be_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone, bug = OSError("stale file handle"), TypeError("a bug")
    looks = Looks(gone, gone, bug, None, gone)
    monkeypatch.setattr(bench.rollout, "poll", looks)
    bench.rollout.start(1e-6)
    assert looks.done.wait(30)
    bench.rollout.stop()
    bench.rollout.join(30)
    bench.engine(1).stop(Ending.DRAINING)
    said = [r.message for r in caplog.records if "cannot be read" in r.message]
    assert len(said) == 2  # once each time that it begins
    assert "stale file handle" in said[0]
    assert "a look for new versions met a bug" in caplog.text


def test_without_a_pace_there_is_no_thread(bench: Bench) -> None:
    bench.rollout.start(0)
    assert not [t for t in threading.enumerate() if t.name == "rollout"]
    bench.engine(1).stop(Ending.DRAINING)


# -- what operators ask for ------------------------------------------------------------------------


def test_a_load_says_what_serves_and_whether_that_is_new(bench: Bench) -> None:
    loaded = bench.rollout.load("m")
    assert (loaded.served, loaded.changed, loaded.ended) == (bench.catalogue.find("m"), False, 0)
    bench.write(2)
    loaded = bench.rollout.load("m")  # no look of the thread is waited for
    assert (loaded.served.engine.version, loaded.changed) == (2, True)
    assert bench.states == {"ready": [2], "retiring": [1], "failed": []}
    assert bench.loader.checked == [["m/1"], ["m/2"]]


def test_a_load_tries_again_what_was_refused_and_says_why_it_is_and_what_serves(bench: Bench) -> None:
    bench.write(2, "bad")
    bench.poll()
    with pytest.raises(ModelNotReady) as refused:
        bench.rollout.load("m")
    assert str(refused.value) == "failed to load 'm', m/1 serves: m/2 is bad"
    assert bench.loader.checked == [["m/1"], ["m/2"], ["m/2"]]
    assert bench.states == {"ready": [1], "retiring": [], "failed": [2]}


def test_a_model_that_is_not_there_is_neither_loaded_nor_unloaded(bench: Bench) -> None:
    for call in (bench.rollout.load, bench.rollout.reload, bench.rollout.unload):
        with pytest.raises(UnknownModel, match="'n'"):
            call("n")
    assert bench.states["ready"] == [1]


def test_what_was_unloaded_stays_away_until_an_operators_load_succeeds(bench: Bench) -> None:
    bench.rollout.start(0)
    unloaded = bench.rollout.unload("m")
    assert (unloaded.versions, unloaded.ended) == ((1,), 0)
    assert bench.catalogue.withdrawn == {"m": 1}
    assert bench.metrics.models == []
    with pytest.raises(UnknownModel, match="'m' was unloaded by an operator"):
        bench.catalogue.find("m")
    with pytest.raises(UnknownModel, match="it is not loaded"):
        bench.rollout.unload("m")

    bench.write(2, "bad").parent.joinpath("1", "model.onnx").write_text("bad")
    with pytest.raises(ModelNotReady, match=r"^failed to load 'm': m/2 is bad; m/1 is bad$"):
        bench.rollout.load("m")
    bench.write(2)
    bench.poll(4)
    assert bench.states["ready"] == []
    assert bench.rollout.load("m").served.engine.version == 2
    assert bench.catalogue.withdrawn == {}
    bench.write(3)
    bench.poll()
    assert bench.states["ready"] == [3]
    for engine in bench.catalogue.engines:
        engine.stop(Ending.DRAINING)


def test_an_unload_counts_those_that_end_by_it_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose run takes even longer than that ends behind it: here nobody turns the engine."""
    monkeypatch.setattr("tenuto.serving.rollout._UNLOAD_SECONDS", 0.0)
    bench.open(1)
    bench.open(1)
    old = bench.engine(1)
    old.metrics.ended["MAX_AGE"] += 3
    assert bench.rollout.unload("m").ended == 2
    old.turn()
    assert old.metrics.ended["MAX_AGE"] == 3 + 2


def test_refusals_of_an_unloaded_model_are_kept_while_their_folder_is_there(bench: Bench) -> None:
    bench.rollout.start(0)
    folder = bench.write(2, "bad")
    bench.poll()
    bench.rollout.unload("m")
    bench.poll(1)
    assert bench.states["failed"] == [2]
    with pytest.raises(ModelNotReady, match="m/2 failed its checks"):
        bench.catalogue.find("m", 2)
    (folder / "model.onnx").unlink()
    folder.rmdir()
    bench.poll(1)
    assert bench.states["failed"] == []


def test_a_reload_of_the_same_files_leaves_everything_as_it_is(bench: Bench) -> None:
    before = bench.catalogue.find("m")
    bench.write(1)
    loaded = bench.rollout.reload("m")
    assert (loaded.served, loaded.changed, loaded.ended) == (before, False, 0)
    assert bench.loader.checked == [["m/1"]]


def test_a_reload_puts_changed_files_in_the_place_of_their_version(bench: Bench) -> None:
    bench.rollout.start(0)
    before = bench.catalogue.find("m")
    live = [Sequence(FakeSink(), before.manifest) for _ in range(2)]
    for sequence in live:
        before.engine.open(sequence)
    bench.write(1, "good, and better")
    bench.poll(3)  # the thread has no eye for a version that serves
    assert bench.catalogue.find("m") is before
    loaded = bench.rollout.reload("m")
    assert (loaded.served, loaded.changed, loaded.ended) == (bench.catalogue.find("m"), True, 2)
    assert loaded.served is not before
    assert loaded.served.fingerprint != before.fingerprint
    assert bench.states == {"ready": [1], "retiring": [], "failed": []}
    assert bench.metrics.models == [loaded.served.engine.metrics]  # two would be one series twice
    assert before.engine.metrics.ended == {"DRAINING": 2}
    loaded.served.engine.stop(Ending.DRAINING)


def test_a_reload_that_fails_leaves_what_runs_as_it_is(bench: Bench) -> None:
    sequence, before = bench.open(1), bench.catalogue.find("m")
    for text, why in (("bad", "m/1 is bad"), ("large", "m/1: Unable to allocate 9 TiB")):
        bench.write(1, text)
        with pytest.raises(ModelNotReady, match=f"^failed to load 'm', m/1 serves: {why}$"):
            bench.rollout.reload("m")
        assert bench.catalogue.find("m") is before
        assert bench.states == {"ready": [1], "retiring": [], "failed": []}
    assert not sequence.ended
    bench.write(1)
    assert not bench.rollout.reload("m").changed  # mended: it is what serves


def test_a_reload_takes_a_version_that_was_mended_at_once(bench: Bench) -> None:
    bench.write(2, "bad")
    bench.poll()
    bench.write(2)
    loaded = bench.rollout.reload("m")
    assert (loaded.served.engine.version, loaded.changed) == (2, True)
    assert bench.states == {"ready": [2], "retiring": [1], "failed": []}
    assert bench.loader.checked[-1] == ["m/2"]  # and nothing older than that


def test_a_reload_goes_back_where_the_version_that_serves_is_gone(bench: Bench) -> None:
    sequence = bench.open(1)
    folder = bench.write(2)
    bench.poll()
    assert bench.states == {"ready": [2], "retiring": [1], "failed": []}
    bench.engine(1).finish(sequence, Ending.END)
    bench.engine(1).turn()
    bench.poll(2)
    resumable = bench.open(2)
    (folder / "model.onnx").unlink()
    folder.rmdir()
    loaded = bench.rollout.reload("m")
    assert (loaded.served.engine.version, loaded.changed) == (1, True)
    assert bench.states == {"ready": [1], "retiring": [2], "failed": []}
    assert not resumable.ended  # it stays until it ends, or for its time
    bench.poll(3)
    assert bench.states["ready"] == [1]


def test_a_version_that_comes_back_takes_the_place_of_its_own_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else metrics would have two of one number."""
    monkeypatch.setattr("tenuto.serving.rollout._UNLOAD_SECONDS", 0.0)
    folder = bench.write(2)
    bench.poll()
    bench.open(2)
    folder.rename(folder.with_name(".2"))
    bench.rollout.reload("m")
    bench.poll(1)
    folder.with_name(".2").rename(folder)
    bench.poll()
    assert bench.states["ready"] == [2]
    assert 2 not in bench.states["retiring"]
    versions = [m.version for m in bench.metrics.models]
    assert len(set(versions)) == len(versions)


def test_a_second_operator_is_told_to_try_again(bench: Bench) -> None:
    refused: list[str] = []

    def ask() -> None:
        for call in (bench.rollout.load, bench.rollout.unload, bench.rollout.reload):
            with pytest.raises(ModelNotReady) as error:
                call("m")
            refused.append(str(error.value))

    bench.write(2)
    bench.loader.during_check = ask
    assert bench.rollout.load("m").served.engine.version == 2
    assert refused == ["another operator's load of 'm' is not finished; try again"] * 3
    bench.loader.during_check = lambda: None
    assert not bench.rollout.load("m").changed


def test_an_operator_waits_for_the_look_that_is_going_on(bench: Bench) -> None:
    loads: list[Loaded] = []
    operator = threading.Thread(target=lambda: loads.append(bench.rollout.load("m")))
    seen: list[list[Loaded]] = []

    def ask() -> None:
        operator.start()
        while not bench.rollout._command.locked():
            assert operator.is_alive()
        seen.append(list(loads))

    bench.write(2)
    bench.loader.during_check = ask
    bench.poll()
    operator.join(30)
    assert seen == [[]]
    assert [(one.served.engine.version, one.changed) for one in loads] == [(2, False)]
    assert bench.loader.checked == [["m/1"], ["m/2"]]


def test_what_is_being_checked_is_announced(bench: Bench) -> None:
    seen: list[frozenset[tuple[str, int]]] = []
    bench.loader.during_check = lambda: seen.append(bench.catalogue.loading)
    bench.write(2)
    bench.write(7, model="n")
    bench.poll()
    assert seen == [{("m", 2), ("n", 7)}]
    assert bench.catalogue.loading == frozenset()

    def fail() -> None:
        raise OSError("no more processes")

    bench.loader.during_check = fail
    bench.write(3)
    with pytest.raises(OSError, match="no more processes"):
        bench.rollout.load("m")
    assert bench.catalogue.loading == frozenset()
    assert bench.states["ready"] == [2, 7]


def test_a_load_while_the_server_stops_says_so(bench: Bench) -> None:
    bench.write(2)
    bench.loader.during_check = bench.rollout.stop
    with pytest.raises(ModelNotReady, match="m/1 serves: m/2: the server stops"):
        bench.rollout.load("m")
    assert bench.states == {"ready": [1], "retiring": [], "failed": []}


def test_loads_and_unloads_are_in_the_log_with_their_checksum(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.rollout.start(0)
    with caplog.at_level("INFO", "tenuto.rollout"):
        bench.rollout.unload("m")
    assert f"m/1 is unloaded, SHA-256 {hashlib.sha256(b'good').hexdigest()}" in caplog.text
